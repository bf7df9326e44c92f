"""Run trainings with faults in processes forked from a server with all imports loaded: each starts in 0.1 seconds.

The faults are real: SIGKILL, signals, a file size limit.
"""

import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.running import ROOT, run_main

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.faults.preloaded"])
# Python's audit events that change files
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate")

Fault = Callable[[Path], None]  # called with the run folder, in the training process


@dataclass
class KillAtOperation:
    """SIGKILL just before the n-th file operation in the run folder, including fsync. Without `n`, log all operations."""

    n: int | None = None
    count_into: str | None = None

    def __call__(self, run_dir: Path) -> None:
        counter, folder = itertools.count(), str(run_dir)

        def audit(event: str, args: tuple) -> None:
            if event not in OPERATIONS or not any(isinstance(arg, (str, Path)) and str(arg).startswith(folder) for arg in args):
                return
            if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            self._count(next(counter), f"{event} {args[0]}")

        sys.addaudithook(audit)
        fsync = os.fsync

        def counted_fsync(fd: int) -> None:
            self._count(next(counter), f"os.fsync {os.readlink(f'/proc/self/fd/{fd}')}")
            fsync(fd)

        os.fsync = counted_fsync

    def _count(self, i: int, event: str) -> None:
        if self.count_into is not None:
            with contextlib.suppress(RuntimeError), Path(self.count_into).open("a") as file:
                file.write(f"{i} {event}\n")
        if i == self.n:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class KillInsideWrite:
    """SIGXFSZ in the middle of the write that makes a file longer than `file_bytes`."""

    file_bytes: int

    def __call__(self, run_dir: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, self.file_bytes))


@dataclass
class KillAfter:
    """SIGALRM after `seconds`, whatever the process is doing."""

    seconds: float

    def __call__(self, run_dir: Path) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)


@dataclass
class AtStep:
    """At the beginning of an update: send a signal to this process, crash, hang, or replace the images by NaN."""

    step: int
    what: str  # the name of a signal, "crash", "hang" or "nan"
    rank: int | None = None  # None: on all ranks

    def __call__(self, run_dir: Path) -> None:
        from engine.update import Update

        update = Update.__call__

        def faulty(this: Update, state, batch, **kwargs) -> None:
            if state.step == self.step and self.rank in (None, this.accelerator.process_index):
                batch = self._apply(batch)
            update(this, state, batch, **kwargs)

        Update.__call__ = faulty

    def _apply(self, batch):
        if self.what == "crash":
            raise ZeroDivisionError("crashed on purpose")
        if self.what == "hang":
            threading.Event().wait()
        if self.what == "nan":
            return (batch[0] * float("nan"), *batch[1:])
        os.kill(os.getpid(), getattr(signal, self.what))
        return batch


@dataclass
class At:
    """Do something before the n-th call of a function, named as "module:function" or "module:Class.method"."""

    function: str
    what: str  # "hang", "crash", "full disk", or names of signals
    call: int = 1
    rank: int | None = None  # None: on all ranks

    def __call__(self, run_dir: Path) -> None:
        module, _, name = self.function.partition(":")
        *owner, name = name.split(".")
        place = functools.reduce(getattr, owner, importlib.import_module(module))
        if self.what == "full disk":  # which a pipe is not part of, unlike the file with the output
            cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            os.dup2(cat.stdin.fileno(), 1)
            os.dup2(cat.stdin.fileno(), 2)
        function, calls = getattr(place, name), itertools.count(1)

        def faulty(*args, **options):
            if next(calls) == self.call and self.rank in (None, int(os.environ.get("RANK", "0"))):
                self._apply()
            return function(*args, **options)

        setattr(place, name, faulty)

    def _apply(self) -> None:
        if self.what == "hang":
            threading.Event().wait()
        if self.what == "crash":
            raise ZeroDivisionError("crashed on purpose")
        if self.what == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        for name in self.what.split():
            os.kill(os.getpid(), getattr(signal, name))


@dataclass
class InEvaluation:
    """Send a signal to this process at the second batch of the first evaluation."""

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
    """From step `first` to `last`, no file can grow beyond `file_bytes`, so writing fails as on a full disk."""

    file_bytes: int
    first: int = 0
    last: int | None = None

    def __call__(self, run_dir: Path) -> None:
        from engine.update import Update

        update, (_, hard) = Update.__call__, resource.getrlimit(resource.RLIMIT_FSIZE)

        def limited(this: Update, state, batch, **kwargs) -> None:
            is_full = state.step >= self.first and (self.last is None or state.step < self.last)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes if is_full else hard, hard))
            update(this, state, batch, **kwargs)

        Update.__call__ = limited


@dataclass
class Ended:
    """A training that has ended."""

    codes: list[int]  # exit code of each rank; -9 after SIGKILL
    output: str  # stdout and stderr of all ranks
    left: list[str] = field(default_factory=list)  # processes that outlive it


def train(run_dir: Path, *argv: object, fault: Fault | None = None, ranks: int = 1, timeout: float = 120) -> Ended:
    """Run `main.py -e run_dir argv...` on one or several ranks."""
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
            for other in processes:
                other.kill()
            raise TimeoutError(f"{argv} has not ended; its output:\n{log.read_text()}")
    left = left_behind(lambda process: os.getsid(process.pid) in {rank.pid for rank in processes})
    return Ended([process.exitcode for process in processes], log.read_text(), left)


def run_script(*words: object, timeout: float = 120, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Run a program of this project as `python words...` would, with its imports loaded."""
    argv = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = FORKSERVER.Process(target=_run_script, args=(argv, files, cwd, env))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{argv} has not ended")
        return subprocess.CompletedProcess(argv, process.exitcode, *(file.read_text() for file in files))


def _run_script(argv: Sequence[str], files: Sequence[Path], cwd: Path, env: dict[str, str]) -> None:
    import torch

    os.environ.update(env)
    os.chdir(cwd)

    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    sys.argv, sys.path[0] = list(argv), str(ROOT / Path(argv[0]).parent)
    try:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def left_behind(belongs: Callable[[psutil.Process], bool], patience: float = 10) -> list[str]:
    """Return the processes that still run after `patience` seconds, after killing them."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # it has ended in the meantime
                if process.status() != psutil.STATUS_ZOMBIE and belongs(process):
                    found.append(process)
        if not found or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for process in found:
        process.kill()
    return [f"{process.pid} {process.name()}" for process in found]


def _train(run_dir: Path, argv: Sequence[str], fault: Fault | None, log: Path, rank: int, ranks: int, port: int) -> None:
    import torch

    os.setsid()  # its processes are known by their session
    fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - open until the process ends
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for data loading workers, as in main.py
    if ranks > 1:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in environment.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault is not None:
        fault(run_dir)
    code = run_main("-e", run_dir, *argv)
    sys.stdout.flush()
    sys.exit(code)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
