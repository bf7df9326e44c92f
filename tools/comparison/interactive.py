"""Charts that answer to the mouse and the finger, by Bokeh, whose JavaScript goes into the page: it needs no network."""

from collections.abc import Iterator, Sequence
from typing import Any

from bokeh.embed import json_item
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CustomJSTickFormatter,
    HoverTool,
    PanTool,
    ResetTool,
    SaveTool,
    WheelZoomTool,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from engine.plots.style import line_style
from tools.comparison.series import MONITORED, are_wide, keys_of, labels_of, series_of, unit_of_time
from tools.comparison.table import Row, mean_and_deviation

BLACK = "#000000"  # is in the color of the page's text
DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}
MARKERS = {"-": "circle", "--": "square", ":": "triangle"}
HEIGHT = 380  # of a chart, in pixels; it is as wide as there is room
SHORT_NUMBERS = """
const sizes = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]
const [size, unit] = sizes.find(([size]) => Math.abs(tick) >= size) ?? [1, ""]
return `${parseFloat((tick / size).toPrecision(4))} ${unit}`.trim()
"""


def library() -> str:
    """Bokeh's script, as an element of a page."""
    return Resources(mode="inline", components=["bokeh"], log_level="error").render()


def make_charts(rows: Sequence[Row]) -> dict[str, Any]:
    """All that the page's own script needs: charts, and what it draws other curves from."""
    seconds, unit = unit_of_time(rows)
    x = {"step": "update", "epoch": "epoch", "time": f"{unit} of training"}
    y = labels_of(rows)
    curves = list(_curves(rows, seconds))
    charts = {
        "curves": _draw_curves(curves, x["step"], y[MONITORED]),
        "macs": _draw_points(rows, "macs", "multiply-accumulates of an image", per=1),
        "wall_time": _draw_points(rows, "wall_time", x["time"], per=seconds),
    }
    return {
        "x": x,
        "y": y,
        "curves": curves,
        "charts": {name: json_item(chart) for name, chart in charts.items()},
        "black": [i for i in range(len(rows)) if line_style(i)["color"] == BLACK],
    }


def _curves(rows: Sequence[Row], seconds: float) -> Iterator[dict[str, Any]]:
    """Of each run, what was logged; curves that were logged in the same lines have their places in common."""
    keys = keys_of(rows)
    for i, row in enumerate(rows):
        for n, run in enumerate(row.runs):
            places: list[dict[str, list[float]]] = []
            series = {}
            for key in keys:
                place = series_of(run, key, seconds)
                values = place.pop("y")
                if place not in places:
                    places.append(place)
                series[key] = {"at": places.index(place), "y": values}
            yield {"row": i, "name": f"curve-{i}-{n}", "run": run.name, "places": places, "series": series}


def _draw_curves(curves: Sequence[dict[str, Any]], x: str, y: str) -> figure:
    """Lines that the page's own script fills."""
    chart = _chart("curves", x, y)
    for curve in curves:
        source = ColumnDataSource({"x": [], "y": [], "run": []}, name=curve["name"])
        color, dashes, _ = _look(curve["row"])
        line = chart.line("x", "y", source=source, line_color=color, line_dash=dashes, line_width=2)
        points = chart.scatter("x", "y", source=source, size=4, color=color)
        line.tags = points.tags = [curve["row"]]
    return chart


def _draw_points(rows: Sequence[Row], cost: str, label: str, per: float) -> figure:
    """The best accuracy over what it has cost; a row without a number isn't there."""
    metrics = " or ".join(dict.fromkeys(row.first.monitor for row in rows))
    chart = _chart(cost, label, f"best valid/{metrics} (%)", is_wide=are_wide(rows, cost))
    for i, row in enumerate(rows):
        (x, _), (y, deviation) = (mean_and_deviation(row, name) for name in (cost, "best"))
        if x is None or y is None:
            continue
        color, _, marker = _look(i)
        x, low, y, high = x / per, 100 * (y - (deviation or 0)), 100 * y, 100 * (y + (deviation or 0))
        source = ColumnDataSource({"x": [x], "y": [y], "low": [low], "high": [high], "run": [row.name]})
        bar = chart.segment("x", "low", "x", "high", source=source, line_color=color, line_width=2)
        point = chart.scatter("x", "y", source=source, size=12, color=color, marker=marker)
        bar.tags = point.tags = [i]
    return chart


def _look(i: int) -> tuple[str, str, str]:
    """Color, dashes and marker of a row."""
    how = line_style(i)
    return how["color"], DASHES[how["linestyle"]], MARKERS[how["linestyle"]]


def _chart(name: str, x: str, y: str, *, is_wide: bool = False) -> figure:
    """The page's own script gives it the colors of the page, light or dark."""
    hover = HoverTool(tooltips=[("", "@run"), (y, "@y{0.0000}"), (x, "@x{0,0.[00]}")], name=f"{name}-hover")
    chart = figure(
        height=HEIGHT,
        sizing_mode="stretch_width",
        tools=[hover, BoxZoomTool(), PanTool(), WheelZoomTool(), ResetTool(), SaveTool()],
        active_drag=None,  # a finger that moves scrolls the page
        x_axis_label=x,
        x_axis_type="log" if is_wide else "linear",
        y_axis_label=y,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
    )
    chart.toolbar.logo = None
    chart.x_range.only_visible = chart.y_range.only_visible = True
    chart.xaxis.formatter = CustomJSTickFormatter(code=SHORT_NUMBERS)
    chart.xaxis.name, chart.yaxis.name = f"{name}-x", f"{name}-y"
    return chart
