"""A figure of a comparison: curves, and accuracy over cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from engine.plots.images import short
from engine.plots.style import line_style, style
from tools.comparison.curves import MONITORED, curve_of, has_wide_range, x_labels
from tools.comparison.rows import COLUMNS, Row

MARKERS = {"-": "o", "--": "s", ":": "^"}
MAX_NAME = 60  # characters


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
