"""Images with objects: a box and a class for each.

A batch is a list of images from 0 to 1, which may differ in size, and a list of targets. The network scales and normalizes.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from typing_extensions import Self

from datasets.pipeline.augment import AUGMENT, ColorJitter
from datasets.pipeline.counters import below, derive, draws
from datasets.pipeline.images import UPRIGHT, ImageFile, Request, UnreadableImage, distorted, jitter
from datasets.pipeline.loaders import EvalLoader, FileEvaluation, FileTraining, InMemoryEvaluation, TrainLoader
from datasets.pipeline.order import Order
from datasets.pipeline.places import shown
from datasets.pipeline.preparation import Preparation
from datasets.pipeline.splits import Files, Images, warn_of_absent_classes
from datasets.pipeline.workers import Packed, StructuredBatches, Workers

# An image's objects are rows of left, top, right, bottom, class, whether it is a crowd, area. A crowd stands for several objects,
# or for one that is hard to recognize: it isn't learned, and a detection of it counts neither as right nor as wrong.
COLUMNS = 7
NO_NAME = "N/A"  # of a class that the files don't declare
CLASS, CROWD, AREA = 4, 5, 6
TOLERANCE = 1.0  # pixels
MAX_SIDE = 1 << 24  # pixels; float32 holds each whole number up to this one

Target = dict[str, Tensor]  # boxes N 4, labels N, iscrowd N, area N
Batch = tuple[list[Tensor], list[Target]]


def as_target(objects: Tensor) -> Target:
    boxes, area = objects[:, :4].float(), objects[:, AREA].float()
    return {"boxes": boxes, "labels": objects[:, CLASS].long(), "iscrowd": objects[:, CROWD].bool(), "area": area}


def clipped(box: Sequence[float], width: float, height: float) -> list[float]:
    """Clip a box that exceeds its image by a rounding error. ValueError if it exceeds it by more, or isn't finite."""
    left, top, right, bottom = box
    is_inside = min(left, top) >= -TOLERANCE and right <= width + TOLERANCE and bottom <= height + TOLERANCE
    if not is_inside or not all(map(math.isfinite, box)):
        extent = f"from {left:g} {top:g} to {right:g} {bottom:g}"
        raise ValueError(f"has a box outside its image: {extent}, where the image has {width:g}x{height:g}")
    return [min(max(0.0, left), width), min(max(0.0, top), height), min(width, right), min(height, bottom)]


def has_area(box: Sequence[float]) -> bool:
    """Return whether a box has an area, also after rounding to float32."""
    left, top, right, bottom = box
    if min(right - left, bottom - top) >= 2:  # more than rounding changes, up to MAX_SIDE
        return True
    return bool(np.float32(right) > np.float32(left) and np.float32(bottom) > np.float32(top))


def check_classes(parts: Mapping[str, "BoxedFiles"], classes: Sequence[str]) -> None:
    """Name in a warning the classes that no object of a part has."""
    for part, split in parts.items():
        found = np.unique(np.concatenate([rows[:, CLASS] for rows in split.labels]))
        absent = [name for number, name in enumerate(classes) if number and number not in found and name != NO_NAME]
        warn_of_absent_classes("object", part, absent)


class Unscaled:
    """The counterpart of Normalize for detectors, which normalize images themselves."""

    @staticmethod
    def undo(images: Tensor | Sequence[Tensor]) -> Tensor:
        """Pad the images of a batch to a common size, in white."""
        height, width = (max(image.shape[i] for image in images) for i in (-2, -1))
        missing = [(width - image.shape[-1], height - image.shape[-2]) for image in images]
        return torch.stack([F.pad(image, [0, x, 0, y], value=1.0) for image, (x, y) in zip(images, missing, strict=True)])


