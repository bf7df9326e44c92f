"""Runs as they lie on the disk, finished or not. Nothing here needs torch."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from engine.config import yaml12
from engine.config.errors import RunError
from engine.config.schema import Config, flatten, to_dict
from engine.run.folder import MANIFEST
from engine.run.metrics import read_metrics

UNFINISHED = "unfinished"  # no results.json: it is being trained, or was killed
MONITORED = ("acc@1", "mIoU", "mAP")  # in a run that doesn't say by which metric its best checkpoint is chosen


@dataclass(frozen=True)
class RunRecord:
    path: Path
    name: str  # the shortest that tells it from the others
    config: Mapping[str, Any]  # by dotted key
    results: Mapping[str, Any]  # empty while there are none
    environment: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl

    @property
    def model(self) -> str:
        return self.config["model.name"]

    @property
    def data(self) -> str:
        return self.config["data.name"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def status(self) -> str:
        return self.results.get("status", UNFINISHED)

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    @property
    def step(self) -> int:
        return self.results.get("step", self.history[-1]["step"] if self.history else 0)

    @property
    def said_status(self) -> str:
        """Of a run that isn't completed, how far it has come."""
        of = f" of {self.results['n_steps']:,}" if "n_steps" in self.results else ""
        return self.status if self.is_completed else f"{self.status} at step {self.step:,}{of}"

    @cached_property
    def monitor(self) -> str:
        if "monitor" in self.results:
            return self.results["monitor"]
        known = {key for line in self.history for key in line}
        return next((name for name in MONITORED if f"valid/{name}" in known), MONITORED[0])

    @property
    def best(self) -> float | None:
        if self.results:
            return self.results["best"].get(f"valid/{self.monitor}")
        return max((value for value in self._evaluated if value is not None), default=None)

    @property
    def last(self) -> float | None:
        if self.results:
            return self.results["last"].get(f"valid/{self.monitor}")
        return self._evaluated[-1] if self._evaluated else None

    @property
    def test(self) -> float | None:
        return self.results.get("test", {}).get(f"test/{self.monitor}")

    @property
    def wall_time(self) -> float | None:
        return self.results.get("wall_time", self.history[-1]["elapsed"] if self.history else None)

    @property
    def _evaluated(self) -> list[float | None]:
        return [line[f"valid/{self.monitor}"] for line in self.history if f"valid/{self.monitor}" in line]

    def curve(self, key: str, x: str) -> tuple[list[float], list[float]]:
        """Where `key` was logged, by step, epoch or elapsed (seconds); what was no number is left out."""
        points = [(line[x], line[key]) for line in self.history if line.get(key) is not None and math.isfinite(line[key])]
        return [at for at, _ in points], [value for _, value in points]


def read_runs(words: Sequence[str]) -> list[RunRecord]:
    """The runs that folders of a run, folders of runs, checkpoints and globs mean; each once, in this order."""
    paths = list({path.resolve(): path for word in words for path in _runs_of(word)}.values())
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def _runs_of(word: str) -> list[Path]:
    path = Path(word).expanduser()
    if not path.exists() and has_magic(word):
        found = [run for match in sorted(glob(str(path), recursive=True)) for run in _inside(Path(match))]
    else:
        found = list(_inside(path))
    if not found:
        what = "there is no run here (a folder with config.yaml and environment.json)"
        raise RunError(f"{word}: {what if path.exists() or has_magic(word) else 'no such folder'}")
    return found


def _inside(path: Path) -> Iterator[Path]:
    """The run that a folder or a checkpoint is, or the runs in it."""
    if (path / MANIFEST).is_file():
        path = path.resolve().parent.parent
    if is_run(path):
        yield path
        return
    for folder, inner, _ in os.walk(path):
        inner.sort()
        for name in [name for name in inner if is_run(Path(folder, name))]:
            inner.remove(name)  # a run holds no others
            yield Path(folder, name)


def is_run(path: Path) -> bool:
    return all((path / name).is_file() for name in ("config.yaml", "environment.json"))


def read_run(path: Path, name: str) -> RunRecord:
    file = path / "config.yaml"
    try:
        config = {**flatten(to_dict(Config())), **flatten(yaml12.parse(file.read_text()))}
        loaded = []
        for file in (path / "results.json", path / "environment.json"):
            loaded.append(json.loads(file.read_text()) if file.is_file() else {})
        file = path / "metrics.jsonl"
        return RunRecord(path, name, config, *loaded, read_metrics(path))
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: the YAML is no mapping
        raise RunError(f"{file} can't be read: {str(error).splitlines()[0]}") from error


def short_names(paths: Sequence[Path]) -> list[str]:
    """As many of the last parts of each path as tell it from the others."""
    parts = [path.absolute().parts for path in paths]

    def name(own: tuple[str, ...]) -> str:
        others = [other for other in parts if other != own]
        return "/".join(next((own[-n:] for n in range(1, len(own)) if all(own[-n:] != o[-n:] for o in others)), own))

    return [name(own) for own in parts]
