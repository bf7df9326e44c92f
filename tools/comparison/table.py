"""Runs as rows of a table. Completed runs that differ in their seed only are one row, with mean and deviation."""

import csv
import io
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.run.log import millions
from tools.comparison.runs import RunRecord
from tools.tables import Rows, duration, giga, markdown, plain

OF_A_SEED = re.compile(r"[-_./]*seed[-_=]?\d+$")


@dataclass(frozen=True)
class Measured:
    """Of the seeds of a row that have it."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Of a sample, so that few seeds don't look better than they are."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    name: str
    runs: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        return self.runs[0]

    @property
    def seeds(self) -> str:
        return " ".join(str(run.seed) for run in self.runs)

    def measured(self, of: Callable[[RunRecord], float | None]) -> Measured:
        return Measured(tuple(value for run in self.runs if (value := of(run)) is not None))


def rows_of(runs: Sequence[RunRecord]) -> list[Row]:
    groups: list[list[RunRecord]] = []
    for run in runs:
        own = next((group for group in groups if _is_of(group, run)), None)
        if own is None:
            groups.append([run])
        else:
            own.append(run)
    names = [_name_of([run.name for run in group]) for group in groups]
    names = [
        name if names.count(name) == 1 else f"{group[0].path.absolute().parent.name}/{name}"
        for name, group in zip(names, groups, strict=True)
    ]
    return [Row(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def _is_of(group: Sequence[RunRecord], run: RunRecord) -> bool:
    """A repetition of a seed that is there is no further measurement."""
    if not run.is_completed or not group[0].is_completed or run.seed in [other.seed for other in group]:
        return False
    return {**run.config, "seed": None} == {**group[0].config, "seed": None}


def _name_of(names: Sequence[str]) -> str:
    without_seed = {OF_A_SEED.sub("", name) for name in names}
    if len(names) > 1 and len(without_seed) == 1 and (name := without_seed.pop()):
        return name
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _number(n: float) -> str:
    return f"{n:.2f}"


def _result(name: str) -> Callable[[Row], Measured]:
    return lambda row: row.measured(lambda run: run.results.get(name))


@dataclass(frozen=True)
class Column:
    name: str  # in a file
    title: str  # for people
    value: Callable[[Row], Any]  # a Measured, or what all seeds have in common
    say: Callable[[Any], str] = str
    is_number: bool = True
    is_in_percent: bool = False

    def mean_and_deviation(self, row: Row) -> tuple[Any, float | None]:
        """Or what all seeds have in common."""
        value = self.value(row)
        return (value.mean, value.deviation) if isinstance(value, Measured) else (value, None)

    def cell(self, row: Row) -> str:
        mean, deviation = self.mean_and_deviation(row)
        if mean is None:
            return "-"
        if not self.is_in_percent:
            return self.say(mean)
        return f"{self.say(100 * mean)}{'' if deviation is None else f' ± {self.say(100 * deviation)}'} %"


COLUMNS = (
    Column("run", "run", lambda row: row.name, is_number=False),
    Column("model", "model", lambda row: row.first.model, is_number=False),
    Column("data", "data", lambda row: row.first.data, is_number=False),
    Column("status", "status", lambda row: row.first.status, is_number=False),
    Column("n", "n", lambda row: len(row.runs)),
    Column("params", "parameters", lambda row: row.first.results.get("params"), millions),
    Column("macs", "MACs", lambda row: row.first.results.get("macs"), giga),
    Column("images_per_sec", "images/s", _result("images_per_sec"), lambda n: f"{n:,.0f}"),
    Column("wall_time", "time", lambda row: row.measured(lambda run: run.wall_time), duration),
    Column("peak_memory_mb", "memory", _result("peak_memory_mb"), lambda n: f"{n:,.0f} MB"),
    Column("metric", "metric", lambda row: row.first.monitor, is_number=False),
    Column("best", "best", lambda row: row.measured(lambda run: run.best), _number, is_in_percent=True),
    Column("last", "last", lambda row: row.measured(lambda run: run.last), _number, is_in_percent=True),
    Column("test", "test", lambda row: row.measured(lambda run: run.test), _number, is_in_percent=True),
)


def mean_and_deviation(row: Row, name: str) -> tuple[Any, float | None]:
    return next(column for column in COLUMNS if column.name == name).mean_and_deviation(row)


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """For people: those that say something about these rows."""
    n_metrics = len({row.first.monitor for row in rows})
    pointless = {
        "data": len({row.first.data for row in rows}) == 1,
        "n": all(len(row.runs) == 1 for row in rows),
        "metric": n_metrics == 1,
        "test": all(run.test is None for row in rows for run in row.runs),
    }
    of = f" {rows[0].first.monitor}" if n_metrics == 1 else ""
    shown = []
    for column in COLUMNS:
        if column.is_in_percent:
            column = replace(column, title=f"{column.title}{of}")
        if column.name == "status":
            column = replace(column, value=lambda row: row.first.said_status)
        if not pointless.get(column.name):
            shown.append(column)
    return shown


def as_text(rows: Sequence[Row]) -> str:
    return "\n".join([plain(*_cells(rows)), *reasons(rows)])


def as_markdown(rows: Sequence[Row]) -> str:
    return "\n\n".join([markdown(*_cells(rows)), *reasons(rows)]) + "\n"


def _cells(rows: Sequence[Row]) -> tuple[Rows, set[int]]:
    columns = shown_columns(rows)
    lines = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    return lines, {i for i, column in enumerate(columns) if column.is_number}


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why runs have failed."""
    return [f"{row.name}: {row.first.results['why']}" for row in rows if row.first.results.get("why")]


def as_csv(rows: Sequence[Row]) -> str:
    """Plain numbers: accuracies from 0 to 1, seconds, MiB; beside the mean of what each run measures, its deviation."""
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    lines = [list(_plain_values(row)) for row in rows]
    writer.writerow([name for name, _ in lines[0]])
    writer.writerows([value for _, value in line] for line in lines)
    return written.getvalue()


def _plain_values(row: Row) -> Iterator[tuple[str, Any]]:
    for column in COLUMNS:
        mean, deviation = column.mean_and_deviation(row)
        yield column.name, mean
        if isinstance(column.value(row), Measured):
            yield f"{column.name}_std", deviation
    yield "step", row.first.step
    yield "seeds", row.seeds
    yield "paths", os.pathsep.join(str(run.path) for run in row.runs)
