"""Batches for training and for evaluation, of images in memory or in files.

A training loader gives the batches of updates `first` to `last`; what came before costs no reading. An evaluation loader gives
this rank's part of every sample once, in order.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.augment import CropAndFlip, Cutout, Normalise
from datasets.files import EvalFiles, TrainFiles
from datasets.order import Order
from datasets.splits import Files, Images, Split

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Preparation:
    """How an image becomes what the model sees."""

    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool
    crop_padding: int
    padding_mode: str
    hflip: bool | str  # "alternating": every other epoch
    cutout: int
    scale: tuple[float, float]
    crop_pct: float


@dataclass(frozen=True)
class Workers:
    num_workers: int = 0
    pin_memory: bool = False
    prefetch_factor: int = 2

    def options(self) -> dict:
        parallel = {"prefetch_factor": self.prefetch_factor, "worker_init_fn": _leave_signals_to_the_parent}
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory and torch.cuda.is_available(),
            **(parallel if self.num_workers else {}),
        }


class TrainLoader(Protocol):
    def batches(self, first: int, last: int) -> Iterator[Batch]: ...


class EvalLoader(Protocol):
    def batches(self) -> Iterator[Batch]: ...


def train_loader(split: Split, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
    if isinstance(split, Images):
        return InMemoryTraining(split, order, prepare, device)
    return FileTraining(split, order, prepare, workers, device)


def eval_loader(
    split: Split, batch_size: int, rank: int, world_size: int, prepare: Preparation, workers: Workers, device: torch.device
) -> EvalLoader:
    first, last = len(split) * rank // world_size, len(split) * (rank + 1) // world_size
    part = split.subset(torch.arange(first, last)) if world_size > 1 else split
    if isinstance(part, Images):
        return InMemoryEvaluation(part, batch_size, prepare, device)
    return FileEvaluation(part, batch_size, prepare, workers, device)


class InMemoryTraining:
    def __init__(self, split: Images, order: Order, prepare: Preparation, device: torch.device) -> None:
        self.order = order
        self.labels = split.labels.to(device)
        self.cut = CropAndFlip(
            split.images.to(device),
            padding=prepare.crop_padding if prepare.augment else 0,
            padding_mode=prepare.padding_mode,
            hflip=prepare.augment and prepare.hflip,
            seed=order.seed,
        )
        self.cutout = Cutout(prepare.cutout, order.seed) if prepare.augment and prepare.cutout else None
        self.normalise = Normalise(prepare.mean, prepare.std, prepare.img_size, device)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for step in range(first, last):
            epoch, samples = self.order.epoch(step), self.order.samples(step)
            images = self.normalise(self.cut(epoch, samples))
            if self.cutout is not None:
                images = self.cutout(epoch, samples, images)
            yield images, self.labels[samples]


class InMemoryEvaluation:
    def __init__(self, split: Images, batch_size: int, prepare: Preparation, device: torch.device) -> None:
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.batch_size = batch_size
        self.normalise = Normalise(prepare.mean, prepare.std, prepare.img_size, device)

    def batches(self) -> Iterator[Batch]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalise(images), labels


class FileTraining:
    """One DataLoader iteration serves the whole run, so that workers never start anew between epochs."""

    def __init__(self, split: Files, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> None:
        self.order, self.workers, self.device = order, workers, device
        self.normalise = Normalise(prepare.mean, prepare.std, prepare.img_size, device)
        self.dataset = TrainFiles(
            split, prepare.img_size, prepare.scale, prepare.hflip, prepare.augment, prepare.crop_pct, order.seed
        )

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        keys = _StepKeys(self.order, first, last)
        for images, labels in DataLoader(self.dataset, batch_sampler=keys, **self.workers.options()):
            yield self.normalise(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


@dataclass
class _StepKeys:
    order: Order
    first: int
    last: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first, self.last):
            epoch = self.order.epoch(step)
            yield [(epoch, index) for index in self.order.samples(step).tolist()]


class FileEvaluation:
    def __init__(self, split: Files, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> None:
        self.batch_size, self.workers, self.device = batch_size, workers, device
        self.normalise = Normalise(prepare.mean, prepare.std, prepare.img_size, device)
        self.dataset = EvalFiles(split, prepare.img_size, prepare.crop_pct)

    def batches(self) -> Iterator[Batch]:
        for images, labels in DataLoader(self.dataset, batch_size=self.batch_size, **self.workers.options()):
            yield self.normalise(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


def _leave_signals_to_the_parent(worker_id: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent must still get its batches to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
