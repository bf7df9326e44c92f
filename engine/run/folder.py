"""The folder of one run: its files, its lock, and where its checkpoints are."""

import errno
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from engine.config import yaml12
from engine.config.errors import ConfigError, RunError

log = logging.getLogger(__name__)

T = TypeVar("T", dict[str, Any], list[Any])

STEP_FOLDER = re.compile(r"step-(\d{6,})")
MANIFEST, CLASSES, ENVIRONMENT, CONFIG, LOCK = "manifest.json", "classes.json", "environment.json", "config.yaml", ".lock"
CATEGORY_IDS = "category_ids.json"  # of a detector whose data have other ids than the numbers of its classes
THRESHOLDS = "thresholds.json"  # of a multi-label task
FILES = (CONFIG, ENVIRONMENT, CLASSES, CATEGORY_IDS, THRESHOLDS, "output.log", "metrics.jsonl", "results.json", "trackers.json")
FOLDERS = ("tensorboard", "figures", "profile", "samples")
WITHOUT = {  # a file that can be replaced -> what follows from its damage
    ENVIRONMENT: "the plugins and the machine of earlier sessions are unknown",
    CLASSES: "the classes come from the data",
    THRESHOLDS: "the threshold of every class is 0.5",
    "trackers.json": "the trackers start new runs",
    "results.json": "the end of the run is repeated",
}
LEFTOVERS = {  # folder -> the names of what a killed process leaves in it
    ".": re.compile(rf"\.({'|'.join(map(re.escape, FILES))})\.\d+"),
    "ckpt": re.compile(r"\.step-\d{6,}\.(\d+|pruned)|\.(latest|best)(\.\d+)?"),
    "figures": re.compile(r"\.[\w-]+\.png\.\d+"),
    "samples": re.compile(r"\.[\w-]+\.npz\.\d+"),
}

# models.loading.files is imported inside functions: it loads torch, which --help does without.


