"""What is compared runs in processes of its own, which work a turn at a time: only one of them does anything at any moment."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, get_start_method, set_start_method
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import psutil

from engine.config.errors import RunError
from tools.benchmarks.measure import take_turns

TIMEOUT = 900.0  # seconds, of a start or a turn


@dataclass(frozen=True)
class Turn:
    images: int
    seconds: float
    peak_mib: float  # of memory, so far
    note: Any = None


class Turns:
    """In a side's process: told of each step before it begins, it waits wherever a turn ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._images = self._left = 0
        self._begin = time.perf_counter()
        self.note: Any = None  # goes to the parent with the next report

    def tick(self, n_images: int) -> None:
        """A step of so many images begins."""
        if self._left == 0:
            self._wait()
        self._left -= 1
        self._images += n_images

    def counted(self, batches: Iterable[Any], n_images: int) -> Iterator[Any]:
        """The batches, each of them a step; preparing it is part of that."""
        iterator = iter(batches)
        while True:
            self.tick(n_images)
            try:
                batch = next(iterator)
            except StopIteration:
                self._left, self._images = self._left + 1, self._images - n_images  # there was no step
                return
            yield batch

    def _wait(self) -> None:
        import torch

        from engine.devices.memory import peak_memory

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._begin
        self._connection.send(Turn(self._images, seconds, peak_memory(device), self.note))
        self.note, self._images = None, 0
        self._left = self._connection.recv()
        self._begin = time.perf_counter()


Work = Callable[[Turns], None]  # goes on for ever; it must be possible to pickle it


class Side:
    """A process that stands still, with all of its workers, but for its turns."""

    def __init__(self, name: str, work: Work, threads: int, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.images, self.cold_seconds = 0, 0.0  # since the process began, without the pauses
        self.first = self._start(work, {"OMP_NUM_THREADS": str(threads), **(env or {})})

    def _start(self, work: Work, env: dict[str, str]) -> Turn:
        """Until it stands before its first step."""
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # says what a killed process left, and removes it
        begin = time.perf_counter()
        context = get_context("spawn")
        self._connection, childs_end = context.Pipe()
        self._process = context.Process(target=_in_child, args=(childs_end, work, env, get_start_method()))
        self._process.start()
        childs_end.close()
        try:
            first = self._report()
        except BaseException:
            self.close()
            raise
        self.cold_seconds = self.start_seconds = time.perf_counter() - begin
        self._for_all(psutil.Process.suspend)
        return first

    def turn(self, n_steps: int) -> Turn:
        self._for_all(psutil.Process.resume)
        self._connection.send(n_steps)
        turn = self._report()
        self._for_all(psutil.Process.suspend)
        self.images += turn.images
        self.cold_seconds += turn.seconds
        return turn

    def close(self) -> None:
        self._for_all(psutil.Process.kill)
        self._process.join()

    def _report(self) -> Turn:
        if not self._connection.poll(TIMEOUT):
            raise RunError(f"{self.name}: nothing was heard of it for {TIMEOUT:.0f} seconds")
        try:
            report = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RunError(f"{self.name}: its process ended with exit code {self._process.exitcode}") from None
        if isinstance(report, str):
            raise RunError(f"{self.name} failed:\n{report}")
        return report

    def _for_all(self, action: Callable[[psutil.Process], None]) -> None:
        if not self._process.is_alive():
            return
        process = psutil.Process(self._process.pid)
        for one in (process, *process.children(recursive=True)):
            try:
                action(one)
            except psutil.NoSuchProcess:  # a worker that ended meanwhile
                continue


def _in_child(connection: Connection, work: Work, env: Mapping[str, str], start_method: str) -> None:
    if hasattr(os, "setpgrp"):  # a group that stands still is ended by the system when its parent is gone
        os.setpgrp()
    os.environ.update(env)
    set_start_method(start_method, force=True)  # workers begin as they would in a program of their own
    with open(os.devnull, "w") as nowhere:  # a log is written as it would be, and not seen
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    try:
        work(Turns(connection))
        connection.send("it came to its end before it was stopped")
    except BaseException:
        connection.send(traceback.format_exc())


@contextmanager
def started(works: Mapping[str, Work], threads: int) -> Iterator[dict[str, Side]]:
    """Each started while the others stand still."""
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name, work in works.items():
            sides[name] = Side(name, work, threads)
            stack.callback(sides[name].close)
        yield sides


@dataclass(frozen=True)
class Length:
    warm_up: int  # steps
    turns: int
    steps: int = 0  # of each turn; 0: as many as take so many `seconds`
    seconds: float = 0.0

    @property
    def n_steps(self) -> int:
        return self.warm_up + self.turns * self.steps


@dataclass(frozen=True)
class Speed:
    steady: float  # images/s, the median of the turns
    cold: float  # images/s from the start of the process on
    images: int  # that were counted for `steady`
    peak_mib: float
    note: Any  # that came with the warm-up


def race(works: Mapping[str, Work], length: Length, threads: int, title: str) -> dict[str, Speed]:
    """The speeds of all sides, which take turns."""
    with started(works, threads) as sides:
        notes = {name: side.turn(length.warm_up).note for name, side in sides.items()}
        steps = length.steps or _steps_that_take(length.seconds, sides.values())
        actions = {name: partial(side.turn, steps) for name, side in sides.items()}
        turns = take_turns(length.turns, actions, title)
    return {
        name: Speed(
            steady=median(turn.images / turn.seconds for turn in turns[name]),
            cold=side.images / side.cold_seconds,
            images=sum(turn.images for turn in turns[name]),
            peak_mib=turns[name][-1].peak_mib,
            note=notes[name],
        )
        for name, side in sides.items()
    }


def _steps_that_take(seconds: float, sides: Iterable[Side]) -> int:
    """By the slowest of them; all do the same number."""
    return max(1, round(seconds / max(side.turn(1).seconds for side in sides)))
