"""One picture of a comparison: the curves, and accuracy over what it has cost."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from engine.plots.images import short
from engine.plots.style import line_style, style
from tools.comparison.series import MONITORED, are_wide, series_of, unit_of_time
from tools.comparison.table import Row, mean_and_deviation

MARKERS = {"-": "o", "--": "s", ":": "^"}
LONGEST = 60  # characters of a name

Look = Mapping[str, str]


def draw_comparison(figure: Figure, rows: Sequence[Row], x: str) -> None:
    """A line of panels for each metric that is monitored: accuracies of other tasks aren't compared."""
    metrics = list(dict.fromkeys(row.first.monitor for row in rows))
    seconds, unit = unit_of_time(rows)
    labels = {"step": "update", "epoch": "epoch", "time": f"{unit} of training"}
    n_columns = min(len(rows), 3)  # of the legend
    with style():
        figure.set_size_inches(13, 3.9 * len(metrics) + 0.22 * -(-len(rows) // n_columns))
        for panels, metric in zip(figure.subplots(len(metrics), 3, squeeze=False), metrics, strict=True):
            of_metric = [(row, line_style(i)) for i, row in enumerate(rows) if row.first.monitor == metric]
            _curves(panels[0], of_metric, x, seconds)
            _points(panels[1], of_metric, "macs", per=1)
            _points(panels[2], of_metric, "wall_time", per=seconds)
            panels[0].set(xlabel=labels[x], ylabel=f"valid/{metric} (%)")
            panels[1].set(xlabel="multiply-accumulates of an image", ylabel=f"best valid/{metric} (%)")
            panels[1].xaxis.set_major_formatter(EngFormatter())
            panels[2].set(xlabel=labels["time"])
            panels[2].xaxis.set_major_formatter("{x:g}")
        keys = [_key(row, line_style(i)) for i, row in enumerate(rows)]
        figure.legend(handles=keys, loc="outside lower center", ncols=n_columns)


def _curves(axes: Axes, rows: Sequence[tuple[Row, Look]], x: str, seconds: float) -> None:
    """Every seed of a row has its line."""
    for row, how in rows:
        for run in row.runs:
            series = series_of(run, MONITORED, seconds)
            marker = "." if len(series["y"]) < 40 else None
            axes.plot(series[x], series["y"], linewidth=1.6, marker=marker, alpha=1 if len(row.runs) == 1 else 0.7, **how)


def _points(axes: Axes, rows: Sequence[tuple[Row, Look]], cost: str, per: float) -> None:
    """The mean over the seeds, with its deviation; a row without a number isn't there."""
    if are_wide([row for row, _ in rows], cost):
        axes.set_xscale("log")
    for row, how in rows:
        (at, aside), (best, deviation) = (mean_and_deviation(row, name) for name in (cost, "best"))
        if at is None or best is None:
            continue
        axes.errorbar(
            at / per,
            100 * best,
            xerr=None if aside is None else aside / per,
            yerr=None if deviation is None else 100 * deviation,
            color=how["color"],
            marker=MARKERS[how["linestyle"]],
            markersize=7,
            capsize=3,
        )


def _key(row: Row, how: Look) -> Line2D:
    seeds = f", {len(row.runs)} seeds" if len(row.runs) > 1 else ""
    state = "" if row.first.is_completed else f" ({row.first.status})"
    return Line2D([], [], label=f"{short(row.name, LONGEST)}{seeds}{state}", marker=MARKERS[how["linestyle"]], **how)
