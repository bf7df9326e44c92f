"""The folder of one run: its files, its lock, and where its checkpoints are."""

import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from engine.config import yaml12
from engine.config.errors import ConfigError, RunError

STEP_FOLDER = re.compile(r"step-(\d{6,})")
MANIFEST, CLASSES, ENVIRONMENT, CONFIG = "manifest.json", "classes.json", "environment.json", "config.yaml"
CATEGORY_IDS = "category_ids.json"  # of a detector whose data have other ids than the numbers of its classes


def committed_checkpoints(run_dir: Path) -> list[Path]:
    """Return the step folders of a run that have a manifest, oldest first. `read_checkpoint` tells whether they are intact."""
    folders = [folder for folder in (run_dir / "ckpt").glob("step-*") if STEP_FOLDER.fullmatch(folder.name)]
    return sorted((f for f in folders if (f / MANIFEST).is_file()), key=lambda f: int(f.name.removeprefix("step-")))


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`, or that run's best one, or its latest if none was evaluated."""
    path = path.expanduser()
    if (path / MANIFEST).is_file():
        return path.resolve()
    for name in ("best", "latest"):
        if (path / "ckpt" / name / MANIFEST).is_file():
            return (path / "ckpt" / name).resolve()
    raise RunError(f"{path} is neither a run folder with a checkpoint nor a checkpoint")


@dataclass(frozen=True)
class Resumption:
    """The run that `-r` continues, and from which of its checkpoints."""

    run_dir: Path
    which: str  # latest, best, or the name of a step's folder


def find_resumption(resume: str | None, exp_dir: str | Path | None) -> Resumption | None:
    """Return where a run continues; None if a new one starts."""
    if resume is None:
        return None
    if resume in ("latest", "best", "auto"):
        if exp_dir is None:
            raise ConfigError(f"-r {resume} needs -e with the folder of the run")
        run_dir = Path(exp_dir).expanduser()
        if resume == "auto":
            return Resumption(run_dir, "latest") if committed_checkpoints(run_dir) else None
        which = resume
    else:
        path = Path(resume).expanduser()
        if not path.exists():
            raise RunError(f"-r {resume}: no such run folder or checkpoint")
        is_checkpoint = (path / MANIFEST).is_file()
        run_dir = path.resolve().parent.parent if is_checkpoint else path
        which = path.resolve().name if is_checkpoint else "latest"
        if exp_dir is not None and Path(exp_dir).resolve() != run_dir.resolve():
            raise ConfigError(f"-e {exp_dir} and -r {resume} name different runs; a run continues in its own folder")
    if not (run_dir / CONFIG).is_file():
        raise RunError(f"{run_dir} has no run to resume (no config.yaml)")
    if not committed_checkpoints(run_dir):
        raise RunError(f"{run_dir} has no checkpoint to resume from; -r auto would start the run")
    return Resumption(run_dir, which)


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return a run's config.yaml as plain values: it is complete, so it needs no resolving."""
    path = run_dir / CONFIG
    try:
        return yaml12.parse(path.read_text())
    except OSError as error:
        raise RunError(f"{path} can't be read ({error.strerror})") from error
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error


@dataclass
class RunFolder:
    path: Path
    is_new: bool
    _lock: IO | None = field(default=None, repr=False)
    _made: list[Path] = field(default_factory=list, repr=False)

    @classmethod
    def start(cls, exp_dir: str | Path | None, *, may_hold_a_run: bool = False) -> "RunFolder":
        """Make and lock the folder of a new run."""
        made: list[Path] = []
        try:
            if exp_dir is None:
                path = _make_by_time(Path("runs"), made)
            else:
                path = Path(exp_dir).expanduser()
                _make(path, made)
                if not may_hold_a_run and ((path / CONFIG).exists() or (path / "ckpt").exists()):
                    raise ConfigError(f"{path} already has a run; -r latest continues it, another -e starts a new one")
        except OSError as error:
            raise RunError(f"{exp_dir or 'runs'}: the run folder can't be made ({error.strerror})") from error
        return cls(path, is_new=True, _made=made)._locked()

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        return cls(path, is_new=False)._locked()

    def _locked(self) -> "RunFolder":
        """Take the lock, and remove the temporary folders of saves that were cut off."""
        self._take_lock()
        for leftover in (self.path / "ckpt").glob(".*"):
            remove_tree(leftover)
        return self

    def _take_lock(self) -> None:
        try:
            self._lock = take_lock(self.path / ".lock")
        except OSError as error:
            raise RunError(f"{self.path} can't be written ({error.strerror})") from error
        if self._lock is None:
            raise RunError(f"{self.path} is in use by another process")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def discard(self) -> None:
        """Remove what was made for a run that never started."""
        (self.path / ".lock").unlink()
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # it holds something else by now, so it isn't ours to remove
                return

    def write(self, name: str, text: str) -> None:
        """Replace a file in one step, so that a reader never sees half of it."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}")
        part.write_text(text)
        part.replace(target)

    def write_json(self, name: str, values: Any) -> None:
        self.write(name, json.dumps(finite(values), indent=2) + "\n")


def take_lock(path: Path) -> IO | None:
    """Return the file, locked until it is closed or the process ends; None if another process holds the lock.

    Not by flock: worker processes would inherit that lock and outlive this one.
    """
    file = path.open("a+")
    try:
        import fcntl
    except ImportError:  # Windows, where a run folder has no lock
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make(path: Path, made: list[Path], *, exist_ok: bool = True) -> None:
    """Make `path` and its parents, and append those that are new to `made`."""
    if not path.parent.exists():
        _make(path.parent, made)
    if path.exists() and exist_ok and path.is_dir():
        return
    path.mkdir()
    made.append(path)


def _make_by_time(parent: Path, made: list[Path]) -> Path:
    name = time.strftime("exp-%Y-%m-%d-%H-%M-%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        try:
            _make(parent / f"{name}{suffix}", made, exist_ok=False)
        except FileExistsError:  # another run started in this second
            continue
        return parent / f"{name}{suffix}"
    raise FileExistsError(f"a thousand runs started in this second, {name}")


def remove_tree(path: Path) -> None:
    """Remove a file or folder without following links."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    with os.scandir(path) as entries:
        for entry in entries:
            remove_tree(Path(entry.path))
    path.rmdir()
