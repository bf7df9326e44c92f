"""Images with objects: a box and a class for each.

A batch is a list of images, from 0 to 1 and each of its own size, and a list of what is in them. The network scales and
normalizes.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from datasets.pipeline.augment import AUGMENT, ColorJitter
from datasets.pipeline.counters import below, derive, draws
from datasets.pipeline.images import ImageFile, seeded
from datasets.pipeline.loaders import EvalLoader, Preparation, TrainLoader, Workers
from datasets.pipeline.order import Order
from datasets.pipeline.splits import Files, Images
from datasets.pipeline.workers import Packed, Request, SceneBatches, evaluation_requests, training_requests

# Of an image, a row for each object: left, top, right, bottom, class, whether it is a crowd, area. A crowd stands for several
# objects (or for one that is hard to make out): nothing is learned from it, and what is found in it counts neither way.
COLUMNS = 7
CLASS, CROWD, AREA = 4, 5, 6
TOLERANCE = 1.0  # pixels

Target = dict[str, Tensor]  # boxes N 4, labels N, iscrowd N, area N
Batch = tuple[list[Tensor], list[Target]]


def as_target(objects: Tensor) -> Target:
    return {
        "boxes": objects[:, :4].float(),
        "labels": objects[:, CLASS].long(),
        "iscrowd": objects[:, CROWD].bool(),
        "area": objects[:, AREA].float(),
    }


def mirrored_objects(objects: Tensor, width: Tensor | int) -> Tensor:
    left, right = width - objects[..., 2], width - objects[..., 0]
    return torch.cat([torch.stack([left, objects[..., 1], right, objects[..., 3]], dim=-1), objects[..., 4:]], dim=-1)


def clipped(box: Sequence[float], width: float, height: float, said: str) -> list[float]:
    """The box, cut off where it sticks out of its image a little, as rounding makes it; OSError if it lies outside."""
    left, top, right, bottom = box
    if min(left, top) < -TOLERANCE or right > width + TOLERANCE or bottom > height + TOLERANCE:
        box = f"from {left:g} {top:g} to {right:g} {bottom:g}"
        raise OSError(f"{said} has a box outside its image: {box}, where the image has {width:g}x{height:g}")
    return [max(0.0, left), max(0.0, top), min(width, right), min(height, bottom)]


class Unscaled:
    """What the network normalizes itself is made a picture by filling up to a common size."""

    @staticmethod
    def undo(images: Sequence[Tensor]) -> Tensor:
        height, width = (max(image.shape[i] for image in images) for i in (-2, -1))
        return torch.stack(
            [F.pad(image, [0, width - image.shape[-1], 0, height - image.shape[-2]], value=1.0) for image in images]
        )


# In memory


@dataclass(frozen=True)
class BoxedImages(Images):
    labels: Tensor  # N K COLUMNS, float32; where an image has fewer than K objects, the class is 0

    def train_loader(self, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
        return InMemoryBoxTraining(self, order, prepare, device)

    def eval_loader(self, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> EvalLoader:
        return InMemoryBoxEvaluation(self, batch_size, device)


class InMemoryBoxTraining:
    def __init__(self, split: BoxedImages, order: Order, prepare: Preparation, device: torch.device) -> None:
        self.images, self.objects, self.order = split.images.to(device), split.labels.to(device), order
        self.hflip = prepare.augment and bool(prepare.hflip)
        self.jitter = ColorJitter(prepare.color_jitter, order.seed) if prepare.augment and prepare.color_jitter else None
        self.normalize = Unscaled()

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for step in range(first, last):
            epoch, samples = self.order.epoch(step), self.order.samples(step)
            images, objects = self.images.index_select(0, samples), self.objects.index_select(0, samples)
            if self.hflip:
                mirrored = below(draws(self.order.seed ^ AUGMENT, epoch, samples, 1)[0], 2) == 1
                images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
                objects = torch.where(mirrored.view(-1, 1, 1), mirrored_objects(objects, images.shape[-1]), objects)
            if self.jitter is not None:
                images = self.jitter(epoch, samples, images)
            yield _batch(images, objects)


class InMemoryBoxEvaluation:
    def __init__(self, split: BoxedImages, batch_size: int, device: torch.device) -> None:
        self.images, self.objects, self.batch_size = split.images.to(device), split.labels.to(device), batch_size

    def batches(self) -> Iterator[Batch]:
        for images, objects in zip(self.images.split(self.batch_size), self.objects.split(self.batch_size), strict=True):
            yield _batch(images, objects)


def _batch(images: Tensor, objects: Tensor) -> Batch:
    return list(images / 255), [as_target(of_image[of_image[:, CLASS] > 0]) for of_image in objects]


# In files


@dataclass(frozen=True)
class BoxedFiles(Files):
    labels: list[np.ndarray]  # of each image M COLUMNS, float32

    def subset(self, indices: Tensor) -> "BoxedFiles":
        return replace(self, paths=self.paths[indices.numpy()], labels=[self.labels[i] for i in indices.tolist()])

    def train_loader(self, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
        return FileBoxTraining(self, order, prepare, workers, device)

    def eval_loader(self, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> EvalLoader:
        return FileBoxEvaluation(self, batch_size, workers, device)


class FileBoxTraining:
    def __init__(self, split: BoxedFiles, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> None:
        self.split, self.order, self.normalize = split, order, Unscaled()
        self.read = SceneBatches(ReadForTraining(prepare, order.seed), workers, device)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for images, objects in self.read(training_requests(self.split.paths, self.split.labels, self.order, first, last)):
            yield [image / 255 for image in images], [as_target(of_image) for of_image in objects]


class FileBoxEvaluation:
    def __init__(self, split: BoxedFiles, batch_size: int, workers: Workers, device: torch.device) -> None:
        self.split, self.batch_size = split, batch_size
        self.read = SceneBatches(read_for_evaluation, workers, device)

    def batches(self) -> Iterator[Batch]:
        for images, objects in self.read(evaluation_requests(self.split.paths, self.split.labels, self.batch_size)):
            yield [image / 255 for image in images], [as_target(of_image) for of_image in objects]


def read_for_evaluation(request: Request) -> tuple[Packed, Packed]:
    images = [torch.from_numpy(np.array(ImageFile(os.fsdecode(path)).decode())).permute(2, 0, 1) for path in request.paths]
    return Packed.of(images), Packed.of([torch.from_numpy(objects) for objects in request.targets])


class ReadForTraining:
    """The whole image, maybe mirrored and with other colors."""

    def __init__(self, prepare: Preparation, seed: int) -> None:
        self.hflip, self.seed = prepare.augment and bool(prepare.hflip), seed
        strength = prepare.color_jitter if prepare.augment else 0.0
        self.jitter = v2.ColorJitter(strength, strength, strength) if strength else None

    def __call__(self, request: Request) -> tuple[Packed, Packed]:
        (bits,) = draws(self.seed ^ AUGMENT, request.epoch, torch.from_numpy(request.samples), 1)
        images, objects = [], []
        flips = (below(bits, 2) == 1).tolist()
        for path, rows, sample, mirrored in zip(request.paths, request.targets, request.samples.tolist(), flips, strict=True):
            image = tv_tensors.Image(torch.from_numpy(ImageFile(os.fsdecode(path)).decode_fast()).permute(2, 0, 1))
            boxes = tv_tensors.BoundingBoxes(torch.from_numpy(rows[:, :4]), format="XYXY", canvas_size=tuple(image.shape[-2:]))
            if self.hflip and mirrored:
                image, boxes = (v2.functional.horizontal_flip(part) for part in (image, boxes))
            if self.jitter is not None:
                with seeded(derive(self.seed, AUGMENT, request.epoch, sample)):
                    image = self.jitter(image)
            images.append(image.as_subclass(Tensor))
            objects.append(torch.cat([boxes.as_subclass(Tensor), torch.from_numpy(rows[:, 4:])], dim=1))
        return Packed.of(images), Packed.of(objects)
