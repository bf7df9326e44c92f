"""The metrics that runs logged, as curves with few enough points for a page; and a figure of curves, and accuracy over cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from engine.plots.images import short
from engine.plots.metrics import IN_PERCENT, TIME_UNITS
from engine.plots.style import line_style, style
from tools.comparison.rows import COLUMNS, Row
from tools.comparison.runs import RunRecord

MONITORED = "the monitored metric"  # the key of its curves, as runs may monitor different metrics
NO_CURVES = ("/count", "/images_per_sec")
WIDE_RANGE = 20  # the ratio of largest and smallest value from which an axis is logarithmic
MOST_POINTS = 300  # of a curve: more than a chart has pixels between them
DIGITS = 6
MARKERS = {"-": "o", "--": "s", ":": "^"}
MAX_NAME = 60  # characters


def y_labels(rows: Sequence[Row]) -> dict[str, str]:
    """Return the keys that have curves, the monitored metric and validation first, with the labels of their axes."""
    runs = [run for row in rows for run in row.runs]
    monitored = list(dict.fromkeys(run.monitor for run in runs))
    logged = dict.fromkeys(key for run in runs for line in run.history for key in line)
    labels = {MONITORED: f"{' or '.join(f'valid/{name}' for name in monitored)} (%)"}
    for part in ("valid", "train"):
        for key in logged:
            if key.startswith(part) and "/" in key and not key.endswith(NO_CURVES):
                labels[key] = f"{key} (%)" if key.partition("/")[2] in (*IN_PERCENT, *monitored) else key
    return labels


def x_labels(rows: Sequence[Row]) -> tuple[dict[str, str], float]:
    """Return the labels of the x-axes, and the number of seconds in the unit of time."""
    longest = max((run.wall_time or 0 for row in rows for run in row.runs), default=0)
    seconds, unit = next((unit for unit in TIME_UNITS if longest >= 2 * unit[0]), TIME_UNITS[-1])
    return {"step": "update", "epoch": "epoch", "time": f"{unit} of training"}, seconds


def has_wide_range(rows: Sequence[Row], name: str) -> bool:
    """Return whether the values of a column need a logarithmic axis."""
    values = [value for row in rows if (value := COLUMNS[name].mean_and_deviation(row)[0])]
    return bool(values) and max(values) > WIDE_RANGE * min(values)


def curve_of(run: RunRecord, key: str, seconds: float) -> dict[str, list[float]]:
    """Return the finite values that were logged under `key` as y, and where: step, epoch, and time in units of `seconds`."""
    tag = f"valid/{run.monitor}" if key == MONITORED else key
    scale = 100 if tag.partition("/")[2] in (*IN_PERCENT, run.monitor) else 1
    lines = [line for line in run.history if line.get(tag) is not None and math.isfinite(line[tag])]
    n = min(len(lines), MOST_POINTS)
    lines = [lines[i * (len(lines) - 1) // max(1, n - 1)] for i in range(n)]  # evenly, with the first and the last one
    curve = {
        "step": [line["step"] for line in lines],
        "epoch": [line["epoch"] for line in lines],
        "time": [line["elapsed"] / seconds for line in lines],
        "y": [scale * line[tag] for line in lines],
    }
    return {name: [float(f"{value:.{DIGITS}g}") for value in values] for name, values in curve.items()}


def draw_comparison(figure: Figure, rows: Sequence[Row], x: str) -> None:
    """Draw three panels for each monitored metric: curves by `x`, and accuracy over MACs and over time."""
    metrics = list(dict.fromkeys(row.first.monitor for row in rows))
    labels, seconds = x_labels(rows)
    n_columns = min(len(rows), 3)  # of the legend
    styles: list[Mapping[str, Any]] = [line_style(i) for i in range(len(rows))]
    with style():
        figure.set_size_inches(13, 3.9 * len(metrics) + 0.22 * -(-len(rows) // n_columns))
        for (curves, macs, time), metric in zip(figure.subplots(len(metrics), 3, squeeze=False), metrics, strict=True):
            styled_rows = [(row, options) for row, options in zip(rows, styles, strict=True) if row.first.monitor == metric]
            for row, options in styled_rows:
                for run in row.runs:
                    curve = curve_of(run, MONITORED, seconds)
                    marker, alpha = "." if len(curve["y"]) < 40 else None, 1 if len(row.runs) == 1 else 0.7
                    curves.plot(curve[x], curve["y"], linewidth=1.6, marker=marker, alpha=alpha, **options)
            _draw_points(macs, styled_rows, "macs", unit=1)
            _draw_points(time, styled_rows, "wall_time", unit=seconds)
            curves.set(xlabel=labels[x], ylabel=f"valid/{metric} (%)")
            macs.set(xlabel="multiply-accumulates of an image", ylabel=f"best valid/{metric} (%)")
            macs.xaxis.set_major_formatter(EngFormatter())
            time.set(xlabel=labels["time"])
            time.xaxis.set_major_formatter("{x:g}")
        handles = []
        for row, options in zip(rows, styles, strict=True):
            seeds = f", {len(row.runs)} seeds" if len(row.runs) > 1 else ""
            status = "" if row.first.is_completed else f" ({row.first.status})"
            label = f"{short(row.name, MAX_NAME)}{seeds}{status}"
            handles.append(Line2D([], [], label=label, marker=MARKERS[options["linestyle"]], **options))
        figure.legend(handles=handles, loc="outside lower center", ncols=n_columns)


def _draw_points(axes: Axes, rows: Sequence[tuple[Row, Mapping[str, Any]]], cost: str, unit: float) -> None:
    """Draw the best accuracy over a cost, as means over the seeds with deviations. Rows that lack a number have no point."""
    if has_wide_range([row for row, _ in rows], cost):
        axes.set_xscale("log")
    for row, options in rows:
        (x, x_error), (best, error) = (COLUMNS[name].mean_and_deviation(row) for name in (cost, "best"))
        if x is not None and best is not None:
            errors: dict[str, Any] = {"xerr": x_error and x_error / unit, "yerr": error and 100 * error, "capsize": 3}
            marker = {"color": options["color"], "marker": MARKERS[options["linestyle"]], "markersize": 7}
            axes.errorbar(x / unit, 100 * best, **errors, **marker)
