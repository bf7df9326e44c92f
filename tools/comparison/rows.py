"""Runs as the rows of a table, one for all seeds of a training, and the differences between runs; as text, Markdown and CSV."""

import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.config.schema import flatten
from engine.run.log import millions
from tools.comparison.runs import RunRecord
from tools.tables import csv_text, duration, escaped, giga, markdown, plain

SEED_SUFFIX = re.compile(r"[-_./]*seed[-_=]?\d+$")
NOT_OF_THE_MACHINE = ("command", "earlier_sessions", "data")  # keys of environment.json


@dataclass(frozen=True)
class Row:
    """A run, or several completed runs that differ only in their seed."""

    name: str
    runs: tuple[RunRecord, ...]
    interval: tuple[float, float] | None = None  # of the mean score, over seeds and images

    @property
    def first(self) -> RunRecord:
        return self.runs[0]

    @property
    def seeds(self) -> str:
        return " ".join(str(run.seed) for run in self.runs if run.is_readable)


def rows_of(runs: Sequence[RunRecord]) -> list[Row]:
    """Group runs into rows. A second run with the same seed is not another measurement: it has its own row."""
    groups: list[list[RunRecord]] = []
    for run in runs:
        for group in groups if run.is_completed else []:
            same_config = {**run.config, "seed": None} == {**group[0].config, "seed": None}
            if same_config and group[0].is_completed and run.seed not in [other.seed for other in group]:
                group.append(run)
                break
        else:
            groups.append([run])
    rows = []
    for group in groups:
        name, n_others = group[0].name, len(group) - 1
        stems = {SEED_SUFFIX.sub("", run.name) for run in group}
        if n_others:
            name = stems.pop() if len(stems) == 1 and "" not in stems else f"{name} and {n_others} more"
        rows.append(Row(name, tuple(group)))
    names = [row.name for row in rows]
    full_names = [f"{row.first.path.absolute().parent.name}/{row.name}" for row in rows]
    return [row if names.count(row.name) == 1 else replace(row, name=name) for row, name in zip(rows, full_names, strict=True)]


@dataclass(frozen=True)
class Column:
    name: str  # in a CSV file, where numbers are not rounded
    title: str  # in a table for people
    value: Callable[[Row], Any]  # one value, or a list with the measurement of each seed
    format: Callable[[Any], str] = str
    is_number: bool = True
    is_in_percent: bool = False

    def mean_and_deviation(self, row: Row) -> tuple[Any, float | None]:
        """Return the value, or the mean over the seeds and the sample deviation, so that few seeds don't appear too certain."""
        value = self.value(row)
        if not isinstance(value, list):
            return value, None
        return statistics.fmean(value) if value else None, statistics.stdev(value) if len(value) > 1 else None

    def cell(self, row: Row) -> str:
        mean, deviation = self.mean_and_deviation(row)
        if mean is None:
            return "-"
        if not self.is_in_percent:
            return self.format(mean)
        return f"{100 * mean:.2f}{'' if deviation is None else f' ± {100 * deviation:.2f}'} %"


def _per_seed(value: Callable[[RunRecord], float | None]) -> Callable[[Row], list[float]]:
    return lambda row: [number for run in row.runs if (number := value(run)) is not None]


_COLUMNS = (
    Column("run", "run", lambda row: row.name, is_number=False),
    Column("model", "model", lambda row: row.first.config.get("model.name", "-"), is_number=False),
    Column("data", "data", lambda row: row.first.config.get("data.name", "-"), is_number=False),
    Column("status", "status", lambda row: row.first.status, is_number=False),
    Column("n", "n", lambda row: len(row.runs)),
    Column("params", "parameters", lambda row: row.first.results.get("params"), millions),
    Column("macs", "MACs", lambda row: row.first.results.get("macs"), giga),
    Column("images_per_sec", "images/s", _per_seed(lambda run: run.results.get("images_per_sec")), lambda n: f"{n:,.0f}"),
    Column("wall_time", "time", _per_seed(lambda run: run.wall_time), duration),
    Column("peak_memory_mb", "memory", _per_seed(lambda run: run.results.get("peak_memory_mb")), lambda n: f"{n:,.0f} MB"),
    Column("metric", "metric", lambda row: row.first.monitor, is_number=False),
    Column("best", "best", _per_seed(lambda run: run.best), is_in_percent=True),
    Column("last", "last", _per_seed(lambda run: run.last), is_in_percent=True),
    Column("test", "test", _per_seed(lambda run: run.test), is_in_percent=True),
)
COLUMNS = {column.name: column for column in _COLUMNS}
LEVEL = 0.05  # of verdicts and intervals
INTERVAL = Column("interval", "95 % interval", lambda row: row.interval, lambda i: f"{100 * i[0]:.2f} to {100 * i[1]:.2f} %")


