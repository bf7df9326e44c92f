"""How all benchmarks measure: what is compared takes turns, and the median counts."""

import json
import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, TypeVar

from tools.tables import plain

T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    rounds: int
    seconds: float  # of each measurement
    warm_up: int  # batches


FULL, QUICK = Effort(3, 2.0, 12), Effort(1, 0.2, 2)

Batches = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Comparison:
    """The first pipeline is this project's, the others are its rivals."""

    title: str
    pipelines: dict[str, Batches]


@dataclass(frozen=True)
class Row:
    comparison: str
    pipeline: str
    images_per_sec: float  # the median of the rounds
    lowest: float
    highest: float
    faster_by: float  # we than this one
    core_ms_per_image: float  # of all its processes; other load on the machine hardly changes it
    fewer_core_ms_by: float


def take_turns(rounds: int, actions: Mapping[str, Callable[[], T]], title: str = "") -> dict[str, list[T]]:
    """What each action gave, round by round."""
    from tqdm import tqdm

    given: dict[str, list[T]] = {name: [] for name in actions}
    turns = [item for _ in range(rounds) for item in actions.items()]
    for name, action in tqdm(turns, desc=title, leave=False, disable=not sys.stderr.isatty()):
        given[name].append(action())
    return given


def measure(comparison: Comparison, effort: Effort) -> list[Row]:
    measured = take_turns(
        effort.rounds,
        {name: lambda start=start: run(start(), effort) for name, start in comparison.pipelines.items()},
        comparison.title,
    )
    rates = {name: [n / seconds for n, seconds, _ in runs] for name, runs in measured.items()}
    core_ms = {name: [1000 * core_seconds / n for n, _, core_seconds in runs] for name, runs in measured.items()}
    ours = next(iter(rates))
    return [
        Row(
            comparison.title,
            name,
            median(rates[name]),
            min(rates[name]),
            max(rates[name]),
            median(rates[ours]) / median(rates[name]),
            median(core_ms[name]),
            median(core_ms[name]) / median(core_ms[ours]),
        )
        for name in rates
    ]


def run(batches: Iterator[Any], effort: Effort) -> tuple[int, float, float]:
    """Images, seconds, and seconds of all cores, while the pipeline runs: neither its start nor its end is counted."""
    for _ in range(effort.warm_up):
        next(batches)
    n, begin, cores_begin = 0, time.perf_counter(), core_seconds()
    for images, _ in batches:
        n += len(images)
        elapsed = time.perf_counter() - begin
        if elapsed > effort.seconds:
            return n, elapsed, core_seconds() - cores_begin
    raise RuntimeError("the data ended before the time did")


def core_seconds() -> float:
    """Spent so far by this process and its workers."""
    import psutil

    of_workers = [worker.cpu_times() for worker in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in of_workers)


def table(rows: Sequence[Row]) -> list[str]:
    """A block of lines for each comparison."""
    lines = ["times: how many times as fast this project is, or as few core milliseconds it needs"]
    for title in dict.fromkeys(row.comparison for row in rows):
        lines += ["", f"{title:46s} images/s   (lowest to highest)   times  core ms/image   times"]
        for row in (row for row in rows if row.comparison == title):
            span = f"({row.lowest:,.0f} to {row.highest:,.0f})"
            lines.append(
                f"  {row.pipeline:44s} {row.images_per_sec:8,.0f} {span:>21s} {row.faster_by:7.2f} "
                f"{row.core_ms_per_image:14.4f} {row.fewer_core_ms_by:7.2f}"
            )
    return lines


@dataclass(frozen=True)
class Ratio:
    """One figure of ours over one of theirs, measured in the same run."""

    what: str
    rival: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    at_least: float | None = None  # what the ratio is aimed at
    at_most: float | None = None

    @property
    def aim(self) -> str:
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return f"at most {self.at_most:g}" if self.at_most is not None else ""

    @property
    def is_met(self) -> bool:
        return (self.at_least is None or self.ratio >= self.at_least) and (self.at_most is None or self.ratio <= self.at_most)


def ratio(what: str, rival: str, unit: str, ours: float, theirs: float, **aim: float) -> Ratio:
    return Ratio(what, rival, unit, ours, theirs, ours / theirs, **aim)


@dataclass(frozen=True)
class Report:
    setting: dict[str, Any]
    ratios: list[Ratio]
    left_out: list[str] = field(default_factory=list)


def show(report: Report, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({**report.setting, "left_out": report.left_out, "ratios": [asdict(r) for r in report.ratios]}, indent=2))
        return 0
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.setting.items()))
    print("\n".join(f"left out: {name}" for name in report.left_out), end="\n" if report.left_out else "")
    print(plain(rows_of(report.ratios), right=(2, 3, 5)))
    return 0


def rows_of(ratios: Sequence[Ratio]) -> list[Sequence[str]]:
    """A table's, the head first."""
    return [
        ("what", "beside", "this project", "the other", "unit", "ratio", "aim", ""),
        *((r.what, r.rival, figure(r.ours), figure(r.theirs), r.unit, f"{r.ratio:.3g}", r.aim, _verdict(r)) for r in ratios),
    ]


def _verdict(one: Ratio) -> str:
    return ("reached" if one.is_met else "missed") if one.aim else ""


def figure(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_threads(command: ArgumentParser) -> None:
    command.add_argument(
        "--num_threads", type=int, default=n_cores(), metavar="N", help="of torch, on all sides (default: one for each core)"
    )