@dataclass(frozen=True)
class BoxedImages(Images):
    labels: Tensor  # N K COLUMNS, float32; in an image with fewer than K objects, the class of the others is 0

    def train_loader(self, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
        return InMemoryBoxTraining(self, order, prepare, device)

    def eval_loader(self, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> EvalLoader:
        return InMemoryEvaluation(self, batch_size, _batch_of_tensors, device)


class InMemoryBoxTraining:
    def __init__(self, split: BoxedImages, order: Order, prepare: Preparation, device: torch.device) -> None:
        self.images, self.objects, self.order = split.images.to(device), split.labels.to(device), order
        self.hflip, self.normalize = prepare.hflip, Unscaled()
        self.jitter = ColorJitter(prepare.color_jitter, order.seed) if prepare.color_jitter else None

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for step in range(first, last):
            epoch, samples = self.order.epoch(step), self.order.samples(step)
            images, objects = self.images.index_select(0, samples), self.objects.index_select(0, samples)
            if self.hflip:
                is_mirrored = (below(draws(self.order.seed ^ AUGMENT, epoch, samples, 1)[0], 2) == 1).view(-1, 1, 1)
                images = torch.where(is_mirrored.unsqueeze(-1), images.flip(-1), images)
                mirrored = objects.clone()
                mirrored[..., [0, 2]] = images.shape[-1] - objects[..., [2, 0]]
                objects = torch.where(is_mirrored, mirrored, objects)
            if self.jitter is not None:
                images = self.jitter(epoch, samples, images)
            yield _batch_of_tensors(images, objects)


def _batch_of_tensors(images: Tensor, objects: Tensor) -> Batch:
    return list(images / 255), [as_target(of_image[of_image[:, CLASS] > 0]) for of_image in objects]


@dataclass(frozen=True)
class BoxedFiles(Files):
    labels: list[np.ndarray]  # of each image M COLUMNS, float32
    normalized: bool = False  # the boxes are fractions of the image's sides, which aren't known before it is read

    def subset(self, indices: Tensor) -> Self:
        return replace(self, paths=self.paths[indices.numpy()], labels=[self.labels[i] for i in indices.tolist()])

    def train_loader(self, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
        read = ReadForTraining(prepare, order.seed, self.normalized)
        return FileTraining(self, order, StructuredBatches(read, _batch_of_lists, workers, device), Unscaled())

    def eval_loader(self, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> EvalLoader:
        read = partial(read_for_evaluation, normalized=self.normalized, exif_rotate=prepare.exif_rotate)
        return FileEvaluation(self, batch_size, StructuredBatches(read, _batch_of_lists, workers, device))


def _batch_of_lists(images: list[Tensor], objects: list[Tensor]) -> Batch:
    return [image / 255 for image in images], [as_target(of_image) for of_image in objects]


def opened(path: bytes, rows: np.ndarray, normalized: bool, exif_rotate: bool) -> tuple[ImageFile, np.ndarray]:
    """Open an image and return it with its rows in pixels. With `exif_rotate`, their boxes are those of the turned image."""
    file = ImageFile(os.fsdecode(path), exif_rotate)
    if normalized:  # fractions of the image's sides
        scaled = rows.copy()
        scaled[:, :4] *= (file.width, file.height, file.width, file.height)
        scaled[:, AREA] = (scaled[:, 2] - scaled[:, 0]) * (scaled[:, 3] - scaled[:, 1])
        return file, scaled
    right, bottom = rows[:, 2:4].max(0, initial=0)
    if file.turn is not UPRIGHT and (right > file.width + TOLERANCE or bottom > file.height + TOLERANCE):
        size = f"{file.width}x{file.height} after data.exif_rotate turned it"
        raise UnreadableImage(f"{shown(file.path)} is {size}, and a box in it extends to {right:g} {bottom:g}")
    return file, rows


def read_for_evaluation(request: Request, *, normalized: bool = False, exif_rotate: bool = False) -> tuple[Packed, Packed]:
    images, objects = [], []
    for path, rows in zip(request.paths, request.targets, strict=True):
        file, in_image = opened(path, rows, normalized, exif_rotate)
        images.append(file.tensor())
        objects.append(torch.from_numpy(in_image))
    return Packed.of(images), Packed.of(objects)


class ReadForTraining:
    """Whole images, optionally mirrored and with other colors."""

    def __init__(self, prepare: Preparation, seed: int, normalized: bool = False) -> None:
        self.hflip, self.seed, self.jitter = prepare.hflip, seed, jitter(prepare.color_jitter)
        self.normalized, self.exif_rotate = normalized, prepare.exif_rotate

    def __call__(self, request: Request) -> tuple[Packed, Packed]:
        (bits,) = draws(self.seed ^ AUGMENT, request.epoch, torch.from_numpy(request.samples), 1)
        images, objects, flips = [], [], (below(bits, 2) == 1).tolist()
        for path, rows, sample, is_mirrored in zip(request.paths, request.targets, request.samples.tolist(), flips, strict=True):
            file, rows = opened(path, rows, self.normalized, self.exif_rotate)
            image = tv_tensors.Image(file.tensor())
            boxes = tv_tensors.BoundingBoxes(torch.from_numpy(rows[:, :4]), format="XYXY", canvas_size=tuple(image.shape[-2:]))
            if self.hflip and is_mirrored:
                image, boxes = (v2.functional.horizontal_flip(part) for part in (image, boxes))
            image = distorted(image, self.jitter, derive(self.seed, AUGMENT, request.epoch, sample))
            images.append(image.as_subclass(Tensor))
            objects.append(torch.cat([boxes.as_subclass(Tensor), torch.from_numpy(rows[:, 4:])], dim=1))
        return Packed.of(images), Packed.of(objects)
