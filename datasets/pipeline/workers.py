"""Images in files with targets that are no single number: what masks and boxes have in common.

Workers read and augment; everything random is drawn from (seed, epoch, sample). What a worker made comes as few tensors, however
many images there are: each one takes a handle of the operating system on its way.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.pipeline.images import UnreadableImage
from datasets.pipeline.loaders import Workers, workers_ended
from datasets.pipeline.order import Order


class Request(NamedTuple):
    """Samples that a worker shall read. Evaluation needs no epoch."""

    paths: np.ndarray  # of bytes
    targets: Any  # of the same length: what the reader takes beside each path
    samples: np.ndarray  # their numbers, from which the random ones are drawn
    epoch: int = 0


def training_requests(paths: np.ndarray, targets: Any, order: Order, first: int, last: int) -> Iterator[Request]:
    for step in range(first, last):
        samples = order.samples(step).numpy()
        yield Request(paths[samples], _chosen(targets, samples), samples, order.epoch(step))


def evaluation_requests(paths: np.ndarray, targets: Any, batch_size: int) -> Iterator[Request]:
    for first in range(0, len(paths), batch_size):
        samples = np.arange(first, min(first + batch_size, len(paths)))
        yield Request(paths[samples], _chosen(targets, samples), samples)


def _chosen(targets: Any, samples: np.ndarray) -> Any:
    return targets[samples] if isinstance(targets, np.ndarray) else [targets[i] for i in samples]


class Packed(NamedTuple):
    """Several tensors of one type in one piece of memory."""

    flat: Tensor
    shapes: list[torch.Size]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Packed":
        return cls(torch.cat([tensor.flatten() for tensor in tensors]), [tensor.shape for tensor in tensors])

    def unpacked(self) -> list[Tensor]:
        pieces = self.flat.split([math.prod(shape) for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


@dataclass
class SceneBatches:
    """What `read` makes of requests, in workers, on its way to the device."""

    read: Callable[[Request], Any]  # a tuple of tensors, Packed and plain values
    workers: Workers
    device: torch.device

    def __call__(self, requests: Iterator[Request]) -> Iterator[tuple]:
        loader = DataLoader(_Reader(self.read), sampler=requests, batch_size=None, **self.workers.options())
        with workers_ended(loader) as batches:
            for batch in batches:
                if isinstance(batch, str):
                    raise UnreadableImage(batch)
                yield tuple(self._sent(part) for part in batch)

    def _sent(self, part: Any) -> Any:
        if isinstance(part, Packed):
            return Packed(self._sent(part.flat), part.shapes).unpacked()
        if not isinstance(part, Tensor) or self.device.type == "cpu":
            return part
        if self.workers.pin_memory and self.device.type == "cuda":
            return part.pin_memory().to(self.device, non_blocking=True)
        return part.to(self.device)


@dataclass
class _Reader(Dataset):
    read: Callable[[Request], Any]

    def __getitem__(self, request: Request) -> Any:
        try:
            return self.read(request)
        except UnreadableImage as error:  # its message only: a worker's exception would come as a traceback
            return str(error)


def first_problem(check: Callable[[int], str | None], n: int) -> str | None:
    """Of n samples, which are looked at in threads: decoders work outside of Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problem = next(filter(None, pool.map(check, range(n))), None)
        pool.shutdown(cancel_futures=True)
    return problem
