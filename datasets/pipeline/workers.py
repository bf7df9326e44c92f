"""Worker processes that read images from files.

Workers crop, scale and augment. Everything random is drawn from (seed, epoch, sample), so batches don't depend on the number of
workers.
"""

import atexit
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datasets.pipeline.augment import Normalize
from datasets.pipeline.images import Request, UnreadableImage

SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
LOOK_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Workers:
    """The number of worker processes and how they hand over batches."""

    num_workers: int = 0
    pin_memory: bool = False
    prefetch_factor: int = 2
    timeout: float = 0.0  # seconds to wait for a batch before a RuntimeError; 0: no limit

    def options(self) -> dict[str, Any]:
        """Return the arguments of a DataLoader."""
        of_workers = {"prefetch_factor": self.prefetch_factor, "timeout": self.timeout, "worker_init_fn": _start_worker}
        return {"num_workers": self.num_workers, **(of_workers if self.num_workers else {})}

    def move(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Copy to the device. Afterwards the caller may overwrite `tensor`, unless the device is the CPU."""
        if device.type == "cpu":
            return tensor
        if self.pin_memory and device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)  # pin_memory() has made a copy
        return tensor.to(device)


class WorkersFailed(OSError):
    """Worker processes can't be started or can't hand over their batches."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; fewer dataloader.num_workers need less, and 0 needs none")


