"""Masks and boxes over images, and masks as image files."""

import colorsys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from datasets.pipeline.masks import IGNORED
from engine.plots.images import Row, draw_images

Tensors = Sequence[Tensor]  # images, or masks
Objects = Sequence[dict[str, Tensor]]  # of each image

COLUMNS = 4
LEGEND_COLUMNS = 8
OPACITY = 0.55  # of a mask over its image
IGNORED_COLOR = (224, 224, 224)


@cache
def palette(n_classes: int) -> np.ndarray:
    """RGB colors of 256 labels: black for the first one, the background, and nearly white for IGNORED.

    Hues advance by the golden ratio, so that the first few classes differ clearly; saturation and value alternate.
    """
    colors = np.zeros((256, 3), dtype=np.uint8)
    for label in range(1, max(2, n_classes)):
        hue, value = label * 0.618034 % 1, (1.0, 0.75, 0.9)[label % 3]
        colors[label] = [round(255 * part) for part in colorsys.hsv_to_rgb(hue, (0.65, 0.9)[label % 2], value)]
    colors[IGNORED] = IGNORED_COLOR
    return colors


# Masks


def draw_masks(figure: Figure, images: Tensors, masks: Tensors, predictions: Tensors | None, classes: Sequence[str]) -> None:
    """Draw each image (3 H W, from 0 to 1) with its mask and its prediction, if there are any, and a legend of their classes."""
    rows, drawn = [Row("image", images)], []
    if any((mask != IGNORED).any() for mask in masks):
        rows.append(mask_row("mask", images, masks, classes))
        drawn += list(masks)
    if predictions is not None:
        rows.append(mask_row("predicted", images, predictions, classes))
        drawn += list(predictions)
    draw_images(figure, rows, columns=COLUMNS, side_by_side=True, size=1.3)
    labels = np.unique(np.concatenate([np.unique(mask.cpu().numpy()) for mask in drawn])).tolist()
    names, colors = {**dict(enumerate(classes)), IGNORED: "ignored"}, palette(len(classes)) / 255
    handles = [Patch(color=colors[label], label=names[label]) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=8)
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(handles) // LEGEND_COLUMNS))


def mask_row(name: str, images: Tensors, masks: Tensors, classes: Sequence[str], titles: Sequence[str] = ()) -> Row:
    return Row(name, [blend_mask(image, mask, len(classes)) for image, mask in zip(images, masks, strict=True)], titles)


def blend_mask(image: Tensor, mask: Tensor, n_classes: int) -> Tensor:
    """The colors of the mask over the gray image, 3 H W. A larger mask is sampled at the pixels of the image."""
    image, mask = image.cpu(), mask.cpu().long()
    y, x = (torch.arange(n) * n_in_mask // n for n, n_in_mask in zip(image.shape[1:], mask.shape, strict=True))
    colors = torch.from_numpy(palette(n_classes))[mask[y][:, x]].permute(2, 0, 1) / 255
    return OPACITY * colors + (1 - OPACITY) * image.mean(0, keepdim=True)


def write_mask(mask: Tensor, path: Path) -> None:
    """Write a PNG whose pixels are class numbers, with a palette for viewers."""
    picture = Image.fromarray(mask.cpu().numpy().astype(np.uint8), mode="P")
    picture.putpalette(palette(256).tobytes())
    picture.save(path)


# Boxes


def draw_boxes(
    figure: Figure, images: Tensors, targets: Objects | None, predictions: Objects | None, classes: Sequence[str]
) -> None:
    """Draw each image twice, with its true and its predicted boxes, or once if only one of them is given."""
    given = (("objects", targets), ("found", predictions))
    rows = [box_row(name, images, objects, classes) for name, objects in given if objects is not None]
    draw_images(figure, rows, columns=COLUMNS, side_by_side=True, size=2.2)


def box_row(name: str, images: Tensors, objects: Objects, classes: Sequence[str]) -> Row:
    return Row(name, images, drawn_over=lambda i: box_artists(objects[i], classes))


def box_artists(objects: dict[str, Tensor], classes: Sequence[str]) -> Iterator[Artist]:
    """Yield boxes and their classes: predictions the more opaque the higher their score, crowds dotted."""
    colors = palette(len(classes)) / 255
    n = len(objects["boxes"])
    scores = objects["scores"].tolist() if "scores" in objects else [None] * n
    crowds = objects["iscrowd"].tolist() if "iscrowd" in objects else [False] * n
    for box, label, score, crowd in zip(objects["boxes"].tolist(), objects["labels"].tolist(), scores, crowds, strict=True):
        left, top, right, bottom = box
        color, alpha = colors[label], 1.0 if score is None else 0.25 + 0.75 * score
        edge: dict[str, Any] = {"edgecolor": color, "linewidth": 1.5, "linestyle": ":" if crowd else "-", "fill": False}
        yield Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, alpha=alpha, **edge)
        text = classes[label] if score is None else f"{classes[label]} {100 * score:.0f}"
        background = {"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": alpha}
        text_color = "white" if float(color @ (0.299, 0.587, 0.114)) < 0.5 else "black"
        yield Text(left, top, text, fontsize=5, color=text_color, va="bottom", bbox=background, alpha=alpha, clip_on=True)
