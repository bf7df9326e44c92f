"""Batches for training and for evaluation, of images in memory or in files.

A training loader gives the batches of updates `first` to `last`; what came before costs no reading. An evaluation loader gives
this rank's part of every sample once, in order.
"""

import atexit
import math
import multiprocessing
import signal
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.pipeline.augment import ColorJitter, CropAndFlip, Cutout, Normalize
from datasets.pipeline.images import EvaluationImages, Request, TrainingImages, UnreadableImage
from datasets.pipeline.order import Order
from datasets.pipeline.splits import Files, Images, Split

Batch = tuple[Tensor, Tensor]  # images and labels; masks or boxes have other targets


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
    color_jitter: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)  # from here on: of images in files
    zoom: tuple[float, float] = (0.5, 2.0)  # of images with masks
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    policy: str | None = None  # randaugment, trivialaugment or augmix
    magnitude: int = 9  # of randaugment
    erasing: float = 0.0  # probability
    repeats: int = 1
    growth: "Growth | None" = None

    def size(self, epoch: int) -> int:
        """Height and width of the training images of an epoch."""
        return self.growth.size(epoch, self.img_size) if self.growth is not None and self.augment else self.img_size


@dataclass(frozen=True)
class Growth:
    """Progressive resizing: small images first, which take less time."""

    first: int
    n_epochs: float  # until the full size is reached
    step: int

    def size(self, epoch: int, full: int) -> int:
        missing = (full - self.first) * max(0.0, 1 - epoch / self.n_epochs)
        return full - round(missing / self.step) * self.step


@dataclass(frozen=True)
class Workers:
    num_workers: int = 0
    pin_memory: bool = False
    prefetch_factor: int = 2
    timeout: float = 0.0  # seconds after which a batch that doesn't come is a RuntimeError; 0: never

    def options(self) -> dict:
        parallel = {
            "prefetch_factor": self.prefetch_factor,
            "timeout": self.timeout,
            "worker_init_fn": _leave_signals_to_the_parent,
        }
        return {"num_workers": self.num_workers, **(parallel if self.num_workers else {})}


class TrainLoader(Protocol):
    def batches(self, first: int, last: int) -> Iterator[Batch]: ...


class EvalLoader(Protocol):
    n_common_batches: int  # that every rank has; some have one more

    def batches(self) -> Iterator[Batch]: ...


