"""Runs on disk, finished or not. Nothing here imports torch."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path
from types import NoneType
from typing import Any

from engine.config import yaml12
from engine.config.errors import ConfigError, Origin, RunError
from engine.config.resolve import check_values
from engine.config.schema import Config, flatten, to_dict
from engine.plots.metrics import monitored_in
from engine.run.folder import checkpoint_at
from engine.run.metrics import is_number, read_metrics

UNREADABLE = "unreadable"  # the status of a run whose files are damaged
FILES = ("config.yaml", "environment.json", "metrics.jsonl", "results.json")
MAX_CONFIG_BYTES = 1_000_000
MAX_DEPTH = 20  # of the values in a JSON file
NUMBERS = ("step", "n_steps", "wall_time", "images_per_sec", "peak_memory_mb", "params", "macs")  # in results.json


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder, without its checkpoints."""

    path: Path
    name: str  # the shortest end of the path that no other run has
    config: Mapping[str, Any]  # by dotted key
    results: Mapping[str, Any]  # empty until the run has ended
    environment: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl
    status: str  # unfinished without results.json: the run is still training, or was killed; unreadable: `results` say why
    step: int
    wall_time: float | None
    monitor: str  # the metric that chooses the best checkpoint
    best: float | None
    last: float | None
    test: float | None

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def is_readable(self) -> bool:
        return self.status != UNREADABLE

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    @property
    def progress(self) -> str:
        """The status, with the step of a run that isn't completed."""
        total = f" of {self.results['n_steps']:,}" if "n_steps" in self.results else ""
        return self.status if self.is_completed or not self.is_readable else f"{self.status} at step {self.step:,}{total}"


def read_runs(words: Sequence[str]) -> list[RunRecord]:
    """Read the runs that `words` refer to (run folders, folders of runs, checkpoints, globs): each once, in this order.

    A run with damaged files is among them as an unreadable one. It is an error if no run can be read.
    """
    found: dict[Path, Path] = {}
    for word in words:
        matches = expand(word)
        folders = [run for path in matches for run in _runs_in(path)]
        if not folders:
            problem = "there is no run here (a folder with config.yaml and environment.json)"
            raise RunError(f"{word}: {problem if all(path.exists() for path in matches) else 'no such folder'}")
        found |= {run.resolve(): run for run in folders}
    paths = list(found.values())
    runs: list[RunRecord] = []
    for path, name in zip(paths, short_names(paths), strict=True):
        try:
            runs.append(read_run(path, name))
        except RunError as error:
            why = {"why": str(error)}
            runs.append(RunRecord(path, name, {}, why, {}, [], UNREADABLE, 0, None, "", None, None, None))
    if not any(run.is_readable for run in runs):
        raise RunError("; ".join(run.results["why"] for run in runs))
    monitor = next(run.monitor for run in runs if run.is_readable)
    return [run if run.is_readable else replace(run, monitor=monitor) for run in runs]


def expand(word: str) -> list[Path]:
    """Return the paths that a glob matches, or the one path that `word` is."""
    path = Path(word).expanduser()
    return [Path(match) for match in sorted(glob(str(path), recursive=True))] if has_magic(word) and not path.exists() else [path]


def _runs_in(path: Path) -> Iterator[Path]:
    """Find the run of a run folder or checkpoint, or the runs below a folder."""
    if checkpoint := checkpoint_at(path):
        path = checkpoint.parent.parent
    if _looks_like_run(path):
        yield path
        return
    for folder, subfolders, _ in os.walk(path):
        subfolders.sort()
        for name in [name for name in subfolders if _looks_like_run(Path(folder, name))]:
            subfolders.remove(name)  # a run contains no other runs
            yield Path(folder, name)


def is_run(path: Path) -> bool:
    return all((path / name).is_file() for name in ("config.yaml", "environment.json"))


def _looks_like_run(path: Path) -> bool:
    """Whether a folder is a run, or was one before files were lost or damaged."""
    return is_run(path) or sum(os.path.lexists(path / name) for name in FILES) >= 2


def read_run(path: Path, name: str) -> RunRecord:
    """Read one run folder. Keys that its config lacks have their defaults; results that it lacks come from its history."""
    try:
        config, environment = _read_config(path / "config.yaml"), _read_mapping(path / "environment.json")
        results = _read_results(path / "results.json") if os.path.lexists(path / "results.json") else {}
        history = read_metrics(path)
        end = history[-1] if history else {}
        monitor = results.get("monitor") or monitored_in({key for line in history for key in line})
        tag = f"valid/{monitor}"
        values = [line[tag] for line in history if tag in line]
        best, last = max((value for value in values if value is not None), default=None), values[-1] if values else None
        if results:
            best, last = (results.get(which, {}).get(tag) for which in ("best", "last"))
        status, test = results.get("status", "unfinished"), results.get("test", {}).get(f"test/{monitor}")
        step, wall_time = results.get("step", end.get("step", 0)), results.get("wall_time", end.get("elapsed"))
        return RunRecord(path, name, config, results, environment, history, status, step, wall_time, monitor, best, last, test)
    except (OSError, ValueError, ConfigError, RecursionError) as error:
        raise RunError(f"{path.name} can't be read: {str(error).partition(chr(10))[0] or type(error).__name__}") from error


def _read_config(path: Path) -> dict[str, Any]:
    from models.loading.files import MalformedFile, read_limited  # imports torch, which --help does without

    try:
        values = yaml12.parse(read_limited(path, MAX_CONFIG_BYTES).decode())
        if not isinstance(values, dict):
            raise ValueError("a config is a mapping of keys to values")
        check_values(values, "", Origin(1, path.name))
        config = {**flatten(to_dict(Config())), **flatten(values)}
        for key, kind in (("model.name", str), ("data.name", str), ("seed", int)):
            if type(config[key]) is not kind:
                raise ValueError(f"it has no {key}")
    except (ValueError, ConfigError) as error:
        raise MalformedFile(path, str(error)) from error
    return config


def _read_results(path: Path) -> dict[str, Any]:
    from models.loading.files import MalformedFile  # likewise

    results = _read_mapping(path)
    for name, value in results.items():
        is_valid = (
            (name in ("best", "last", "test") and isinstance(value, dict) and all(map(_is_number_or_null, value.values())))
            or (name in NUMBERS and _is_number_or_null(value))
            or (name in ("status", "monitor") and isinstance(value, str))
            or (name == "why" and isinstance(value, (str, NoneType)))
        )
        if name in ("best", "last", "test", *NUMBERS, "status", "monitor", "why") and not is_valid:
            raise MalformedFile(path, f"its {name} is not valid")
    if type(results.get("step", 0)) is not int:
        raise MalformedFile(path, "its step is not valid")
    return results


def _is_number_or_null(value: Any) -> bool:
    return value is None or is_number(value)


def _read_mapping(path: Path) -> dict[str, Any]:
    from models.loading.files import MalformedFile, read_json  # likewise

    value = read_json(path)
    if not isinstance(value, dict) or _depth(value) > MAX_DEPTH:
        raise MalformedFile(path, "it is not a mapping of names to values")
    return value


def _depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, items), default=0)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Name each path by as many of its last parts as distinguish it from the others."""
    parts = [path.absolute().parts for path in paths]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        n = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        names.append("/".join(own[-n:]))
    return names
