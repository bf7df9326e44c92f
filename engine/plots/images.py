"""Grids of images, and titles with predicted and true classes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from engine.plots.style import WRONG, style

COLUMNS = 8


@dataclass(frozen=True)
class Row:
    """One picture per image: the image itself, or something made from it, such as its mask."""

    name: str
    images: Sequence[Tensor] | Tensor  # C H W, from 0 to 1
    titles: Sequence[str] = ()
    colors: Sequence[str] = ()  # of the titles; default: black
    draw_over: Callable[[Axes, int], None] | None = None  # draws over image i


def draw_images(
    figure: Figure, rows: Sequence[Row], title: str = "", columns: int = COLUMNS, size: float = 1.45, side_by_side: bool = False
) -> None:
    """Draw every row of images, `size` inches wide each. After `columns` images, all rows continue below.

    The pictures of one image are below one another, with the names of the rows at the left; or side by side, under the names.
    """
    n = len(rows[0].images)
    columns = min(columns, n)
    blocks = math.ceil(n / columns)
    heights = [size + 0.05 + 0.15 * max((title.count("\n") + 1 for title in row.titles), default=0) for row in rows]
    height = blocks * (max(heights) if side_by_side else sum(heights))
    across, down = (len(rows), 1) if side_by_side else (1, len(rows))
    with style(font_size=8):
        figure.set_size_inches(max(4.5, 0.5 + size * columns * across), 0.5 + height)
        grid = empty_grid(figure, blocks * down, columns * across)
        for i in range(n):
            block, column = divmod(i, columns)
            for j, row in enumerate(rows):
                axes = grid[block, column * across + j] if side_by_side else grid[block * down + j, column]
                show_image(axes, row.images[i])
                if row.draw_over is not None:
                    row.draw_over(axes, i)
                if row.titles:
                    axes.set_title(row.titles[i], color=row.colors[i] if row.colors else "black")
                if side_by_side and block == 0:
                    axes.set_title(row.name)
                elif not side_by_side and column == 0:
                    axes.set_ylabel(row.name, fontsize=9)
        if title:
            figure.suptitle(title, fontsize=10)


def empty_grid(figure: Figure, rows: int, columns: int) -> np.ndarray:
    """Axes without ticks and frames."""
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    return grid


def show_image(axes: Axes, image: Tensor) -> None:
    """Show an image C H W, from 0 to 1, gray or RGB."""
    axes.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)


def class_titles(
    probabilities: Tensor, classes: Sequence[str], targets: Tensor | None, names: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Titles and their colors: predicted class and probability, then the true class of a mistake.

    Without targets, `names` follow in parentheses: of the files, or of true classes that the model doesn't have.
    """
    confidences, predicted = (part.tolist() for part in probabilities.max(1))
    titles = [f"{short(classes[c])}: {100 * confidence:.0f} %" for c, confidence in zip(predicted, confidences, strict=True)]
    if targets is None:
        return [f"{title}\n({short(name)})" for title, name in zip(titles, names, strict=True)], ["black"] * len(titles)
    colors = ["black"] * len(titles)
    for i, target in enumerate(targets.tolist()):
        if predicted[i] != target:
            titles[i] += f"\ntrue: {short(classes[target])}"
            colors[i] = WRONG
    return titles, colors


def draw_labels(figure: Figure, images: Tensor, truth: Tensor | None, predicted: Tensor, classes: Sequence[str]) -> None:
    """Draw images with the predicted labels; if the truth is known, + marks a label that is wrong and - one that is missing."""
    titles, colors = [], []
    for there, found in zip((truth if truth is not None else predicted).tolist(), predicted.tolist(), strict=True):
        marks = {(True, True): "", (False, True): "+", (True, False): "-"}
        names = zip(there, found, classes, strict=True)
        words = [f"{marks[is_there, is_found]}{short(name)}" for is_there, is_found, name in names if is_there or is_found]
        titles.append("\n".join(words) or "none")
        colors.append("black" if there == found else WRONG)
    draw_images(figure, [Row("", images, titles, colors)])


def short(name: str, length: int = 18) -> str:
    """Shorten the name of a class; ImageNet has long ones."""
    return name if len(name) <= length else f"{name[: length - 1].rstrip(' ,')}…"