def step_folders(run_dir: Path) -> list[Path]:
    """Return the folders of a run that have the name of a checkpoint, oldest first."""
    named = [folder for folder in (run_dir / "ckpt").glob("step-*") if STEP_FOLDER.fullmatch(folder.name)]
    folders = (folder for folder in named if folder.is_dir() and not folder.is_symlink())
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def committed_checkpoints(run_dir: Path) -> list[Path]:
    """Return the step folders of a run that have a manifest, oldest first. `read_checkpoint` tells whether they are intact."""
    return [folder for folder in step_folders(run_dir) if (folder / MANIFEST).is_file()]


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`, or that run's best one, or its latest if none was evaluated."""
    path = path.expanduser()
    newest = committed_checkpoints(path)[-1:]
    candidates = (path, path / "ckpt" / "best", path / "ckpt" / "latest", *newest)
    found = next((folder for candidate in candidates if (folder := checkpoint_at(candidate))), None)
    if found is None:
        raise RunError(f"{path} is neither a run folder with a checkpoint nor a checkpoint")
    if os.path.lexists(found.parent.parent / CONFIG):  # not for a checkpoint that was copied to some other folder
        require_plain_files(found.parent.parent)
        read_config(found.parent.parent)
    return found


def checkpoint_at(path: Path) -> Path | None:
    """Return the checkpoint that `path` is or refers to, as `latest` does. `ckpt` in it may be a link to another disk."""
    from models.loading.files import linked_folder

    path = Path(os.path.abspath(path))
    folder = linked_folder(path) if path.name in ("latest", "best") else path
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    return folder if (folder.parent.parent / CONFIG).is_file() else folder.resolve()


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
        run_dir, which = Path(exp_dir).expanduser(), "best" if resume == "best" else "latest"
        if resume == "auto" and not step_folders(run_dir):
            return None
    else:
        path = Path(resume).expanduser()
        if not path.exists():
            raise ConfigError(f"-r {resume}: no such run folder or checkpoint")
        checkpoint = checkpoint_at(path)
        run_dir, which = (checkpoint.parent.parent, checkpoint.name) if checkpoint else (path, "latest")
        if exp_dir is not None and Path(exp_dir).resolve() != run_dir.resolve():
            raise ConfigError(f"-e {exp_dir} and -r {resume} name different runs; a run continues in its own folder")
    if not os.path.lexists(run_dir / CONFIG):
        remedy = "; copy it back, or give another -e to start a run" if step_folders(run_dir) else ""
        raise ConfigError(f"{run_dir} has no run to resume (no config.yaml){remedy}")
    require_plain_files(run_dir)
    if not committed_checkpoints(run_dir):
        if step_folders(run_dir):
            _refuse_uncommitted(run_dir)
        raise ConfigError(f"{run_dir} has no checkpoint to resume from; -r auto would start the run")
    read_config(run_dir)
    return Resumption(run_dir, which)


def _refuse_uncommitted(run_dir: Path) -> NoReturn:
    raise RunError(
        f"{run_dir / 'ckpt'} holds step folders, and no {MANIFEST} in any of them; "
        "copy the manifests back to resume, or move the step folders away to start again"
    )


def require_plain_files(run_dir: Path) -> None:
    """Raise RunError if a file or folder of a run is a symlink, pipe or device: using it would reach outside the run folder.

    `ckpt` itself may be a link to another disk, and `latest` and `best` in it are links.
    """
    ckpt = run_dir / "ckpt"
    if os.path.lexists(ckpt) and not ckpt.is_dir():
        raise RunError(f"{ckpt} is not a folder{', or its disk is not mounted' if ckpt.is_symlink() else ''}")
    files, folders = [run_dir / name for name in (*FILES, LOCK)], [run_dir / name for name in (*FOLDERS, "wandb")]
    steps = [path for path in ckpt.glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
    for folder in (*folders[:-1], *steps, ckpt / "set-aside"):
        folders.append(folder)
        for parent, names_of_folders, names in os.walk(folder):
            folders += [Path(parent, name) for name in names_of_folders]
            files += [Path(parent, name) for name in names]
    for path, is_kind in (*((file, Path.is_file) for file in files), *((folder, Path.is_dir) for folder in folders)):
        if os.path.lexists(path) and (path.is_symlink() or not is_kind(path)):
            kind = "a symlink" if path.is_symlink() else f"not a {'file' if path in files else 'folder'}"
            raise RunError(f"{path} is {kind}; a run folder has regular files and folders only, so that nothing else is changed")


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return a run's config.yaml as plain values: it is complete, so it needs no resolving."""
    from models.loading.files import read_limited

    path = run_dir / CONFIG
    remedy = f'; its values are in {MANIFEST} of each checkpoint, under "config"'
    try:
        values = yaml12.parse(read_limited(path, follow_link=False).decode())
    except OSError as error:
        raise RunError(f"{path} can't be read ({error.strerror or error})") from error
    except ValueError as error:
        raise RunError(f"{path}: {error}{remedy}") from error
    if not isinstance(values, dict) or not values:
        raise RunError(f"{path} is empty or not a mapping of keys to values{remedy}")
    return values


def read_replaceable(run_dir: Path, name: str, kind: type[T]) -> T:
    """Return the value in a JSON file of a run; an empty one if the file is missing or, with a warning, if it is damaged."""
    from models.loading.files import MalformedFile, read_json, warn_once

    path = run_dir / name
    try:
        value = read_json(path, follow_link=False)
        if not isinstance(value, kind):
            raise MalformedFile(path, f"it is not a JSON {'object' if kind is dict else 'array'}")
        return value
    except FileNotFoundError:
        return kind()
    except OSError as error:
        warn_once(f"{error}; {WITHOUT[name]}")
        return kind()


def plugins_in(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plugins in the content of environment.json: the path of each, with its digest."""
    plugins = environment.get("plugins")
    return plugins if isinstance(plugins, dict) else {}


@dataclass
class RunFolder:
    path: Path
    is_new: bool
    _lock: IO | None = field(default=None, repr=False)
    _made: list[Path] = field(default_factory=list, repr=False)
    _found: tuple[str, ...] = field(default=(), repr=False)  # files that were there before

    @classmethod
    def start(cls, exp_dir: str | Path | None, *, may_hold_a_run: bool = False) -> "RunFolder":
        """Make and lock the folder of a new run. Files of a run that this program did not write are never touched.

        A run that was killed before its first checkpoint may start again. Its lock file shows that its files are a run's, even if
        it has no config.yaml yet.
        """
        made: list[Path] = []
        try:
            if exp_dir is None:
                path = _make_by_time(Path("runs"), made)
            else:
                path = Path(exp_dir).expanduser()
                if path.is_file():
                    raise ConfigError(f"-e {exp_dir} is a file; a run needs a folder")
                _make(path, made)
                require_plain_files(path)
                is_run = (path / LOCK).is_file() or all((path / name).is_file() for name in (CONFIG, ENVIRONMENT))
                found = [name for name in (*FILES, *FOLDERS) if (path / name).exists()]
                if found and not is_run:
                    remedy = "give -e another one, so that nothing here is lost"
                    raise ConfigError(f"{path} has {', '.join(found)} and is not a run folder; {remedy}")
                if not may_hold_a_run and ((path / CONFIG).exists() or step_folders(path)):
                    raise ConfigError(f"{path} already has a run; -r latest continues it, another -e starts a new one")
                if step_folders(path):
                    _refuse_uncommitted(path)
        except OSError as error:
            raise RunError(f"{exp_dir or 'runs'}: the run folder can't be made ({error.strerror})") from error
        return cls(path, is_new=True, _made=made, _found=tuple(name for name in FILES if (path / name).exists()))._locked()

    @classmethod
    def reopen(cls, path: Path) -> "RunFolder":
        require_plain_files(path)
        return cls(path, is_new=False)._locked()

    def _locked(self) -> "RunFolder":
        """Take the lock, and remove the temporary files and folders of a process that was killed."""
        self._take_lock()
        for folder, name in LEFTOVERS.items():
            for path in (self.path / folder).glob(".*"):
                if name.fullmatch(path.name):
                    remove_tree(path)
        return self

    def _take_lock(self) -> None:
        try:
            self._lock = take_lock(self.path / LOCK)
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
        for name in (LOCK, *(name for name in FILES if name not in self._found)):
            (self.path / name).unlink(missing_ok=True)
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # it holds something else by now, so it isn't ours to remove
                return

    def write(self, name: str, text: str) -> None:
        """Replace a file, so that a reader never sees half of it and a crash leaves the old or the new content."""
        from models.loading.files import replace_file

        replace_file(self.path / name, text.encode())

    def write_json(self, name: str, values: Any) -> None:
        self.write(name, json.dumps(finite(values), indent=2) + "\n")


def take_lock(path: Path) -> IO | None:
    """Return the file, locked until it is closed or the process ends; None if another process holds the lock.

    Not by flock: worker processes would inherit that lock and outlive this one.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "r+")
    try:
        import fcntl
    except ImportError:  # Windows, where a run folder has no lock
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return None
        log.warning("%s: this file system has no locks (%s); start no second process here", path, error.strerror)
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
