"""The pictures of a run, without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

# Okabe and Ito's colours, which colour-blind people tell apart
TRAIN, VALID, WRONG = "#0072B2", "#D55E00", "#D55E00"
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}


def draw_curves(history: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss, the metric and the learning rate over the updates."""
    metric = next((name for line in history for name in ("acc@1", "mIoU", "mAP") if f"valid/{name}" in line), "acc@1")
    panels = [("loss", 1), (metric, 100), ("lr", 1)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axis, (name, scale) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for part, colour in (("train", TRAIN), ("valid", VALID)):
                points = [(line["step"], line[f"{part}/{name}"] * scale) for line in history if f"{part}/{name}" in line]
                if points:
                    marker = "." if len(points) < 60 else None
                    axis.plot(*zip(*points, strict=True), color=colour, label=part, marker=marker)
            axis.set(xlabel="step", ylabel=f"{name} (%)" if scale == 100 else name)
            if axis.lines:
                axis.legend(frameon=False)
        figure.suptitle(title)
    return figure


def draw_classes(images: Tensor, targets: Tensor, probabilities: Tensor, classes: Sequence[str]) -> Figure:
    """Images with the predicted class and its probability; where it is wrong, the true class too."""
    columns = 8
    rows = -(-len(images) // columns)
    with matplotlib.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(1.5 * columns, 1.75 * rows), layout="constrained")
        for axis in figure.subplots(rows, columns, squeeze=False).flat:
            axis.set_axis_off()
        for axis, image, target, scores in zip(figure.axes, images, targets.tolist(), probabilities, strict=False):
            predicted = int(scores.argmax())
            axis.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            said = f"{classes[predicted]} {100 * float(scores[predicted]):.0f} %"
            right = predicted == target
            axis.set_title(said if right else f"{said}\ntrue: {classes[target]}", color="black" if right else WRONG)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
