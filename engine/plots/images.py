"""Grids of images, and titles with predicted and true classes."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D, Bbox, TransformedBbox
from torch import Tensor

from engine.plots.style import WRONG, style

COLUMNS = 8
LINE, GAP = 0.17, 0.08  # inches: the height of a line of a title, and between images


@dataclass(frozen=True)
class Row:
    """One picture per image: the image itself, or something made from it, such as its mask."""

    name: str
    images: Sequence[Tensor] | Tensor  # C H W, from 0 to 1
    titles: Sequence[str] = ()
    colors: Sequence[str] = ()  # of the titles; default: black
    drawn_over: Callable[[int], Iterable[Artist]] | None = None  # over image i, in pixel coordinates


def draw_images(
    figure: Figure, rows: Sequence[Row], title: str = "", columns: int = COLUMNS, size: float = 1.45, side_by_side: bool = False
) -> None:
    """Draw every row of images, `size` inches wide each. After `columns` images, all rows continue below.

    The pictures of one image are below one another, with the names of the rows at the left; or side by side, under the names.
    All are on one Axes, in inches: an Axes for each of them would take three times as long.
    """
    n = len(rows[0].images)
    columns = min(columns, n)
    tallest = min(1, max(image.shape[1] / image.shape[2] for row in rows for image in row.images)) * (size - GAP)
    heights = [tallest + GAP + LINE * max((title.count("\n") + 1 for title in row.titles), default=0) for row in rows]
    block_height = max(heights) if side_by_side else sum(heights)
    left, top = (0, LINE) if side_by_side else (LINE, 0)
    width = left + size * columns * (len(rows) if side_by_side else 1)
    height = top + block_height * math.ceil(n / columns)
    with style(font_size=8):
        figure.set_size_inches(max(4.5, width), height + (0.4 if title else 0.1))
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set(xlim=(0, width), ylim=(-height, 0))
        for j, row in enumerate(rows):
            step, across, down = (size * len(rows), j * size, block_height) if side_by_side else (size, 0, sum(heights[: j + 1]))
            cells = [
                Bbox.from_bounds(left + column * step + across, -top - block * block_height - down, size - GAP, tallest)
                for block, column in (divmod(i, columns) for i in range(n))
            ]
            _draw_row(axes, row, cells)
            for cell in cells[:columns] if side_by_side else ():
                axes.text(cell.x0 + cell.width / 2, 0.03 - top, row.name, ha="center", va="bottom", in_layout=False)
            for cell in cells[::columns] if not side_by_side else ():
                axes.text(0, cell.y0 + cell.height / 2, row.name, fontsize=9, va="center", rotation=90, in_layout=False)
        if title:
            figure.suptitle(title, fontsize=10)


def _draw_row(axes: Axes, row: Row, cells: Sequence[Bbox]) -> None:
    for i, (image, cell) in enumerate(zip(row.images, cells, strict=True)):
        height, width = image.shape[1:]
        place = cell.shrunk_to_aspect(height / width, container=cell).anchored("C", container=cell)
        show_image(axes, image, place)
        if row.drawn_over is not None:
            to_inches = Affine2D().translate(0.5, 0.5).scale(place.width / width, -place.height / height)
            to_inches.translate(place.x0, place.y1)
            for artist in row.drawn_over(i):
                artist.set_transform(to_inches + axes.transData)
                axes.add_artist(artist)
                artist.set_clip_box(TransformedBbox(place, axes.transData))
        if row.titles:
            center, color = cell.x0 + cell.width / 2, row.colors[i] if row.colors else "black"
            axes.text(center, place.y1 + 0.03, row.titles[i], color=color, ha="center", va="bottom", in_layout=False)


def show_image(axes: Axes, image: Tensor, place: Bbox | None = None) -> None:
    """Show an image C H W, from 0 to 1, gray or RGB, at its place on the axes, or on all of them."""
    extent = None if place is None else (place.x0, place.x1, place.y0, place.y1)
    axes.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)


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
