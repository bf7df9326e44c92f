"""Run the sides of a comparison: each is a process, and works one turn at a time while the others are stopped."""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, get_start_method, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile
from typing import Any, TypeVar
from unittest.mock import patch

import psutil
import torch
from tqdm import tqdm

from engine.config.errors import RunError
from engine.devices.memory import peak_memory
from tools.benchmarks.report import ROOT, Ratio, ratio

T = TypeVar("T")

OURS = "this project"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIMEOUT = 900.0  # seconds for a start or a turn


@dataclass(frozen=True)
class Length:
    """The length of a race. A turn has at least so many steps and lasts at least so many seconds."""

    warm_up: int  # steps
    turns: int
    steps: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Turn:
    images: int
    seconds: float
    core_seconds: float  # of the process and its workers
    peak_mib: float  # memory, since the start of the process
    note: Any


@dataclass(frozen=True)
class Speed:
    """What a race measured of one side: images/s, and more."""

    steady: float  # median of the turns
    lowest: float
    highest: float
    cold: float  # since the start of the process
    images: int  # in all turns
    core_ms: float  # per image, of all cores; other load on the machine hardly changes it
    peak_mib: float
    note: Any  # from the warm-up


class Turns:
    """The turns of a side, seen from its process. The side announces each step and blocks between two turns."""

    def __init__(self, connection: Connection) -> None:
        self.note: Any = None  # sent with the next report
        self._connection = connection
        self._images, self._steps, self._seconds = 0, 0, 0.0  # steps and seconds: what the current turn needs at least
        self._begin, self._begin_cores = time.perf_counter(), 0.0

    def tick(self, n_images: int) -> None:
        """Begin a step of `n_images`, after a pause if the turn is over."""
        if self._steps <= 0 and time.perf_counter() - self._begin >= self._seconds:
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self._begin
            cores = _core_seconds() - self._begin_cores
            self._connection.send(Turn(self._images, seconds, cores, peak_memory(DEVICE), self.note))
            self.note, self._images = None, 0
            self._steps, self._seconds = self._connection.recv()
            self._begin_cores = _core_seconds()
            self._begin = time.perf_counter()
        self._steps -= 1
        self._images += n_images

    def counted(self, batches: Iterable[T], n_images: int) -> Iterator[T]:
        """Yield the batches, each as a step that includes its preparation."""
        iterator = iter(batches)
        while True:
            self.tick(n_images)
            try:
                batch = next(iterator)
            except StopIteration:
                self._steps, self._images = self._steps + 1, self._images - n_images  # take the tick back
                return
            yield batch


def _core_seconds() -> float:
    """Return the CPU time of this process and its workers."""
    total = time.process_time()
    for worker in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            times = worker.cpu_times()
            total += times.user + times.system
    return total


Work = Callable[[Turns], None]  # never returns; can be pickled


class Side:
    """A process that is stopped, with all of its workers, except during its turns."""

    def __init__(self, name: str, work: Work, threads: int) -> None:
        self.name = name
        begin, context = time.perf_counter(), get_context("spawn")
        self._connection, childs_end = context.Pipe()
        self._process = context.Process(target=_in_child, args=(childs_end, work, get_start_method()))
        quiet = os.environ.get("PYTHONWARNINGS", "ignore:resource_tracker")  # it reports what a killed process left behind
        with patch.dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONWARNINGS=quiet):
            self._process.start()
        childs_end.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - begin
        self.images, self.seconds = 0, self.start_seconds  # since the start of the process, without the pauses
        self._for_all(psutil.Process.suspend)

    def turn(self, steps: int, seconds: float = 0.0) -> Turn:
        self._for_all(psutil.Process.resume)
        self._connection.send((steps, seconds))
        turn = self._receive()
        self._for_all(psutil.Process.suspend)
        self.images += turn.images
        self.seconds += turn.seconds
        return turn

    def close(self) -> None:
        self._for_all(psutil.Process.kill)
        self._process.join()

    def _receive(self) -> Turn:
        if not self._connection.poll(TIMEOUT):
            raise RunError(f"{self.name}: no report for {TIMEOUT:.0f} seconds")
        try:
            received = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RunError(f"{self.name}: its process ended with exit code {self._process.exitcode}") from None
        if isinstance(received, str):
            raise RunError(f"{self.name} failed:\n{received}")
        return received

    def _for_all(self, action: Callable[[psutil.Process], None]) -> None:
        if self._process.is_alive():
            process = psutil.Process(self._process.pid)
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    action(one)


def _in_child(connection: Connection, work: Work, start_method: str) -> None:
    if hasattr(os, "setpgrp"):  # the system ends a stopped process group whose parent is gone
        os.setpgrp()
    set_start_method(start_method, force=True)  # for workers: the default, not this process's spawn
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    try:
        work(Turns(connection))
        connection.send("it ended before it was stopped")
    except BaseException:
        connection.send(traceback.format_exc())


def take_turns(rounds: int, actions: Mapping[str, Callable[[], T]], title: str) -> dict[str, list[T]]:
    """Call every action once per round and return the results by action."""
    results: dict[str, list[T]] = {name: [] for name in actions}
    for name in tqdm([*actions] * rounds, desc=title, leave=False, disable=not sys.stderr.isatty()):
        results[name].append(actions[name]())
    return results


def race(works: Mapping[str, Work], length: Length, threads: int, title: str) -> dict[str, Speed]:
    """Start all sides, warm them up, and measure their speeds while they take turns."""
    with ExitStack() as stack:
        sides = {name: stack.enter_context(closing(Side(name, work, threads))) for name, work in works.items()}
        notes = {name: side.turn(length.warm_up).note for name, side in sides.items()}
        actions = {name: partial(side.turn, length.steps, length.seconds) for name, side in sides.items()}
        results = take_turns(length.turns, actions, title)
    speeds = {}
    for name, turns in results.items():
        rates = [turn.images / turn.seconds for turn in turns]
        core_ms = median(1000 * turn.core_seconds / turn.images for turn in turns)
        images, cold = sum(turn.images for turn in turns), sides[name].images / sides[name].seconds
        speed = Speed(median(rates), min(rates), max(rates), cold, images, core_ms, turns[-1].peak_mib, notes[name])
        speeds[name] = speed
    return speeds


def speed_ratio(
    what: str, rival: str, speeds: Mapping[str, Speed], at_least: float | None = None, *, ours: str = OURS, cold: bool = False
) -> Ratio:
    """Compare two speeds of a race: the steady ones, or those since the start of the processes."""
    mine, theirs = ((speed.cold if cold else speed.steady) for speed in (speeds[ours], speeds[rival]))
    return ratio(what, rival, "images/s", mine, theirs, at_least=at_least)


def run_python(words: list[str], until: Path | None = None) -> float:
    """Run a Python program until it ends or the file `until` has content, and return the seconds."""
    with TemporaryFile("w+") as output:
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=output, stderr=output)
        try:
            while time.perf_counter() - begin < TIMEOUT:
                exit_code = process.poll()
                if exit_code == 0 if until is None else until.exists() and until.stat().st_size > 0:
                    return time.perf_counter() - begin
                if exit_code is not None:
                    break
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        raise RunError(f"python {' '.join(words)} failed:\n{output.read()}")
