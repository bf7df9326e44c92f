"""Grids of images, with predicted and true classes as titles."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from engine.plots.style import WRONG, style

COLUMNS = 8  # of a grid of images


def draw_classes(figure: Figure, images: Tensor, targets: Tensor, probabilities: Tensor, classes: Sequence[str]) -> None:
    """Images with the predicted class and its probability; where it is wrong, the true class too."""
    draw_images(figure, images, *class_titles(probabilities, classes, targets))


def class_titles(
    probabilities: Tensor, classes: Sequence[str], targets: Tensor | None, names: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The titles and their colors. Where there are no targets, what is seen has names of another kind."""
    confidences, predicted = (part.tolist() for part in probabilities.max(1))
    said = [f"{short(classes[c])}: {100 * confidence:.0f} %" for c, confidence in zip(predicted, confidences, strict=True)]
    if targets is None:
        return [f"{title}\n({short(name)})" for title, name in zip(said, names, strict=True)], ["black"] * len(said)
    right = [c == target for c, target in zip(predicted, targets.tolist(), strict=True)]
    truth = [f"\ntrue: {short(classes[target])}" for target in targets.tolist()]
    titles = [title if is_right else title + true for title, is_right, true in zip(said, right, truth, strict=True)]
    return titles, ["black" if is_right else WRONG for is_right in right]


def draw_images(figure: Figure, images: Tensor, titles: Sequence[str], colors: Sequence[str]) -> None:
    """A grid of images, N C H W from 0 to 1, each under its title."""
    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    with style(font_size=8):
        figure.set_size_inches(max(4, 1.5 * columns), 1.75 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, image, title, color in zip(grid.flat, images, titles, colors, strict=False):
            show_image(axes, image)
            axes.set_title(title, color=color)


def show_image(axes: Axes, image: Tensor) -> None:
    """C H W from 0 to 1."""
    axes.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)


def short(name: str, length: int = 18) -> str:
    """The name of a class as far as there is room; ImageNet has long ones."""
    return name if len(name) <= length else f"{name[: length - 1].rstrip(' ,')}…"
