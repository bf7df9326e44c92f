"""Checkpoints: saved whole or not at all, and verified before they are read.

A checkpoint is written into a temporary folder, flushed, given a manifest with the sha256 of every file and of the manifest
itself, and renamed. `latest` and `best` are links to committed folders, or text files with their names on a disk without links.
Loading verifies every digest before anything is parsed, and reads tensors and plain values only.
"""

import errno
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.config.errors import RunError
from engine.run.folder import MANIFEST, STEP_FOLDER, committed_checkpoints, remove_tree, step_folders
from engine.run.samples import prune_samples
from models.loading.files import (
    MalformedFile,
    fsync_folder,
    linked_folder,
    open_regular,
    read_json,
    replace_file,
    temporary,
    warn_once,
)
from models.loading.tensors import ForbiddenContent, load_pickled, load_safetensors

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
T = TypeVar("T")

MAX_FAILED_SAVES = 3  # in a row
WEIGHTS, EMA_WEIGHTS, TRAIN_STATE = "model.safetensors", "model_ema.safetensors", "train_state.pt"
FORMAT = 1  # of the manifest; 0 had no format and no config
MAX_MANIFEST = 1_000_000  # bytes
NO_SYMLINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # exFAT, Windows


class InvalidCheckpoint(RunError):
    """A folder that is not an intact checkpoint."""


