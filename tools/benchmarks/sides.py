"""Run the sides of a comparison: each is a process, and works one turn at a time while the others are stopped."""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
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
from tqdm import trange

from engine.config.command_line import is_installed
from engine.config.errors import RunError
from engine.devices.memory import peak_memory
from tools.benchmarks.report import ROOT, Ratio, ratio

T = TypeVar("T")

OURS = "this project"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIMEOUT = 900.0  # seconds for a start or a turn
LIMIT, FEWEST = 60.0, 2  # seconds after which no round begins any more, unless there were fewer rounds than this
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"  # a program that computes


@dataclass(frozen=True)
class Length:
    """The length of a race."""

    warm_up: int  # steps
    turns: int
    steps: int = 1  # of a turn, at least
    seconds: float = 0.0  # of a turn, at least


@dataclass(frozen=True)
class Turn:
    images: int
    seconds: float
    core_seconds: float  # of the process and its workers
    peak_mib: float = 0.0  # memory, since the start of the process
    note: Any = None

    @property
    def figures(self) -> tuple[float, float]:
        """Return the CPU time per image, which other load on the machine changes little, and the images/s by the clock."""
        return 1000 * self.core_seconds / self.images, self.images / self.seconds


@dataclass(frozen=True)
class Speed:
    """The turns of one side of a race."""

    begin: Sequence[Turn]  # the start of the process, and its warm-up
    quiet: Sequence[Turn]
    busy: Sequence[Turn] = ()  # beside busy processes, each after a quiet one

    @property
    def steady(self) -> float:
        """Return the images/s of the quiet turns."""
        return median(turn.images / turn.seconds for turn in self.quiet)

    @property
    def cold(self) -> list[Turn]:
        """Return the quiet turns as one, which begins with the process."""
        values = zip(*((turn.images, turn.seconds, turn.core_seconds) for turn in (*self.begin, *self.quiet)), strict=True)
        return [Turn(*map(sum, values))]

    @property
    def kept(self) -> float:
        """Return the share of images/s that busy processes leave."""
        return medians(self.busy, self.quiet, 1)[2]


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
            seconds, cores = time.perf_counter() - self._begin, _core_seconds() - self._begin_cores
            self._connection.send(Turn(self._images, seconds, cores, peak_memory(DEVICE), self.note))
            self.note, self._images = None, 0
            self._steps, self._seconds = self._connection.recv()
            self._begin_cores, self._begin = _core_seconds(), time.perf_counter()
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
    """Return the CPU time of this process and its workers, also of those that have ended."""
    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    for worker in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            total += sum(worker.cpu_times()[:4])  # user and system, and those of its ended children
    return total


Work = Callable[[Turns], None]  # never returns; can be pickled


@dataclass(frozen=True)
class InEnvironment:
    """A work whose process starts with these variables."""

    work: Work
    variables: Mapping[str, str]

    def __call__(self, turns: Turns) -> None:
        self.work(turns)


