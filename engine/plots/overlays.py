"""Pictures of images with masks or boxes, and masks as pictures."""

import colorsys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from datasets.pipeline.masks import IGNORED
from engine.plots.style import style

PAIRS_PER_ROW = 4
OPACITY = 0.55  # of a mask that lies over its image
IGNORED_COLOR = (224, 224, 224)


@cache
def palette(n_classes: int) -> np.ndarray:
    """A color for each of 256 labels, RGB: the first, background, is black, IGNORED nearly white.

    Hues go round by the golden ratio, so that the first few classes are far apart, and lightness changes from one to the next.
    """
    colors = np.zeros((256, 3), dtype=np.uint8)
    for label in range(1, max(2, n_classes)):
        hue, value = label * 0.618034 % 1, (1.0, 0.75, 0.9)[label % 3]
        colors[label] = [round(255 * part) for part in colorsys.hsv_to_rgb(hue, (0.65, 0.9)[label % 2], value)]
    colors[IGNORED] = IGNORED_COLOR
    return colors


def write_mask(mask: Tensor, path: Path) -> None:
    picture = Image.fromarray(mask.cpu().numpy().astype(np.uint8), mode="P")
    picture.putpalette(palette(256).tobytes())
    picture.save(path)


def draw_masks(
    figure: Figure,
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    predictions: Sequence[Tensor] | None,
    classes: Sequence[str],
) -> None:
    """Each image (3 H W, from 0 to 1), its mask and its prediction, where there are any; below, the classes that occur."""
    kinds: list[tuple[str, Sequence[Tensor] | None]] = [("image", None)]
    if any((mask != IGNORED).any() for mask in masks):
        kinds.append(("mask", masks))
    if predictions is not None:
        kinds.append(("predicted", predictions))
    columns = min(PAIRS_PER_ROW, len(images))
    rows = -(-len(images) // columns)
    with style(font_size=8):
        figure.set_size_inches(1.3 * columns * len(kinds), 1.35 * rows + 0.7)
        axes = figure.subplots(rows, columns * len(kinds), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for i, image in enumerate(images):
            for j, (name, of_kind) in enumerate(kinds):
                axis = axes[i // columns, i % columns * len(kinds) + j]
                axis.imshow(with_mask(image, None if of_kind is None else of_kind[i], len(classes)), interpolation="nearest")
                if i < columns:
                    axis.set_title(name)
        add_legend(figure, [part for _, of_kind in kinds[1:] for part in of_kind], classes)


def add_legend(figure: Figure, masks: Iterable[Tensor], classes: Sequence[str]) -> None:
    """The classes that occur in them."""
    occurring = np.unique(np.concatenate([np.unique(mask.cpu().numpy()) for mask in masks]))
    names = {**dict(enumerate(classes)), IGNORED: "ignored"}
    colors = palette(len(classes)) / 255
    handles = [Patch(color=colors[label], label=names[label]) for label in occurring.tolist()]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)


def draw_boxes(
    figure: Figure,
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]] | None,
    predictions: Sequence[dict[str, Tensor]] | None,
    classes: Sequence[str],
) -> None:
    """Each image with its objects and, beside it, with what was found, where these are known; crowds are dotted."""
    kinds = [(name, of_kind) for name, of_kind in (("objects", targets), ("found", predictions)) if of_kind is not None]
    columns = min(PAIRS_PER_ROW, len(images))
    rows = -(-len(images) // columns)
    with style(font_size=7):
        figure.set_size_inches(2.2 * columns * len(kinds), 2.3 * rows)
        axes = figure.subplots(rows, columns * len(kinds), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for i, image in enumerate(images):
            for j, (name, of_kind) in enumerate(kinds):
                axis = axes[i // columns, i % columns * len(kinds) + j]
                axis.imshow(with_mask(image, None, len(classes)))
                add_boxes(axis, of_kind[i], classes)
                if i < columns:
                    axis.set_title(name)


def add_boxes(axis: Axes, objects: dict[str, Tensor], classes: Sequence[str]) -> None:
    """Found ones as strongly as their score."""
    colors = palette(len(classes)) / 255
    scores = objects["scores"].tolist() if "scores" in objects else [None] * len(objects["boxes"])
    crowds = objects["iscrowd"].tolist() if "iscrowd" in objects else [False] * len(scores)
    for box, label, score, crowd in zip(objects["boxes"].tolist(), objects["labels"].tolist(), scores, crowds, strict=True):
        left, top, right, bottom = box
        color, alpha = colors[label], 1.0 if score is None else 0.25 + 0.75 * score
        style = {"edgecolor": color, "linewidth": 1.5, "linestyle": ":" if crowd else "-", "alpha": alpha, "fill": False}
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **style))
        said = classes[label] if score is None else f"{classes[label]} {100 * score:.0f}"
        box = {"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": alpha}
        dark = float(color @ (0.299, 0.587, 0.114)) < 0.5
        axis.text(
            left, top, said, fontsize=5, color="white" if dark else "black", va="bottom", bbox=box, alpha=alpha, clip_on=True
        )


def with_mask(image: Tensor, mask: Tensor | None, n_classes: int) -> np.ndarray:
    """The mask's colors over the image in gray; of a larger mask, as many pixels as the image has."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    if mask is None:
        return pixels
    labels = mask.cpu().numpy()
    y, x = (np.arange(to) * of // to for to, of in zip(pixels.shape[:2], labels.shape, strict=True))
    colors = palette(n_classes)[labels[np.ix_(y, x)]] / 255
    gray = pixels.mean(-1, keepdims=True)
    return OPACITY * colors + (1 - OPACITY) * gray
