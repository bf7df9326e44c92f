"""Pictures of images with masks or boxes, and masks as pictures."""

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from datasets.masks import IGNORED
from engine.figures import STYLE

PAIRS_PER_ROW = 4
OPACITY = 0.55  # of a mask that lies over its image
IGNORED_COLOUR = (224, 224, 224)


@cache
def palette(n_classes: int) -> np.ndarray:
    """A colour for each of 256 labels, RGB: the first, background, is black, IGNORED nearly white.

    Hues go round by the golden ratio, so that the first few classes are far apart, and lightness changes from one to the next.
    """
    colours = np.zeros((256, 3), dtype=np.uint8)
    for label in range(1, max(2, n_classes)):
        hue, value = label * 0.618034 % 1, (1.0, 0.75, 0.9)[label % 3]
        colours[label] = [round(255 * part) for part in colorsys.hsv_to_rgb(hue, (0.65, 0.9)[label % 2], value)]
    colours[IGNORED] = IGNORED_COLOUR
    return colours


def write_mask(mask: Tensor, path: Path) -> None:
    picture = Image.fromarray(mask.cpu().numpy().astype(np.uint8), mode="P")
    picture.putpalette(palette(256).tobytes())
    picture.save(path)


def draw_masks(
    images: Sequence[Tensor], masks: Sequence[Tensor], predictions: Sequence[Tensor] | None, classes: Sequence[str]
) -> Figure:
    """Each image (3 H W, from 0 to 1), its mask and, where there are any, the prediction; below, the classes that occur."""
    kinds = [("image", None), ("mask", masks)] + ([("predicted", predictions)] if predictions is not None else [])
    columns = min(PAIRS_PER_ROW, len(images))
    rows = -(-len(images) // columns)
    occurring = np.unique(np.concatenate([np.unique(part.cpu().numpy()) for part in (*masks, *(predictions or ()))]))
    with matplotlib.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(1.3 * columns * len(kinds), 1.35 * rows + 0.7), layout="constrained")
        axes = figure.subplots(rows, columns * len(kinds), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for i, image in enumerate(images):
            for j, (name, of_kind) in enumerate(kinds):
                axis = axes[i // columns, i % columns * len(kinds) + j]
                axis.imshow(_shown(image, None if of_kind is None else of_kind[i], len(classes)), interpolation="nearest")
                if i < columns:
                    axis.set_title(name)
        names = {**dict(enumerate(classes)), IGNORED: "ignored"}
        colours = palette(len(classes)) / 255
        figure.legend(
            handles=[Patch(color=colours[label], label=names[label]) for label in occurring.tolist()],
            loc="outside lower center",
            ncols=8,
            frameon=False,
        )
    return figure


def draw_boxes(
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    predictions: Sequence[dict[str, Tensor]] | None,
    classes: Sequence[str],
) -> Figure:
    """Each image with its objects and, beside it, with what was found; crowds are dashed."""
    kinds = [("objects", targets)] + ([("found", predictions)] if predictions is not None else [])
    columns = min(PAIRS_PER_ROW, len(images))
    rows = -(-len(images) // columns)
    with matplotlib.rc_context({**STYLE, "font.size": 7}):
        figure = Figure(figsize=(2.2 * columns * len(kinds), 2.3 * rows), layout="constrained")
        axes = figure.subplots(rows, columns * len(kinds), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for i, image in enumerate(images):
            for j, (name, of_kind) in enumerate(kinds):
                axis = axes[i // columns, i % columns * len(kinds) + j]
                axis.imshow(_shown(image, None, len(classes)))
                _add_boxes(axis, of_kind[i], classes)
                if i < columns:
                    axis.set_title(name)
    return figure


def _add_boxes(axis: Axes, objects: dict[str, Tensor], classes: Sequence[str]) -> None:
    """Found ones as strongly as their score."""
    colours = palette(len(classes)) / 255
    scores = objects["scores"].tolist() if "scores" in objects else [None] * len(objects["boxes"])
    crowds = objects["iscrowd"].tolist() if "iscrowd" in objects else [False] * len(scores)
    for box, label, score, crowd in zip(objects["boxes"].tolist(), objects["labels"].tolist(), scores, crowds, strict=True):
        left, top, right, bottom = box
        colour, alpha = colours[label], 1.0 if score is None else 0.25 + 0.75 * score
        style = {"edgecolor": colour, "linewidth": 1.5, "linestyle": ":" if crowd else "-", "alpha": alpha, "fill": False}
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **style))
        said = classes[label] if score is None else f"{classes[label]} {100 * score:.0f}"
        box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": alpha}
        dark = float(colour @ (0.299, 0.587, 0.114)) < 0.5
        axis.text(
            left, top, said, fontsize=5, color="white" if dark else "black", va="bottom", bbox=box, alpha=alpha, clip_on=True
        )


def _shown(image: Tensor, mask: Tensor | None, n_classes: int) -> np.ndarray:
    """The mask's colours over the image in grey; of a larger mask, as many pixels as the image has."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    if mask is None:
        return pixels
    labels = mask.cpu().numpy()
    y, x = (np.arange(to) * of // to for to, of in zip(pixels.shape[:2], labels.shape, strict=True))
    colours = palette(n_classes)[labels[np.ix_(y, x)]] / 255
    grey = pixels.mean(-1, keepdims=True)
    return OPACITY * colours + (1 - OPACITY) * grey
