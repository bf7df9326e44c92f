"""Loaders: batches for training and for evaluation, of images in memory or in files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from datasets.pipeline.augment import ColorJitter, CropAndFlip, Cutout
from datasets.pipeline.images import EvaluationImages, Request, TrainingImages
from datasets.pipeline.order import Order
from datasets.pipeline.preparation import Growth, Preparation
from datasets.pipeline.splits import Files, Images, Split
from datasets.pipeline.workers import CroppedBatches, Workers

__all__ = ["Batch", "EvalLoader", "Growth", "Preparation", "TrainLoader", "Workers", "eval_loader", "train_loader"]

Batch = tuple[Any, Any]  # images and targets: two tensors for classes; see masks.py and boxes.py for the others


@runtime_checkable
class Normalization(Protocol):
    def undo(self, images: Any, /) -> Tensor:
        """Return the images of a batch as B C H W, from 0 to 1, to be drawn."""


@runtime_checkable
class TrainLoader(Protocol):
    """All that a training uses of a loader."""

    @property
    def order(self) -> Order:
        """The samples of each step."""

    @property
    def normalize(self) -> Normalization: ...

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Yield this rank's batches of steps `first` to `last` - 1. Earlier ones are not read."""


@runtime_checkable
class EvalLoader(Protocol):
    """All that an evaluation uses of a loader."""

    n_common_batches: int  # that every rank has; some have one more

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's part of the samples, each once and in order."""


def train_loader(split: Split, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
    prepare = prepare.for_training()
    if hasattr(split, "train_loader"):
        return split.train_loader(order, prepare, workers, device)
    if isinstance(split, Images):
        return InMemoryTraining(split, order, prepare, device)
    read = TrainingImages(prepare, order.seed) if prepare.augment else EvaluationImages.of(prepare)
    batches = CroppedBatches(read, prepare.size, prepare.normalize(device), workers, device)
    return FileTraining(split, order, batches, batches.normalize, prepare.repeats)


def eval_loader(
    split: Split, batch_size: int, rank: int, world_size: int, prepare: Preparation, workers: Workers, device: torch.device
) -> EvalLoader:
    first, last = len(split) * rank // world_size, len(split) * (rank + 1) // world_size
    part = split.subset(torch.arange(first, last)) if world_size > 1 else split
    loader: EvalLoader
    if hasattr(part, "eval_loader"):
        loader = part.eval_loader(batch_size, prepare, workers, device)
    elif isinstance(part, Images):
        normalize = prepare.normalize(device)
        loader = InMemoryEvaluation(part, batch_size, lambda images, labels: (normalize(images), labels), device)
    else:
        images = EvaluationImages.of(prepare)
        read = CroppedBatches(images, lambda epoch: prepare.img_size, prepare.normalize(device), workers, device)
        loader = FileEvaluation(part, batch_size, read)
    loader.n_common_batches = -(-(len(split) // world_size) // batch_size)
    return loader


class InMemoryTraining:
    """Batches augmented on the device that trains."""

    def __init__(self, split: Images, order: Order, prepare: Preparation, device: torch.device) -> None:
        self.order, self.size, self.labels = order, prepare.size, split.labels.to(device)
        images, padding = split.images.to(device), prepare.crop_padding
        self.cut = CropAndFlip(images, padding, prepare.padding_mode, prepare.hflip, order.seed)
        self.split = Images(self.cut.unpadded, self.labels)  # replaces the original, so that images aren't held twice
        self.jitter = ColorJitter(prepare.color_jitter, order.seed) if prepare.color_jitter else None
        self.cutout = Cutout(prepare.cutout, order.seed) if prepare.cutout else None
        self.normalize = prepare.normalize(device)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for step in range(first, last):
            epoch, samples, counters = self.order.epoch(step), self.order.samples(step), self.order.counters(step)
            images = self.cut(epoch, samples, counters if self.order.repeats_samples else None)
            if self.jitter is not None:
                images = self.jitter(epoch, counters, images)
            size = self.size(epoch)
            images = self.normalize(images, size=(size, size))
            if self.cutout is not None:
                images = self.cutout(epoch, counters, images)
            yield images, self.labels.index_select(0, samples)


class InMemoryEvaluation:
    """Batches that `finish` makes of images and targets."""

    def __init__(self, split: Images, batch_size: int, finish: Callable[[Tensor, Tensor], Batch], device: torch.device) -> None:
        self.images, self.targets = split.images.to(device), split.labels.to(device)
        self.batch_size, self.finish = batch_size, finish
        self.n_common_batches = -(-len(split) // batch_size)

    def batches(self) -> Iterator[Batch]:
        yield from map(self.finish, self.images.split(self.batch_size), self.targets.split(self.batch_size))


@dataclass(eq=False)
class FileTraining:
    """Batches that `read` makes of requests. One iteration serves the whole run, so that workers start only once."""

    split: Files
    order: Order
    read: Callable[[Iterator[Request]], Iterator[Batch]]
    normalize: Normalization
    repeats: int = 1

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        return self.read(self._requests(first, last))

    def _requests(self, first: int, last: int) -> Iterator[Request]:
        for step in range(first, last):
            samples = self.order.samples(step).repeat_interleave(self.repeats)
            counters = self.order.counters(step).repeat_interleave(self.repeats) * self.repeats
            counters += torch.arange(len(samples)) % self.repeats
            part = self.split.subset(samples)
            yield Request(part.paths, counters.numpy(), self.order.epoch(step), part.labels)


class FileEvaluation:
    """Batches that `read` makes of requests."""

    def __init__(self, split: Files, batch_size: int, read: Callable[[Iterator[Request]], Iterator[Batch]]) -> None:
        self.split, self.batch_size, self.read = split, batch_size, read
        self.n_common_batches = -(-len(split) // batch_size)

    def batches(self) -> Iterator[Batch]:
        return self.read(self._requests())

    def _requests(self) -> Iterator[Request]:
        for first in range(0, len(self.split), self.batch_size):
            samples = torch.arange(first, min(first + self.batch_size, len(self.split)))
            part = self.split.subset(samples)
            yield Request(part.paths, samples.numpy(), targets=part.labels)
