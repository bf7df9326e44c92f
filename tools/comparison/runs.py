"""Runs on disk, finished or not. Nothing here imports torch."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from engine.config import yaml12
from engine.config.errors import RunError
from engine.config.schema import Config, flatten, to_dict
from engine.plots.metrics import monitored_in
from engine.run.folder import checkpoint_at
from engine.run.metrics import read_metrics


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder, without its checkpoints."""

    path: Path
    name: str  # the shortest end of the path that no other run has
    config: Mapping[str, Any]  # by dotted key
    results: Mapping[str, Any]  # empty until the run has ended
    environment: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl
    status: str  # unfinished without results.json: the run is still training, or was killed
    step: int
    wall_time: float | None
    monitor: str  # the metric that chooses the best checkpoint
    best: float | None
    last: float | None
    test: float | None

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    @property
    def progress(self) -> str:
        """The status, with the step of a run that isn't completed."""
        total = f" of {self.results['n_steps']:,}" if "n_steps" in self.results else ""
        return self.status if self.is_completed else f"{self.status} at step {self.step:,}{total}"


def read_runs(words: Sequence[str]) -> list[RunRecord]:
    """Read the runs that `words` refer to (run folders, folders of runs, checkpoints, globs): each once, in this order."""
    found: dict[Path, Path] = {}
    for word in words:
        matches = expand(word)
        runs = [run for path in matches for run in _runs_in(path)]
        if not runs:
            problem = "there is no run here (a folder with config.yaml and environment.json)"
            raise RunError(f"{word}: {problem if all(path.exists() for path in matches) else 'no such folder'}")
        found |= {run.resolve(): run for run in runs}
    paths = list(found.values())
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def expand(word: str) -> list[Path]:
    """Return the paths that a glob matches, or the one path that `word` is."""
    path = Path(word).expanduser()
    return [Path(match) for match in sorted(glob(str(path), recursive=True))] if has_magic(word) and not path.exists() else [path]


def _runs_in(path: Path) -> Iterator[Path]:
    """Find the run of a run folder or checkpoint, or the runs below a folder."""
    if checkpoint := checkpoint_at(path):
        path = checkpoint.parent.parent
    if is_run(path):
        yield path
        return
    for folder, subfolders, _ in os.walk(path):
        subfolders.sort()
        for name in [name for name in subfolders if is_run(Path(folder, name))]:
            subfolders.remove(name)  # a run contains no other runs
            yield Path(folder, name)


def is_run(path: Path) -> bool:
    return all((path / name).is_file() for name in ("config.yaml", "environment.json"))


def read_run(path: Path, name: str) -> RunRecord:
    """Read one run folder. Keys that its config lacks have their defaults; results that it lacks come from its history."""
    file = path / "config.yaml"
    try:
        config = {**flatten(to_dict(Config())), **flatten(yaml12.parse(file.read_text()))}
        file = path / "results.json"
        results = dict(json.loads(file.read_text())) if file.is_file() else {}
        file = path / "environment.json"
        environment = dict(json.loads(file.read_text())) if file.is_file() else {}
        file = path / "metrics.jsonl"
        history = read_metrics(path)
        end = history[-1] if history else {}
        monitor = results.get("monitor") or monitored_in({key for line in history for key in line})
        tag = f"valid/{monitor}"
        values = [line[tag] for line in history if tag in line]
        best, last = max((value for value in values if value is not None), default=None), values[-1] if values else None
        file = path / "results.json"
        if results:
            best, last = (results.get(which, {}).get(tag) for which in ("best", "last"))
        status, test = results.get("status", "unfinished"), results.get("test", {}).get(f"test/{monitor}")
        step, wall_time = results.get("step", end.get("step", 0)), results.get("wall_time", end.get("elapsed"))
        return RunRecord(path, name, config, results, environment, history, status, step, wall_time, monitor, best, last, test)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: not in the expected form
        raise RunError(f"{file} can't be read: {str(error).splitlines()[0]}") from error


def short_names(paths: Sequence[Path]) -> list[str]:
    """Name each path by as many of its last parts as distinguish it from the others."""
    parts = [path.absolute().parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        n = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        names.append("/".join(own[-n:]))
    return names