def _start_worker(worker_id: int) -> None:
    """Ignore signals: Ctrl-C reaches every process of the terminal, and the parent needs its batches to finish the step.

    Linux kills the worker when its parent dies, also while the worker reads from a disk that does not answer.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
    sys.excepthook = _report_unless_hung_up
    Queue._on_queue_feeder_error = _send_failure  # type: ignore[attr-defined]  # called in the thread that sends results
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None and multiprocessing.get_start_method() != "forkserver":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it has died before the call
            os._exit(1)


def _report_unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception of the thread that hands memory to the parent, unless the parent hung up because it was interrupted."""
    if not isinstance(error, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


def read_in_workers(read: Callable[[Any], Any], requests: Iterator[Any], workers: Workers) -> Iterator[Any]:
    """Yield the result of `read` for each request, in order, computed by worker processes.

    The workers are killed when the iteration ends, or at exit if it was abandoned. torch would ask them to end and wait, at exit
    without a limit, which hangs with a worker that hangs or ignores signals.
    """
    loader: DataLoader = DataLoader(_Reader(read), sampler=requests, batch_size=None, **workers.options())
    others = set(multiprocessing.active_children())
    results = _Results(loader) if workers.num_workers else iter(loader)
    end = partial(_kill, set(multiprocessing.active_children()) - others)
    atexit.register(end)  # runs before the exit handler of multiprocessing, which waits for its children
    try:
        for result in results:
            if isinstance(result, _Failure):
                raise result.kind(result.message)
            yield result
    finally:
        atexit.unregister(end)
        end()


class _Results(_MultiProcessingDataLoaderIter):
    """The iterator of a DataLoader with workers. If one can't be started, no other is left behind."""

    def __init__(self, loader: DataLoader) -> None:
        others = set(multiprocessing.active_children())
        try:
            with _signals_blocked():
                super().__init__(loader)
        except BaseException as error:
            self._shutdown = True  # torch's own end of a half-started iterator fails
            _kill(set(multiprocessing.active_children()) - others)
            if not isinstance(error, (OSError, RuntimeError)):
                raise
            problem = f"{loader.num_workers} worker processes can't be started: {_first_line(error)}"
            error.__traceback__ = None  # its frames hold pipes open
            raise WorkersFailed(problem) from error

    def _get_data(self) -> Any:
        """Wait for a result, and look every second whether a worker has died."""
        end = time.monotonic() + (self._timeout or math.inf)
        while (left := end - time.monotonic()) > 0:
            success, result = self._try_get_data(min(LOOK_EVERY, left))
            if success:
                return result
        raise RuntimeError(f"DataLoader timed out after {self._timeout} seconds")


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals in this thread and in processes that it starts: a worker must not get one before it can ignore it.

    Take back torch's handler of SIGCHLD, which would report a dead worker as a RuntimeError of whatever the main thread is doing,
    such as writing a checkpoint. `_Results` looks for dead workers itself.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    on_child = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, signal.SIGCHLD})
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # torch sets none elsewhere
            signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _first_line(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


@dataclass
class _Failure:
    """A failure in a worker: an exception itself would arrive with its traceback."""

    kind: type[OSError]
    message: str


@dataclass
class _Reader(Dataset):
    read: Callable[[Any], Any]

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.read(request)
        except UnreadableImage as error:
            return _Failure(UnreadableImage, str(error))


def _send_failure(queue: Queue, error: Exception, item: tuple[int, Any]) -> None:
    """Send the parent a failure instead of a batch that can't be sent, which it would wait for forever."""
    queue.put((item[0], _Failure(WorkersFailed, f"a worker can't hand over a batch: {_first_line(error)}")))


def _kill(workers: set[BaseProcess]) -> None:
    while workers:
        worker = workers.pop()
        worker.kill()
        worker.join()


@dataclass(eq=False)
class CroppedBatches:
    """Batches of images that `read` crops to one size, into memory shared with the workers; normalized on the training device.

    The memory is divided into slots that are reused in turn, because touching fresh pages takes longer than the work on them.
    There is a slot for each batch in flight and one more, for the batch that is being normalized. `size` returns the height and
    width of an epoch's images.
    """

    read: Callable[[Request, Tensor], None]
    size: Callable[[int], int]
    normalize: Normalize
    workers: Workers
    device: torch.device

    def __post_init__(self) -> None:
        self.memory = ReusedMemory()

    def __call__(self, requests: Iterator[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        first = next(requests, None)
        if first is None:
            return
        n_slots = self.workers.num_workers * self.workers.prefetch_factor + 1
        slots = torch.empty(n_slots, len(first.paths) * 3 * math.prod(self.normalize.size), dtype=torch.uint8)
        if self.workers.num_workers:
            try:
                slots.share_memory_()
            except (OSError, RuntimeError) as error:
                problem = f"no shared memory for {n_slots} batches, {slots.numel() / 1e6:.0f} MB (/dev/shm): {_first_line(error)}"
                raise WorkersFailed(problem) from error
        in_flight: deque[tuple[Tensor, int]] = deque()  # labels, and the size of the images

        def keys() -> Iterator[tuple[int, Request, int]]:
            for n, request in enumerate(chain([first], requests)):
                size = self.size(request.epoch)
                in_flight.append((request.targets, size))
                yield n % n_slots, replace(request, targets=None), size

        for slot in read_in_workers(partial(_read_into_slot, self.read, slots), keys(), self.workers):
            labels, size = in_flight.popleft()
            images = _images_in(slots[slot], len(labels), size)
            if self.device.type == "cpu":
                yield self._normalize_on_cpu(images), labels
            else:
                moved = self.workers.move(images, self.device)
                yield self.normalize(moved, size=(size, size)), self.workers.move(labels, self.device)

    def _normalize_on_cpu(self, images: Tensor) -> Tensor:
        """Normalize one image at a time, which stays in the cache, in one thread: the workers use the other cores."""
        batch, n_threads = self.memory.take(images.shape), torch.get_num_threads()
        torch.set_num_threads(1)
        for image, normalized in zip(images, batch, strict=True):
            self.normalize(image, out=normalized, size=(image.shape[-2], image.shape[-1]))
        torch.set_num_threads(n_threads)
        return batch


def _read_into_slot(read: Callable[[Request, Tensor], None], slots: Tensor, key: tuple[int, Request, int]) -> int:
    slot, request, size = key
    read(request, _images_in(slots[slot], len(request.paths), size))
    return slot


def _images_in(slot: Tensor, n: int, size: int) -> Tensor:
    """B C H W, the first part of a slot, which has room for the largest images. Channels are last in memory, as they are decoded
    and scaled."""
    shape = (n, size, size, 3)
    return slot[: math.prod(shape)].view(shape).permute(0, 3, 1, 2)


class ReusedMemory:
    """Memory for float batches. It is reused when the last tensor that refers to it is gone."""

    def __init__(self) -> None:
        self.idle: defaultdict[int, list[np.ndarray]] = defaultdict(list)  # by length

    def take(self, shape: torch.Size) -> Tensor:
        idle = self.idle[shape.numel()]
        memory = idle.pop() if idle else np.empty(shape.numel(), np.float32)
        view = memory[:]  # a new object, which torch keeps alive as long as any tensor uses the memory
        weakref.finalize(view, idle.append, memory)
        return torch.from_numpy(view).view(shape)


class Packed(NamedTuple):
    """Several tensors of one type in one piece of memory, since each tensor sent by a worker takes a file descriptor."""

    flat: Tensor
    shapes: list[torch.Size]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Packed":
        return cls(torch.cat([tensor.flatten() for tensor in tensors]), [tensor.shape for tensor in tensors])

    def unpacked(self) -> list[Tensor]:
        pieces = self.flat.split([math.prod(shape) for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


@dataclass
class StructuredBatches:
    """Batches whose targets are masks or boxes. `read` runs in a worker, `finish` makes a batch of its result on the device."""

    read: Callable[[Request], tuple[Tensor | Packed, Tensor | Packed]]  # images and targets
    finish: Callable[[Any, Any], Any]  # Packed arrives as a list of tensors
    workers: Workers
    device: torch.device

    def __call__(self, requests: Iterator[Request]) -> Iterator[Any]:
        for images, targets in read_in_workers(self.read, requests, self.workers):
            yield self.finish(self._moved(images), self._moved(targets))

    def _moved(self, part: Tensor | Packed) -> Tensor | list[Tensor]:
        if isinstance(part, Packed):
            return Packed(self.workers.move(part.flat, self.device), part.shapes).unpacked()
        return self.workers.move(part, self.device)