class Side:
    """A process that is stopped, with all of its workers, except during its turns."""

    def __init__(self, name: str, work: Work, threads: int) -> None:
        self.name, begin, context = name, time.perf_counter(), get_context("spawn")
        self._connection, childs_end = context.Pipe()
        self._process = context.Process(target=_in_child, args=(childs_end, work, get_start_method()))
        quiet = os.environ.get("PYTHONWARNINGS", "ignore:resource_tracker")  # it reports what a killed process left behind
        variables = work.variables if isinstance(work, InEnvironment) else {}
        with patch.dict(os.environ, {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": quiet, **variables}):
            self._process.start()
        childs_end.close()
        try:
            started = self._receive()
        except BaseException:
            self.close()
            raise
        self.start = replace(started, seconds=time.perf_counter() - begin)
        self._for_all(psutil.Process.suspend)

    def both_turns(self, length: Length, others: Sequence[psutil.Process]) -> list[Turn]:
        """Have a quiet turn and one beside the other processes, which is slow and so has a quarter of the steps."""
        quiet = self.turn(length.steps, length.seconds)
        return [quiet, self.turn(-(-length.steps // 4), length.seconds / 2, others)] if others else [quiet]

    def turn(self, steps: int, seconds: float = 0.0, beside: Sequence[psutil.Process] = ()) -> Turn:
        """Let the side work, and the processes `beside` too."""
        self._for_all(psutil.Process.resume, beside)
        self._connection.send((steps, seconds))
        turn = self._receive()
        self._for_all(psutil.Process.suspend, beside)
        return turn

    def close(self) -> None:
        self._for_all(psutil.Process.kill)
        self._process.join()

    def _receive(self) -> Turn:
        try:
            received = self._connection.recv() if self._connection.poll(TIMEOUT) else f"no report for {TIMEOUT:.0f} seconds"
        except EOFError:
            self._process.join()
            received = f"its process ended with exit code {self._process.exitcode}"
        if isinstance(received, str):
            raise RunError(f"{self.name} failed:\n{received}")
        return received

    def _for_all(self, action: Callable[[psutil.Process], None], beside: Sequence[psutil.Process] = ()) -> None:
        mine = [psutil.Process(self._process.pid)] if self._process.is_alive() else []
        for one in (*mine, *(child for process in mine for child in process.children(recursive=True)), *beside):
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
    """Call every action once per round, in fewer rounds on a slow machine, and return the results by action."""
    results, begin = list[list[T]](), time.perf_counter()
    for n_done in trange(rounds, desc=title, leave=False, disable=None):
        if n_done >= FEWEST and time.perf_counter() - begin > LIMIT:
            break
        results.append([action() for action in actions.values()])
    return dict(zip(actions, map(list, zip(*results, strict=True)), strict=True))


def race(works: Mapping[str, Work], length: Length, threads: int, title: str, n_busy: int = 0) -> dict[str, Speed]:
    """Start all sides, warm them up, and measure them in turns, each also beside busy processes if there are any."""
    with ExitStack() as stack:
        others = [psutil.Popen([sys.executable, "-c", BUSY], preexec_fn=getattr(os, "setpgrp", None)) for _ in range(n_busy)]
        for other in others:
            stack.callback(other.wait)
            stack.callback(other.kill)  # is called first
            other.suspend()
        sides = {name: stack.enter_context(closing(Side(name, work, threads))) for name, work in works.items()}
        begins = {name: [side.start, side.turn(length.warm_up)] for name, side in sides.items()}
        actions = {name: partial(side.both_turns, length, others) for name, side in sides.items()}
        rounds = take_turns(length.turns, actions, title)
    return {name: Speed(begins[name], *zip(*rounds[name], strict=True)) for name in works}


def speed_ratios(
    what: str, rival: str, speeds: Mapping[str, Speed], at_least: float | None = None, *, ours: str = OURS, kept: bool = False
) -> list[Ratio]:
    """Compare two sides of a race, also beside busy processes if there were any; `kept`: and the speed that these leave."""
    mine, theirs = speeds[ours], speeds[rival]
    ratios = [speed_ratio(what, rival, mine.quiet, theirs.quiet, at_least)]
    if mine.busy:
        ratios.append(speed_ratio(f"{what}; beside busy processes", rival, mine.busy, theirs.busy))
    what = f"{what}: share of the idle speed kept beside busy processes"
    for name, share, aim in ((rival, theirs.kept, 1.0), ("all of it", 1.0, 0.4)) if mine.busy and kept else ():
        ratios.append(ratio(what, name, "", mine.kept, share, at_least=aim))
    return ratios


def speed_ratio(what: str, rival: str, mine: Sequence[Turn], theirs: Sequence[Turn], at_least: float | None = None) -> Ratio:
    ours, other, times = medians(mine, theirs, 0)
    return Ratio(what, rival, "core ms/image", ours, other, 1 / times, at_least, None, medians(mine, theirs, 1))


def medians(mine: Sequence[Turn], theirs: Sequence[Turn], i: int) -> tuple[float, float, float]:
    """Return the medians of one of the figures, and the median of its ratios in each round."""
    rounds = [(one.figures[i], other.figures[i]) for one, other in zip(mine, theirs, strict=True)]
    return *map(median, zip(*rounds, strict=True)), median(one / other for one, other in rounds)


def installed(works: Mapping[str, Work], modules: Mapping[str, str]) -> tuple[dict[str, Work], list[str]]:
    """Return the works whose module is installed, and a line about each of the others."""
    missing = {name: modules[name] for name in works if name in modules and not is_installed(modules[name])}
    present = {name: work for name, work in works.items() if name not in missing}
    return present, [f"{name}, as {module} is not installed" for name, module in missing.items()]


def run_python(words: list[str], until: Path | None = None) -> float:
    """Run a Python program until it ends or the file `until` has content, and return the seconds."""
    begin, command = time.perf_counter(), [sys.executable, *words]
    with TemporaryFile("w+") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        while process.poll() is None and not (until and until.exists() and until.stat().st_size):
            time.sleep(0.002)
        seconds, failed = time.perf_counter() - begin, process.poll() or (until and not until.exists())
        process.kill()
        if failed:
            output.seek(0)
            raise RunError(f"python {' '.join(words)} failed:\n{output.read()}")
    return seconds