class NewerFormat(InvalidCheckpoint):
    """A checkpoint of a newer version of this program."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    weights: Tensors
    train_state: dict[str, Any]
    ema_weights: Tensors | None = None
    config: dict[str, Any] | None = None  # key -> value, dotted; None in old checkpoints
    data: dict[str, Any] | None = None  # fingerprint of the data; None in old checkpoints


class Checkpoints:
    def __init__(self, run_dir: Path, keep_last: int, config: Mapping[str, Any] | None = None) -> None:
        self.run_dir, self.folder, self.keep_last, self.config = run_dir, run_dir / "ckpt", keep_last, config
        self.data: Mapping[str, Any] | None = None  # the fingerprint of the data, known once they are read
        self.failed_saves = 0  # in a row

    def save(
        self, step: int, weights: Tensors, train_state: dict[str, Any], best_step: int | None, ema_weights: Tensors | None = None
    ) -> None:
        """Commit step `step`, point the links to it, and prune what is older. A step that is committed already stays as it is."""
        target = self.folder / f"step-{step:06d}"
        if target.exists() and not (target / MANIFEST).is_file():
            self._set_aside(target, f"it has no {MANIFEST}")
        if not target.exists():
            self.folder.mkdir(exist_ok=True)
            part = temporary(target)
            try:
                files = {WEIGHTS: partial(_write_weights, weights), TRAIN_STATE: partial(_write_state, train_state)}
                if ema_weights is not None:
                    files[EMA_WEIGHTS] = partial(_write_weights, ema_weights)
                if part.exists():
                    remove_tree(part)
                part.mkdir()
                with ThreadPoolExecutor(len(files)) as pool:  # hashes one file while another is written
                    digests = {name: pool.submit(_flushed, write, part / name) for name, write in files.items()}
                manifest: dict[str, Any] = {"format": FORMAT, "step": step}
                manifest["files"] = {name: digest.result() for name, digest in digests.items()}
                manifest |= {"config": self.config, "data": self.data}
                manifest["digest"] = _manifest_digest(manifest)
                content = json.dumps(manifest, indent=2).encode()
                _flushed(lambda path: path.write_bytes(content), part / MANIFEST)
                fsync_folder(part)
                part.rename(target)
                fsync_folder(self.folder)
            except BaseException:
                if part.exists():
                    remove_tree(part)
                raise
        self._link(step, best_step)
        for path in committed_checkpoints(self.run_dir)[: -self.keep_last]:
            if best_step is None or path.name != f"step-{best_step:06d}":
                removed = path.with_name(f".{path.name}.pruned")
                path.rename(removed)
                remove_tree(removed)
        prune_samples(self.run_dir)

    def save_or_warn(self, step: int, save: Callable[[], None], *, must: bool) -> None:
        """Run `save`. A disk that is full for a while does not end the training, unless this save is the last chance (`must`)."""
        try:
            save()
            self.failed_saves = 0
        except OSError as error:
            self.failed_saves += 1
            problem = f"step {step} could not be saved: {error}"
            if must or self.failed_saves == MAX_FAILED_SAVES:
                times = "" if must else f", the {MAX_FAILED_SAVES}rd time in a row"
                raise RunError(f"{problem}{times}; {self.last_good()}") from error
            log.warning("%s; training goes on, %s", problem, self.last_good())

    def last_good(self) -> str:
        newest = linked_folder(self.folder / "latest") or next(reversed(committed_checkpoints(self.run_dir)), None)
        return f"the last good checkpoint is {newest.resolve()}" if newest else "there is no checkpoint yet"

    def load(self, which: str) -> Checkpoint:
        """Read `latest`, `best` or a step's folder; if the latest is damaged, the newest that is intact."""
        if which != "latest":
            path = linked_folder(self.folder / which)
            if path is None:
                raise RunError(f"{self.folder} has no {which}; -r latest continues from the newest checkpoint")
            return read_checkpoint(path)
        for path in reversed(committed_checkpoints(self.run_dir)):
            try:
                return read_checkpoint(path)
            except NewerFormat:
                raise
            except InvalidCheckpoint as error:
                log.warning("%s; trying the one before", error)
        raise RunError(f"{self.folder} holds no valid checkpoint")

    def rewind(self, step: int, best_step: int | None) -> None:
        """Set aside later checkpoints, because the run takes another course from `step` on, and folders without a manifest."""
        for path in step_folders(self.run_dir):
            if not (path / MANIFEST).is_file():
                self._set_aside(path, f"it has no {MANIFEST}")
            elif int(path.name.removeprefix("step-")) > step:
                self._set_aside(path, f"the run continues from step {step}")
        prune_samples(self.run_dir)
        self._link(step, best_step)

    def _set_aside(self, path: Path, reason: str) -> None:
        aside = self.folder / "set-aside"
        aside.mkdir(exist_ok=True)
        n = next(n for n in count() if not (aside / f"{path.name}-{n}").exists())
        path.rename(aside / f"{path.name}-{n}")
        log.warning("%s is set aside, because %s", path, reason)

    def _link(self, latest: int, best: int | None) -> None:
        """Point `latest`, and `best` if there is one, to the folders of these steps."""
        for name, step in (("latest", latest), ("best", best)):
            if step is None or (name == "best" and not (self.folder / f"step-{step:06d}").exists()):
                continue
            link, target = self.folder / name, f"step-{step:06d}"
            if link.is_dir() and not link.is_symlink():
                self._set_aside(link, "it is a copy of a checkpoint instead of a link to one")
            part = temporary(link)
            part.unlink(missing_ok=True)
            try:
                part.symlink_to(target, target_is_directory=True)
            except OSError as error:
                if error.errno not in NO_SYMLINKS:
                    raise
                problem = f"{self.folder} can't hold links ({error.strerror})"
                warn_once(f"{problem}; latest and best are text files with a folder's name")
                replace_file(link, f"{target}\n".encode())
            else:
                part.replace(link)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder, after verifying every byte of it against its manifest. Each file is read once."""
    try:
        manifest = _read_manifest(path / MANIFEST)
        files: dict[str, bytes] = {}
        for name, sha256 in manifest["files"].items():
            with open_regular(path / name, follow_link=False) as file:
                files[name] = file.read()
            if hashlib.sha256(files[name]).hexdigest() != sha256:
                raise MalformedFile(path / name, "it is damaged (its sha256 differs from the manifest's)")
        train_state = _parsed(path / TRAIN_STATE, files, lambda content: load_pickled(io.BytesIO(content)))
        weights = _parsed(path / WEIGHTS, files, load_safetensors)
        ema_weights = _parsed(path / EMA_WEIGHTS, files, load_safetensors) if EMA_WEIGHTS in files else None
        if not isinstance(train_state, dict):
            raise MalformedFile(path / TRAIN_STATE, "it is not a mapping")
        about = manifest.get("config"), manifest.get("data")
        return Checkpoint(path, manifest["step"], weights, train_state, ema_weights, *about)
    except MalformedFile as error:
        raise InvalidCheckpoint(str(error)) from error
    except OSError as error:
        raise InvalidCheckpoint(f"{error.filename or path} can't be read ({error.strerror})") from error
    except ForbiddenContent as error:
        problem = f"it holds more than tensors and plain values ({error}), and loading it could run code"
        raise InvalidCheckpoint(f"{path} is refused: {problem}") from error
    except MemoryError as error:
        raise InvalidCheckpoint(f"{path} is too large for this machine's memory") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest whose digest is right, and whose values have the right types."""
    manifest = read_json(path, MAX_MANIFEST, follow_link=False)
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _manifest_digest(manifest):
        raise MalformedFile(path, "it is damaged (wrong digest)")
    version, step, files = (manifest.get(key) for key in ("format", "step", "files"))
    if type(version) is int and version > FORMAT:
        problem = f"a newer version of this program wrote it; this one reads manifests up to format {FORMAT}"
        raise NewerFormat(f"{path} has format {version}: {problem}")
    named = STEP_FOLDER.fullmatch(path.parent.name)
    is_valid = version is None or (type(version) is int and version >= 0)
    is_valid &= type(step) is int and step >= 0 and (named is None or int(named[1]) == step)
    is_valid &= all(isinstance(manifest.get(key), (dict, NoneType)) for key in ("config", "data"))
    is_valid &= isinstance(files, dict) and {WEIGHTS, TRAIN_STATE} <= files.keys() <= {WEIGHTS, TRAIN_STATE, EMA_WEIGHTS}
    if not is_valid or not all(isinstance(sha256, str) for sha256 in manifest["files"].values()):
        raise MalformedFile(path, "it is not the manifest of this step")
    return manifest


def _parsed(path: Path, files: dict[str, bytes], load: Callable[[bytes], T]) -> T:
    try:
        return load(files.pop(path.name))
    except ForbiddenContent:
        raise
    except ValueError as error:
        raise MalformedFile(path, str(error)) from error


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flushed(write: Callable[[Path], Any], path: Path) -> str:
    """Write a file, fsync it, and return its sha256."""
    write(path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def _write_weights(weights: Tensors, path: Path) -> None:
    """Write weights. safetensors refuses tensors that share memory, as tied weights do; each gets its own copy."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        separate[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_tensors(separate, path)


def _write_state(train_state: dict[str, Any], path: Path) -> None:
    buffer = io.BytesIO()  # torch.save to a file takes three times as long
    torch.save(train_state, buffer)
    path.write_bytes(buffer.getbuffer())


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of its folder, not only for the owner; a full disk raises OSError."""
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with suppress(PermissionError):  # a disk without permissions
        path.chmod(path.parent.stat().st_mode & 0o666)