def train_loader(split: Split, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
    if hasattr(split, "train_loader"):
        return split.train_loader(order, prepare, workers, device)
    if isinstance(split, Images):
        return InMemoryTraining(split, order, prepare, device)
    return FileTraining(split, order, prepare, workers, device)


def eval_loader(
    split: Split, batch_size: int, rank: int, world_size: int, prepare: Preparation, workers: Workers, device: torch.device
) -> EvalLoader:
    first, last = len(split) * rank // world_size, len(split) * (rank + 1) // world_size
    part = split.subset(torch.arange(first, last)) if world_size > 1 else split
    if hasattr(part, "eval_loader"):
        loader = part.eval_loader(batch_size, prepare, workers, device)
    elif isinstance(part, Images):
        loader = InMemoryEvaluation(part, batch_size, prepare, device)
    else:
        loader = FileEvaluation(part, batch_size, prepare, workers, device)
    loader.n_common_batches = -(-(len(split) // world_size) // batch_size)
    return loader


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
        self.split = Images(self.cut.unpadded, self.labels)  # to look at; who keeps this one instead doesn't hold them twice
        self.jitter = ColorJitter(prepare.color_jitter, order.seed) if prepare.augment and prepare.color_jitter else None
        self.cutout = Cutout(prepare.cutout, order.seed) if prepare.augment and prepare.cutout else None
        self.size = prepare.size
        self.normalize = Normalize(prepare.mean, prepare.std, prepare.img_size, device)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for step in range(first, last):
            epoch, samples = self.order.epoch(step), self.order.samples(step)
            images = self.cut(epoch, samples)
            if self.jitter is not None:
                images = self.jitter(epoch, samples, images)
            images = self.normalize(images, size=(self.size(epoch),) * 2)
            if self.cutout is not None:
                images = self.cutout(epoch, samples, images)
            yield images, self.labels.index_select(0, samples)


class InMemoryEvaluation:
    def __init__(self, split: Images, batch_size: int, prepare: Preparation, device: torch.device) -> None:
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.batch_size = batch_size
        self.normalize = Normalize(prepare.mean, prepare.std, prepare.img_size, device)

    def batches(self) -> Iterator[Batch]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalize(images), labels


class FileTraining:
    """One DataLoader iteration serves the whole run, so that workers never start anew between epochs."""

    def __init__(self, split: Files, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> None:
        self.split, self.order, self.repeats, self.size = split, order, prepare.repeats, prepare.size
        self.normalize = Normalize(prepare.mean, prepare.std, prepare.img_size, device)
        self.read = FileBatches(_training_images(prepare, order.seed), self.normalize, workers, device)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        return self.read(self._requests(first, last))

    def _requests(self, first: int, last: int) -> Iterator[tuple[Request, Tensor, int]]:
        for step in range(first, last):
            samples = self.order.samples(step).repeat_interleave(self.repeats)
            copies = torch.arange(len(samples)) % self.repeats
            counters = (samples * self.repeats + copies).numpy()
            epoch = self.order.epoch(step)
            request = Request(self.split.paths[samples.numpy()], epoch, counters)
            yield request, self.split.labels[samples], self.size(epoch)


class FileEvaluation:
    def __init__(self, split: Files, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> None:
        self.split, self.batch_size, self.img_size = split, batch_size, prepare.img_size
        normalize = Normalize(prepare.mean, prepare.std, prepare.img_size, device)
        self.read = FileBatches(_evaluation_images(prepare), normalize, workers, device)

    def batches(self) -> Iterator[Batch]:
        return self.read(self._requests())

    def _requests(self) -> Iterator[tuple[Request, Tensor, int]]:
        for first in range(0, len(self.split), self.batch_size):
            part = slice(first, first + self.batch_size)
            yield Request(self.split.paths[part]), self.split.labels[part], self.img_size


def _evaluation_images(prepare: Preparation) -> EvaluationImages:
    return EvaluationImages(prepare.img_size, prepare.crop_pct, prepare.interpolation)


def _training_images(prepare: Preparation, seed: int) -> EvaluationImages | TrainingImages:
    if not prepare.augment:
        return _evaluation_images(prepare)
    return TrainingImages(
        scale=prepare.scale,
        hflip=bool(prepare.hflip),
        interpolation=prepare.interpolation,
        policy=prepare.policy,
        magnitude=prepare.magnitude,
        color_jitter=prepare.color_jitter,
        erasing=prepare.erasing,
        mean=prepare.mean,
        seed=seed,
    )


class FileBatches:
    """Batches read by workers into shared memory, and normalized on the device that trains.

    The memory is cut into slots that are used in turn, since fresh pages cost more time than what is done with them. There is one
    slot more than batches can be under way: the one that is being normalized.
    """

    def __init__(
        self, read: Callable[[Request, Tensor], None], normalize: Normalize, workers: Workers, device: torch.device
    ) -> None:
        self.read, self.normalize, self.workers, self.device = read, normalize, workers, device
        self.memory = ReusedMemory()

    def __call__(self, requests: Iterator[tuple[Request, Tensor, int]]) -> Iterator[Batch]:
        first = next(requests, None)
        if first is None:
            return
        n_slots = self.workers.num_workers * self.workers.prefetch_factor + 1
        slots = torch.empty(n_slots, len(first[1]) * 3 * math.prod(self.normalize.size), dtype=torch.uint8)
        if self.workers.num_workers:
            slots.share_memory_()
        under_way: deque[tuple[Tensor, int]] = deque()  # labels, and the size of the images

        def keys() -> Iterator[tuple[int, Request, int]]:
            for n, (request, labels, size) in enumerate(chain([first], requests)):
                under_way.append((labels, size))
                yield n % n_slots, request, size

        loader = DataLoader(_Slots(self.read, slots), sampler=keys(), batch_size=None, **self.workers.options())
        with workers_ended(loader) as filled:
            for slot in filled:
                if isinstance(slot, str):
                    raise UnreadableImage(slot)
                labels, size = under_way.popleft()
                images = _images_in(slots[slot], len(labels), size)
                if self.device.type == "cpu":
                    yield self._normalized_here(images), labels
                else:
                    yield self.normalize(self._sent(images), size=images.shape[-2:]), self._sent(labels)

    def _sent(self, tensor: Tensor) -> Tensor:
        """Waits until the slot can be used again, which with page-locked memory is at once: that is a copy of its own."""
        if self.workers.pin_memory and self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _normalized_here(self, images: Tensor) -> Tensor:
        """One image at a time, which stays in the cache, and in one thread: the workers have the other cores."""
        batch = self.memory.take(images.shape)
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for image, normalized in zip(images, batch, strict=True):
            self.normalize(image, out=normalized, size=image.shape[-2:])
        torch.set_num_threads(n_threads)
        return batch


@dataclass
class _Slots(Dataset):
    """What a worker knows: how images are read, and the memory that they go to."""

    read: Callable[[Request, Tensor], None]
    slots: Tensor

    def __getitem__(self, key: tuple[int, Request, int]) -> int | str:
        slot, request, size = key
        try:
            self.read(request, _images_in(self.slots[slot], len(request.paths), size))
        except UnreadableImage as error:  # its message only: a worker's exception would come as a traceback
            return str(error)
        return slot


def _images_in(slot: Tensor, n: int, size: int) -> Tensor:
    """B C H W; a slot is long enough for the largest images, smaller ones fill a part of it. The channels come last in memory, as
    they do where images are decoded and scaled."""
    shape = (n, size, size, 3)
    return slot[: math.prod(shape)].view(shape).permute(0, 3, 1, 2)


class ReusedMemory:
    """Memory for float batches that is lent again when the last tensor in it is gone."""

    def __init__(self) -> None:
        self.idle: defaultdict[int, list[np.ndarray]] = defaultdict(list)  # by its length

    def take(self, shape: torch.Size) -> Tensor:
        idle = self.idle[shape.numel()]
        memory = idle.pop() if idle else np.empty(shape.numel(), np.float32)
        lent = memory[:]  # an object of its own, which torch keeps as long as any tensor needs the memory
        weakref.finalize(lent, idle.append, memory)
        return torch.from_numpy(lent).view(shape)


@contextmanager
def workers_ended(loader: DataLoader) -> Iterator[Iterator]:
    """What the loader gives. Its workers end with the block, or with the program where that is left in the middle of it.

    torch asks them to end and waits, at exit forever; one that hangs wouldn't, nor one that leaves signals to its parent.
    """
    others = set(multiprocessing.active_children())
    iterator = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    end = partial(_end, workers)
    atexit.register(end)  # runs before multiprocessing waits for its children
    try:
        yield iterator
    finally:
        atexit.unregister(end)
        end()


def _end(workers: set[multiprocessing.Process]) -> None:
    while workers:
        worker = workers.pop()
        with _deaths_unnoticed():
            worker.kill()
            worker.join()


@contextmanager
def _deaths_unnoticed() -> Iterator[None]:
    """torch has a signal handler that takes the death of a worker for an accident."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _leave_signals_to_the_parent(worker_id: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent must still get its batches to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
