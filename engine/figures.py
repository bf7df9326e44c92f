"""The pictures of a run, and the style of every picture. Nothing here needs a display.

A function draws on the figure that it is given, and sets its size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

# Okabe and Ito's colours, which colour-blind people tell apart; a second and a third round are told apart by their dashes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
TRAIN, VALID, WRONG = COLOURS[0], COLOURS[1], COLOURS[1]
PARTS = {"train": TRAIN, "valid": VALID, "valid_ema": COLOURS[2]}
SHADES = "cividis"  # of maps, from dark to light: the same to every eye, and on paper
HEAT = "inferno"  # likewise, over an image
INK = "Blues"  # of tables, where most cells are nearly empty: from white to dark
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
DPI = 120

METRICS = ("acc@1", "mIoU", "mAP")
AUXILIARY = "train/loss_aux"
X_AXES = {"step": "step", "epoch": "epoch", "time": "elapsed"}  # and the keys of a line that say where it stands
UNITS_OF_TIME = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
COLUMNS = 8  # of a grid of images

History = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl


def new_figure() -> Figure:
    return Figure(layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


@contextmanager
def style(font_size: float = STYLE["font.size"], label_size: float | None = None) -> Iterator[None]:
    """`label_size` is that of what stands beside the axes."""
    labels = {"axes.labelsize": label_size} if label_size is not None else {}
    with matplotlib.rc_context({**STYLE, "font.size": font_size, **labels}):
        yield


def look(i: int) -> dict[str, str]:
    """Colour and dashes of the i-th of several lines."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}


# Curves


def draw_curves(
    figure: Figure, runs: Mapping[str, History], *, x: str = "step", smoothing: float = 0.0, title: str | None = None
) -> None:
    """Loss, metric and learning rate over updates (step), epochs or time, and the losses of auxiliary heads where there are any.

    In a picture of one run, colours tell training from validation; of several, they tell the runs apart, and training is thin.
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
            own = [Line2D([], [], label=name, linewidth=1.8, **look(i)) for i, name in enumerate(runs)]
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
        return {"color": COLOURS[n], "label": f"head {key.removeprefix(AUXILIARY)}"}
    part = key.partition("/")[0]
    return {"color": PARTS[part], "label": "valid, averaged weights" if part == "valid_ema" else part}


def _look_in_several(key: str, i: int, n: int) -> dict[str, Any]:
    dashes = {"linestyle": DASHES[n]} if key.startswith(AUXILIARY) else {}
    return {**look(i), **dashes, "linewidth": 1.8 if key.startswith("valid/") or key == "train/lr" else 0.9}


# Images


def draw_classes(figure: Figure, images: Tensor, targets: Tensor, probabilities: Tensor, classes: Sequence[str]) -> None:
    """Images with the predicted class and its probability; where it is wrong, the true class too."""
    draw_images(figure, images, *class_titles(probabilities, classes, targets))


def class_titles(
    probabilities: Tensor, classes: Sequence[str], targets: Tensor | None, names: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The titles and their colours. Where there are no targets, what is seen has names of another kind."""
    confidences, predicted = (part.tolist() for part in probabilities.max(1))
    said = [f"{short(classes[c])}: {100 * confidence:.0f} %" for c, confidence in zip(predicted, confidences, strict=True)]
    if targets is None:
        return [f"{title}\n({short(name)})" for title, name in zip(said, names, strict=True)], ["black"] * len(said)
    right = [c == target for c, target in zip(predicted, targets.tolist(), strict=True)]
    truth = [f"\ntrue: {short(classes[target])}" for target in targets.tolist()]
    titles = [title if is_right else title + true for title, is_right, true in zip(said, right, truth, strict=True)]
    return titles, ["black" if is_right else WRONG for is_right in right]


def draw_images(figure: Figure, images: Tensor, titles: Sequence[str], colours: Sequence[str]) -> None:
    """A grid of images, N C H W from 0 to 1, each under its title."""
    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    with style(font_size=8):
        figure.set_size_inches(max(4, 1.5 * columns), 1.75 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, image, title, colour in zip(grid.flat, images, titles, colours, strict=False):
            show_image(axes, image)
            axes.set_title(title, color=colour)


def show_image(axes: Axes, image: Tensor) -> None:
    """C H W from 0 to 1."""
    axes.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)


def short(name: str, length: int = 18) -> str:
    """The name of a class as far as there is room; ImageNet has long ones."""
    return name if len(name) <= length else f"{name[: length - 1].rstrip(' ,')}…"