def columns_for(rows: Sequence[Row]) -> list[Column]:
    """Choose the columns of a table for people: without those that are the same for all of these rows."""
    metrics = {row.first.monitor for row in rows}
    is_hidden = {
        "data": len({row.first.config["data.name"] for row in rows if row.first.is_readable}) == 1,
        "n": all(len(row.runs) == 1 for row in rows),
        "metric": len(metrics) == 1,
        "test": all(run.test is None for row in rows for run in row.runs),
    }
    columns = []
    for column in COLUMNS.values():
        if column.is_in_percent and len(metrics) == 1:
            column = replace(column, title=f"{column.title} {rows[0].first.monitor}")
        if column.name == "status":
            column = replace(column, value=lambda row: row.first.progress)
        if not is_hidden.get(column.name):
            columns.append(column)
    return [*columns, INTERVAL] if any(row.interval for row in rows) else columns


def notes_on(rows: Sequence[Row]) -> list[str]:
    """Say why runs failed, and which have other data than the first of their dataset and seed, as a seed may choose the split."""
    from datasets.pipeline.fingerprint import fingerprint_differences  # imports torch, which --help does without

    notes = [f"{row.name}: {row.first.results['why']}" for row in rows if row.first.results.get("why")]
    first: dict[Any, RunRecord] = {}
    for run in (run for row in rows for run in row.runs if run.is_readable and run.environment.get("data")):
        other = first.setdefault((run.config["data.name"], run.seed), run)
        if found := fingerprint_differences(other.environment["data"], run.environment["data"]):
            notes.append(f"{run.name} was trained on other data than {other.name}: {', '.join(found)}")
    return notes


def differences(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the keys whose values differ, with the value of each mapping as YAML; - where it lacks the key."""

    def as_yaml(value: Any) -> str:
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        return f"[{', '.join(map(as_yaml, value))}]" if isinstance(value, (list, tuple)) else str(value)

    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    written = {key: [as_yaml(mapping.get(key, "-")) for mapping in mappings] for key in keys}
    return {key: values for key, values in written.items() if len(set(values)) > 1}


def machine_of(run: RunRecord) -> dict[str, Any]:
    """Return the versions and the hardware that a run was trained with, by dotted key."""
    return flatten({key: value for key, value in run.environment.items() if key not in NOT_OF_THE_MACHINE})


def as_text(rows: Sequence[Row], *sentences: object, as_markdown: bool = False) -> str:
    columns = columns_for(rows)
    cells = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    numbers = {i for i, column in enumerate(columns) if column.is_number}
    notes = [*notes_on(rows), *map(str, sentences)]
    if as_markdown:
        return "\n\n".join([markdown(cells, numbers), *map(escaped, notes)]) + "\n"
    return "\n".join([plain(cells, numbers), *notes])


def as_csv(rows: Sequence[Row]) -> str:
    """Write unrounded numbers: accuracies from 0 to 1, seconds, MiB. After the mean over seeds comes the deviation."""
    lines = []
    for row in rows:
        line = {}
        for column in COLUMNS.values():
            line[column.name], deviation = column.mean_and_deviation(row)
            if isinstance(column.value(row), list):
                line[f"{column.name}_std"] = deviation
        line |= {"step": row.first.step, "seeds": row.seeds, "paths": os.pathsep.join(str(run.path) for run in row.runs)}
        if row.interval is not None:
            line["interval_low"], line["interval_high"] = row.interval
        lines.append(line)
    return csv_text([list(lines[0]), *(line.values() for line in lines)])


def differences_as_text(a: RunRecord, b: RunRecord) -> str:
    parts = {
        "config": differences([a.config, b.config]),
        "data": differences([flatten({"data": run.environment.get("data")}) for run in (a, b)]),
        "versions and machine": differences([machine_of(a), machine_of(b)]),
        "results": differences([flatten({**run.results, "status": run.progress}) for run in (a, b)]),
    }
    texts = []
    for title, differing in parts.items():
        lines = [(title, a.name, b.name), *((key, *values) for key, values in differing.items())]
        texts.append(plain(lines) if differing else f"{title}: no difference")
    return "\n\n".join(texts)
