"""Curves of logged metrics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from engine.plots.metrics import TIME_UNITS, monitored_in
from engine.plots.style import COLORS, DASHES, TRAIN, VALID, line_style, style

PARTS = {"train": TRAIN, "valid": VALID, "valid_ema": COLORS[2]}
AUXILIARY = "train/loss_aux"
X_AXES = {"step": "step", "epoch": "epoch", "time": "elapsed"}  # -> the key in a line of metrics.jsonl

History = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl


def draw_curves(
    figure: Figure, runs: Mapping[str, History], *, x: str = "step", smoothing: float = 0.0, title: str | None = None
) -> None:
    """Draw loss, metric and learning rate over updates (step), epochs or time, and the losses of auxiliary heads, if any.

    With one run, colors distinguish training from validation. With several, colors distinguish the runs, and training is thin.
    """
    is_one = len(runs) == 1
    logged = list(dict.fromkeys(key for history in runs.values() for line in history for key in line))
    metric, parts = monitored_in(logged), PARTS if is_one else ("train", "valid")
    auxiliary = "loss of the auxiliary heads" + ("" if is_one else " (dashed: the second)")
    panels = {  # y-axis label -> the keys drawn in the panel
        "loss": [f"{part}/loss" for part in parts],
        auxiliary: [key for key in logged if key.startswith(AUXILIARY)],
        f"{metric} (%)": [f"{part}/{metric}" for part in parts],
        "learning rate": ["train/lr"],
    }
    panels = {label: drawn for label, keys in panels.items() if (drawn := [key for key in keys if key in logged])}
    unit, label = 1, {"step": "update", "epoch": "epoch"}.get(x, "")
    if x == "time":
        longest = max((line["elapsed"] for history in runs.values() for line in history), default=0)
        unit, name = next((unit for unit in TIME_UNITS if longest >= 2 * unit[0]), TIME_UNITS[-1])
        label = f"{name} of training"
    with style():
        figure.set_size_inches(4 * max(2, len(panels)), 3.6 if is_one else 3.9 + 0.2 * len(runs))
        for axes, (y_label, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            scale = 100 if "%" in y_label else 1
            for i, history in enumerate(runs.values()):
                for n, key in enumerate(keys):
                    lines = [line for line in history if key in line]
                    if not lines:
                        continue
                    at = [line[X_AXES[x]] / unit for line in lines]
                    values = [math.nan if line[key] is None else line[key] * scale for line in lines]
                    options = _style(key, n, i, is_one)
                    marker = "." if len(at) < 60 else None
                    if smoothing and key != "train/lr":
                        axes.plot(at, values, **{**options, "label": None, "alpha": 0.25, "linewidth": 0.9})
                        values, marker = smoothed(values, smoothing), None
                    axes.plot(at, values, marker=marker, **options)
            axes.set(xlabel=label, ylabel=y_label)
            if is_one and len(keys) > 1:
                axes.legend()
        if not is_one:
            handles = [Line2D([], [], label=name, linewidth=1.8, **line_style(i)) for i, name in enumerate(runs)]
            figure.legend(handles=handles, loc="outside lower center", title="thin: training, thick: validation")
        if title:
            figure.suptitle(title)


def _style(key: str, n: int, run: int, is_one: bool) -> dict[str, Any]:
    """Style the n-th key of a panel, of this run."""
    is_auxiliary, part = key.startswith(AUXILIARY), key.partition("/")[0]
    if is_one and is_auxiliary:
        return {"color": COLORS[n], "label": f"head {key.removeprefix(AUXILIARY)}"}
    if is_one:
        return {"color": PARTS[part], "label": "valid, averaged weights" if part == "valid_ema" else part}
    dashes = {"linestyle": DASHES[n]} if is_auxiliary else {}
    return {**line_style(run), **dashes, "linewidth": 1.8 if part == "valid" or key == "train/lr" else 0.9}


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """A moving average, as TensorBoard's: a value weighs `weight` times as much as the next one. NaN is skipped."""
    average, total, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average, total = weight * average + (1 - weight) * value, weight * total + (1 - weight)
        result.append(average / total if total else math.nan)
    return result
