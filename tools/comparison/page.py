"""A comparison as one HTML file that needs no network: its charts are Bokeh's, whose JavaScript is part of the file."""

import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, CustomJSTickFormatter, DataRange1d, HoverTool
from bokeh.plotting import figure
from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.plots.style import line_style
from tools.comparison.curves import MONITORED, curve_of, has_wide_range, x_labels, y_labels
from tools.comparison.mistakes import disagreements, mistakes_of
from tools.comparison.rows import COLUMNS, Row, columns_for, differences, machine_of, notes_on
from tools.comparison.verdict import Verdict

TEMPLATE = Path(__file__).with_name("template")
color_and_dashes = itemgetter("color", "linestyle")
BLACK = "#000000"  # replaced by the color of the page's text, as the page may be dark
HEIGHT = 380  # of a chart, in pixels
SVG_DASHES = {"-": "none", "--": "6 3", ":": "2 3"}
DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}
MARKERS = {"-": "circle", "--": "square", ":": "triangle"}
SHORT_NUMBERS = """
const sizes = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]
const [size, unit] = sizes.find(([size]) => Math.abs(tick) >= size) ?? [1, ""]
return `${parseFloat((tick / size).toPrecision(4))} ${unit}`.trim()
"""


def make_page(rows: Sequence[Row], n_mistakes: int, overrides: Mapping[str, Any], verdicts: Sequence[Verdict] = ()) -> str:
    """Render the page. `overrides` are config keys for finding the mistakes, such as data.dataroot."""
    columns = sorted(columns_for(rows), key=lambda column: not (column.name == "run" or column.is_in_percent))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # keep the order of Bokeh's models: definitions precede references
    table, readable = [], [row for row in rows if row.first.is_readable]
    for i, row in enumerate(rows):
        color, dashes = color_and_dashes(line_style(i))
        key = {"color": "currentColor" if color == BLACK else color, "dashes": SVG_DASHES[dashes]}
        cells = [(column, column.cell(row), column.mean_and_deviation(row)[0]) for column in columns]
        table.append({**key, "completed": row.first.is_completed, "cells": cells})
    return environment.get_template("page.html").render(
        title=rows[0].name if len(rows) == 1 else f"{len(rows)} trainings compared",
        date=time.strftime("%Y-%m-%d %H:%M"),
        columns=columns,
        rows=table,
        reasons=notes_on(rows),
        library=Resources(mode="inline", components=["bokeh"], log_level="error").render(),
        data=_chart_data(rows),
        verdicts=disagreements(verdicts, max(1, n_mistakes), overrides),
        mistakes=mistakes_of(readable, n_mistakes, overrides) if n_mistakes else [],
        names=[row.name for row in readable],
        n_runs=sum(len(row.runs) for row in rows),
        differences={
            "config": differences([{**row.first.config, "seed": row.seeds} for row in readable]),
            "versions and machine": differences([machine_of(row.first) for row in readable]),
        },
    )


def _chart_data(rows: Sequence[Row]) -> dict[str, Any]:
    """Make the data of page.js: charts, and the points of all curves. The first chart has empty lines, which page.js fills."""
    x, seconds = x_labels(rows)
    y = y_labels(rows)
    chart = _chart("curves", x["step"], y[MONITORED])
    curves = []
    for i, row in enumerate(rows):
        for n, run in enumerate(row.runs):
            places: list[dict[str, list[float]]] = []  # shared by the curves that were logged at the same steps
            series = {}
            for key in y:
                place = curve_of(run, key, seconds)
                values = place.pop("y")
                if place not in places:
                    places.append(place)
                series[key] = {"at": places.index(place), "y": values}
            name = f"curve-{i}-{n}"
            curves.append({"row": i, "name": name, "run": run.name, "places": places, "series": series})
            source = ColumnDataSource({"x": [], "y": [], "run": []}, name=name)
            color, dashes = color_and_dashes(line_style(i))
            line = chart.line("x", "y", source=source, line_color=color, line_dash=DASHES[dashes], line_width=2)
            points = chart.scatter("x", "y", source=source, size=4, color=color)
            line.tags = points.tags = [i]
    macs = _point_chart(rows, "macs", "multiply-accumulates of an image", unit=1)
    charts = {"curves": chart, "macs": macs, "wall_time": _point_chart(rows, "wall_time", x["time"], unit=seconds)}
    items = {name: json_item(chart) for name, chart in charts.items()}
    black = [i for i in range(len(rows)) if line_style(i)["color"] == BLACK]
    return {"x": x, "y": y, "curves": curves, "charts": items, "black": black}


def _point_chart(rows: Sequence[Row], cost: str, label: str, unit: float) -> figure:
    """Draw the best accuracy over a cost. Rows that lack a number have no point."""
    metrics = " or ".join(dict.fromkeys(row.first.monitor for row in rows))
    chart = _chart(cost, label, f"best valid/{metrics} (%)", "log" if has_wide_range(rows, cost) else "linear")
    for i, row in enumerate(rows):
        (x, _), (best, deviation) = (COLUMNS[name].mean_and_deviation(row) for name in (cost, "best"))
        if x is None or best is None:
            continue
        low, high = (100 * (best + sign * (deviation or 0)) for sign in (-1, 1))
        source = ColumnDataSource({"x": [x / unit], "y": [100 * best], "low": [low], "high": [high], "run": [row.name]})
        color, dashes = color_and_dashes(line_style(i))
        bar = chart.segment("x", "low", "x", "high", source=source, line_color=color, line_width=2)
        point = chart.scatter("x", "y", source=source, size=12, color=color, marker=MARKERS[dashes])
        bar.tags = point.tags = [i]
    return chart


def _chart(name: str, x: str, y: str, x_type: Literal["linear", "log"] = "linear") -> figure:
    """Make an empty chart. page.js finds its parts by name, and sets the colors of a light or dark page."""
    hover = HoverTool(tooltips=[("", "@run"), (y, "@y{0.0000}"), (x, "@x{0,0.[00]}")], name=f"{name}-hover")
    tools: list[HoverTool | str] = [hover, "box_zoom", "pan", "wheel_zoom", "reset", "save"]
    x_range, y_range = DataRange1d(only_visible=True), DataRange1d(only_visible=True)
    chart = figure(  # active_drag: a moving finger scrolls the page
        x_range=x_range, y_range=y_range, x_axis_label=x, x_axis_type=x_type, y_axis_label=y, tools=tools, active_drag=None
    )
    chart.update(height=HEIGHT, sizing_mode="stretch_width", background_fill_alpha=0, border_fill_alpha=0)
    chart.toolbar.logo = chart.outline_line_color = None
    chart.xaxis.formatter = CustomJSTickFormatter(code=SHORT_NUMBERS)
    chart.xaxis.name, chart.yaxis.name = f"{name}-x", f"{name}-y"
    return chart
