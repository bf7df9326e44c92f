"""Images of datasets/shapes.py by their indices, with a class, a box and a mask for each object."""

from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.shapes import boxes_of, chunks


@dataclass(frozen=True)
class Shapes:
    """Images with up to K objects in each. A missing object has the label -1, the box 0 0 0 0 and an empty mask."""

    images: Tensor  # N 3 H W, uint8
    labels: Tensor  # N K, int64; the first object always exists
    boxes: Tensor  # N K 4, int64: left, top, right, bottom of the mask; right and bottom are the first pixels outside
    masks: Tensor  # N K H W, bool: the pixels in which the object is visible


def generate(seed: int, indices: Tensor, *, size: int, difficulty: float = 0.5, max_objects: int = 1) -> Shapes:
    rendered = (chunk for _, chunk in chunks(seed, indices, size, difficulty, max_objects))
    images, labels, masks = map(torch.cat, zip(*rendered, strict=True))
    return Shapes(images, labels, boxes_of(masks), masks)
