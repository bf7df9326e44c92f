"""The pictures of a run, and the style of every picture. Nothing here needs a display.

A function draws on the figure that it is given, and sets its size.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from engine.plots.style import COLORS, DASHES, TRAIN, VALID, line_style, style

PARTS = {"train": TRAIN, "valid": VALID, "valid_ema": COLORS[2]}

METRICS = ("acc@1", "mIoU", "mAP")
AUXILIARY = "train/loss_aux"
X_AXES = {"step": "step", "epoch": "epoch", "time": "elapsed"}  # and the keys of a line that say where it stands
UNITS_OF_TIME = ((3600, "hours"), (60, "minutes"), (1, "seconds"))

History = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl


# Curves


def draw_curves(
    figure: Figure, runs: Mapping[str, History], *, x: str = "step", smoothing: float = 0.0, title: str | None = None
) -> None:
    """Loss, metric and learning rate over updates (step), epochs or time, and the losses of auxiliary heads where there are any.

    In a picture of one run, colors tell training from validation; of several, they tell the runs apart, and training is thin.
    """
    is_one = len(runs) == 1
    panels = _panels(list(dict.fromkeys(key for history in runs.values() for line in history for key in line)), is_one)
    per_unit, unit = _unit(x, max((line["elapsed"] for history in runs.values() for line in history), default=0))
    with style():
        figure.set_size_inches(4 * max(2, len(panels)), 3.6 if is_one else 3.9 + 0.2 * len(runs))
        for axes, (label, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for i, history in enumerate(runs.values()):
                for n, key in enumerate(keys):
                    points = [(line[X_AXES[x]] / per_unit, line[key]) for line in history if key in line]
                    points = [(at, math.nan if value is None else value * (100 if "%" in label else 1)) for at, value in points]
                    how = _look_in_one(key, n) if is_one else _look_in_several(key, i, n)
                    _plot(axes, points, smoothing if key != "train/lr" else 0, how)
            axes.set(xlabel=unit, ylabel=label)
            if is_one and len(keys) > 1:
                axes.legend()
        if not is_one:
            own = [Line2D([], [], label=name, linewidth=1.8, **line_style(i)) for i, name in enumerate(runs)]
            figure.legend(handles=own, loc="outside lower center", title="thin: training, thick: validation")
        if title:
            figure.suptitle(title)


def _panels(known: Sequence[str], is_one: bool) -> dict[str, list[str]]:
    """What stands beside the panel -> the keys that are drawn in it."""
    metric = next((name for name in METRICS if f"valid/{name}" in known), METRICS[0])
    parts = PARTS if is_one else ("train", "valid")
    heads = [key for key in known if key.startswith(AUXILIARY)]
    panels = {
        "loss": [f"{part}/loss" for part in parts],
        "loss of the auxiliary heads" + ("" if is_one else " (dashed: the second)"): heads,
        f"{metric} (%)": [f"{part}/{metric}" for part in parts],
        "learning rate": ["train/lr"],
    }
    return {label: drawn for label, keys in panels.items() if (drawn := [key for key in keys if key in known])}


def _unit(x: str, seconds: float) -> tuple[float, str]:
    if x != "time":
        return 1, {"step": "update", "epoch": "epoch"}[x]
    return next((size, f"{name} of training") for size, name in UNITS_OF_TIME if seconds >= 2 * size or size == 1)


def _plot(axes: Axes, points: Sequence[tuple[float, float]], smoothing: float, how: Mapping[str, Any]) -> None:
    if not points:
        return
    at, values = zip(*points, strict=True)
    marker = "." if len(points) < 60 else None
    if smoothing:
        axes.plot(at, values, **{**how, "label": None, "alpha": 0.25, "linewidth": 0.9})
        values, marker = smoothed(values, smoothing), None
    axes.plot(at, values, marker=marker, **how)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """A moving average in which a value counts `weight` times as much as the one after it, as TensorBoard's. NaN is left out."""
    average, total, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        result.append(average / total if total else math.nan)
    return result


def _look_in_one(key: str, n: int) -> dict[str, Any]:
    if key.startswith(AUXILIARY):
        return {"color": COLORS[n], "label": f"head {key.removeprefix(AUXILIARY)}"}
    part = key.partition("/")[0]
    return {"color": PARTS[part], "label": "valid, averaged weights" if part == "valid_ema" else part}


def _look_in_several(key: str, i: int, n: int) -> dict[str, Any]:
    dashes = {"linestyle": DASHES[n]} if key.startswith(AUXILIARY) else {}
    return {**line_style(i), **dashes, "linewidth": 1.8 if key.startswith("valid/") or key == "train/lr" else 0.9}


# Images
