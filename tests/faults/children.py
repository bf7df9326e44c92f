"""Trainings in processes that are forked from one which has everything imported, so that a fault costs a tenth of a second.

What is done to a training is real: it is killed, signaled, or its disk is full.
"""

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.running import run_main

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.faults.preloaded"])
# what Python tells its audit hooks of the things that change files
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate")

Fault = Callable[[Path], None]  # is given the run folder, in the process that will train


@dataclass
class KillAtOperation:
    """SIGKILL just before the n-th operation on files of the run folder; fsync counts too. Without n, all are counted."""

    n: int | None = None
    count_into: str | None = None

    def __call__(self, run_dir: Path) -> None:
        counter, folder = itertools.count(), str(run_dir)

        def happens(event: str, args: tuple) -> None:
            if event not in OPERATIONS or not any(isinstance(arg, (str, Path)) and str(arg).startswith(folder) for arg in args):
                return
            if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            self._count(next(counter), event)

        sys.addaudithook(happens)
        fsync = os.fsync

        def counted_fsync(handle: int) -> None:
            self._count(next(counter), "os.fsync")
            fsync(handle)

        os.fsync = counted_fsync

    def _count(self, i: int, event: str) -> None:
        if self.count_into is not None:
            with contextlib.suppress(RuntimeError), Path(self.count_into).open("a") as file:
                file.write(f"{i} {event}\n")
        if i == self.n:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class KillInsideWrite:
    """The kernel ends the process in the middle of the write that makes a file longer than this."""

    file_bytes: int

    def __call__(self, run_dir: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, self.file_bytes))


@dataclass
class KillAfter:
    """By a timer of the kernel, wherever the process is then."""

    seconds: float

    def __call__(self, run_dir: Path) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)


@dataclass
class AtStep:
    """Do something at the beginning of an update: signal oneself, crash, hang, or spoil the batch."""

    step: int
    what: str  # a signal's name, "crash", "hang", "nan"
    rank: int | None = None  # None: on all

    def __call__(self, run_dir: Path) -> None:
        from engine.update import Update

        update = Update.__call__

        def faulty(this: Update, state, batch, **kwargs) -> None:
            if state.step == self.step and self.rank in (None, this.accelerator.process_index):
                batch = self._happen(batch)
            update(this, state, batch, **kwargs)

        Update.__call__ = faulty

    def _happen(self, batch):
        if self.what == "crash":
            raise ZeroDivisionError("crashed on purpose")
        if self.what == "hang":
            threading.Event().wait()
        if self.what == "nan":
            return (batch[0] * float("nan"), *batch[1:])
        os.kill(os.getpid(), getattr(signal, self.what))
        return batch


@dataclass
class InEvaluation:
    """A signal to oneself at the second batch of the first evaluation."""

    what: str

    def __call__(self, run_dir: Path) -> None:
        from engine.tasks import classification

        metric = next(value for value in vars(classification).values() if hasattr(value, "update") and hasattr(value, "compute"))
        update, calls = metric.update, itertools.count(1)

        def signaled(this, model, batch) -> None:
            if next(calls) == 2:
                os.kill(os.getpid(), getattr(signal, self.what))
            update(this, model, batch)

        metric.update = signaled


@dataclass
class FullDisk:
    """No file can grow beyond `file_bytes`, so writing fails as on a full disk: from one step on, and maybe up to another."""

    file_bytes: int
    first: int = 0
    last: int | None = None

    def __call__(self, run_dir: Path) -> None:
        from engine.update import Update

        update, (_, hard) = Update.__call__, resource.getrlimit(resource.RLIMIT_FSIZE)

        def on_a_disk(this: Update, state, batch, **kwargs) -> None:
            is_full = state.step >= self.first and (self.last is None or state.step < self.last)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes if is_full else hard, hard))
            update(this, state, batch, **kwargs)

        Update.__call__ = on_a_disk


@dataclass
class Ended:
    codes: list[int]  # of each rank; -9 for one that was killed
    said: str


def train(run_dir: Path, *argv: object, fault: Fault | None = None, ranks: int = 1, timeout: float = 120) -> Ended:
    """`main.py -e run_dir argv...` on one or several ranks."""
    log = run_dir.with_name(f"{run_dir.name}.log")
    log.write_text("")
    port = _free_port()
    processes = [
        FORKSERVER.Process(target=_train, args=(run_dir, [str(word) for word in argv], fault, log, rank, ranks, port))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{argv} has not ended; it said\n{log.read_text()}")
    return Ended([process.exitcode for process in processes], log.read_text())


def _train(run_dir: Path, argv: Sequence[str], fault: Fault | None, log: Path, rank: int, ranks: int, port: int) -> None:
    import torch

    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for as long as the process lives
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as in a program that a person starts
    if ranks > 1:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in where.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault is not None:
        fault(run_dir)
    code = run_main("-e", run_dir, *argv)
    sys.stdout.flush()
    sys.exit(code)


def _free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return at.getsockname()[1]
