"""The folder of one run: its files, its lock, and what of it a resumption needs."""

import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from engine.config.errors import ConfigError, RunError

STEP_FOLDER = re.compile(r"step-(\d{6,})")
MANIFEST, CLASSES = "manifest.json", "classes.json"


def committed_checkpoints(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first: those with a manifest. Whether they are whole is for their loader."""
    folders = [folder for folder in (run_dir / "ckpt").glob("step-*") if STEP_FOLDER.fullmatch(folder.name)]
    return sorted((f for f in folders if (f / MANIFEST).is_file()), key=lambda f: int(f.name.removeprefix("step-")))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or a run's best, or its latest where none was evaluated."""
    path = path.expanduser()
    if (path / MANIFEST).is_file():
        return path.resolve()
    for name in ("best", "latest"):
        if (path / "ckpt" / name / MANIFEST).is_file():
            return (path / "ckpt" / name).resolve()
    raise RunError(f"{path} is no run folder with a checkpoint, and no checkpoint")


@dataclass(frozen=True)
class Resumption:
    """What `-r` asks for: the run's folder, and which of its checkpoints."""

    run_dir: Path
    which: str  # latest, best, or the name of a step's folder


def find_resumption(resume: str | None, exp_dir: str | Path | None) -> Resumption | None:
    """Where a run goes on; None where one is to be started."""
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
            raise ConfigError(f"-e {exp_dir} and -r {resume} name different runs; a run goes on in its own folder")
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir} holds no run to resume (no config.yaml)")
    if not committed_checkpoints(run_dir):
        raise RunError(f"{run_dir} has no checkpoint to resume from; -r auto would start the run")
    return Resumption(run_dir, which)


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
                if not may_hold_a_run and ((path / "config.yaml").exists() or (path / "ckpt").exists()):
                    raise ConfigError(f"{path} holds a run; -r latest goes on with it, another -e starts a new one")
        except OSError as error:
            raise RunError(f"{exp_dir or 'runs'}: the run folder can't be made ({error.strerror})") from error
        folder = cls(path, is_new=True, _made=made)
        folder._take_lock()
        folder._remove_leftovers()
        return folder

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        folder = cls(path, is_new=False)
        folder._take_lock()
        folder._remove_leftovers()
        return folder

    def _remove_leftovers(self) -> None:
        """Temporary folders of saves that were cut off; a run that was killed in its first save is started again."""
        for leftover in (self.path / "ckpt").glob(".*"):
            remove_tree(leftover)

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
        """Leave nothing behind of a run that never began."""
        (self.path / ".lock").unlink()
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # something is in it, so it isn't ours to remove
                return

    def write(self, name: str, text: str) -> None:
        """Replace a file in one step, so that no reader ever sees half of it."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}")
        part.write_text(text)
        part.replace(target)

    def write_json(self, name: str, values: Any) -> None:
        self.write(name, json.dumps(finite(values), indent=2) + "\n")


def take_lock(path: Path) -> IO | None:
    """The open file, locked until it is closed or the process ends, however that ends; None where another process has the lock.
    Not flock: worker processes would inherit it and outlive us."""
    file = path.open("a+")
    try:
        import fcntl
    except ImportError:  # Windows, where nothing guards a run folder
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON doesn't have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make(path: Path, made: list[Path], *, exist_ok: bool = True) -> None:
    """Make `path` and its parents, noting which of them are new."""
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
        except FileExistsError:  # another run of this second
            continue
        return parent / f"{name}{suffix}"
    raise FileExistsError(f"a thousand runs began in this second, {name}")


def remove_tree(path: Path) -> None:
    """Remove what is there, links not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    with os.scandir(path) as entries:
        for entry in entries:
            remove_tree(Path(entry.path))
    path.rmdir()
