"""Checkpoints: saved whole or not at all, and verified before they are read.

A checkpoint is written into a temporary folder, flushed, given a manifest with the sha256 of every file and of the manifest
itself, and renamed. `latest` and `best` are links to committed folders. Loading verifies every digest before anything is parsed,
and reads tensors and plain values only.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.config.errors import RunError
from engine.run.folder import MANIFEST, committed_checkpoints, remove_tree

log = logging.getLogger(__name__)

Bytes = bytes | mmap

MAX_FAILED_SAVES = 3  # in a row
WEIGHTS, EMA_WEIGHTS, TRAIN_STATE = "model.safetensors", "model_ema.safetensors", "train_state.pt"


class InvalidCheckpoint(Exception):
    """A folder that is not an intact checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    weights: dict[str, Tensor]
    train_state: dict[str, Any]
    ema_weights: dict[str, Tensor] | None = None

    def weights_of(self, *, averaged: bool) -> dict[str, Tensor]:
        if not averaged:
            return self.weights
        if self.ema_weights is None:
            raise RunError(f"{self.path} has no averaged weights; train.ema makes them")
        return self.ema_weights


class Checkpoints:
    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self.run_dir, self.folder, self.keep_last = run_dir, run_dir / "ckpt", keep_last
        self.failed_saves = 0  # in a row

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        train_state: dict[str, Any],
        best_step: int | None,
        ema_weights: dict[str, Tensor] | None = None,
    ) -> None:
        """Commit step `step`, point the links to it, and prune what is older. A step that is committed already stays as it is."""
        target = self.folder / f"step-{step:06d}"
        if not target.exists():
            self.folder.mkdir(exist_ok=True)
            part = self.folder / f".{target.name}.{os.getpid()}"
            try:
                files = {WEIGHTS: partial(_write_weights, weights), TRAIN_STATE: partial(_write_state, train_state)}
                if ema_weights is not None:
                    files[EMA_WEIGHTS] = partial(_write_weights, ema_weights)
                _write(part, step, files)
                part.rename(target)
                _flush(self.folder)
            except BaseException:
                if part.exists():
                    remove_tree(part)
                raise
        self._link_both(step, best_step)
        self._prune(keep_also=best_step)

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
        latest = self.folder / "latest"
        return f"the last good checkpoint is {latest.resolve()}" if latest.exists() else "there is no checkpoint yet"

    def load(self, which: str) -> Checkpoint:
        """Read `latest`, `best` or a step's folder; if the latest is damaged, the newest that is intact."""
        if which != "latest":
            try:
                return read_checkpoint((self.folder / which).resolve())
            except InvalidCheckpoint as error:
                raise RunError(str(error)) from error
        for path in reversed(committed_checkpoints(self.run_dir)):
            try:
                return read_checkpoint(path)
            except InvalidCheckpoint as error:
                log.warning("%s; trying the one before", error)
        raise RunError(f"{self.folder} holds no valid checkpoint")

    def rewind(self, step: int, best_step: int | None) -> None:
        """Move later checkpoints to set-aside/: the run takes another course from `step` on, or they are damaged."""
        for path in committed_checkpoints(self.run_dir):
            if int(path.name.removeprefix("step-")) > step:
                aside = self.folder / "set-aside"
                aside.mkdir(exist_ok=True)
                n = sum(1 for entry in aside.iterdir() if entry.name.startswith(path.name))
                path.rename(aside / f"{path.name}-{n}")
                log.warning("%s is set aside, because the run continues from step %d", path, step)
        self._link_both(step, best_step)

    def _link_both(self, latest: int, best: int | None) -> None:
        self._link("latest", latest)
        if best is not None and (self.folder / f"step-{best:06d}").exists():
            self._link("best", best)

    def _link(self, name: str, step: int) -> None:
        part = self.folder / f".{name}"
        part.unlink(missing_ok=True)
        part.symlink_to(f"step-{step:06d}", target_is_directory=True)
        part.replace(self.folder / name)

    def _prune(self, keep_also: int | None) -> None:
        keep = {f"step-{keep_also:06d}"} if keep_also is not None else set()
        for path in committed_checkpoints(self.run_dir)[: -self.keep_last]:
            if path.name not in keep:
                removed = path.with_name(f".{path.name}.pruned")
                path.rename(removed)
                remove_tree(removed)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder, after verifying every byte of it against its manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        digest = manifest.pop("digest")
        if digest != _manifest_digest(manifest):
            raise InvalidCheckpoint(f"{path / MANIFEST} is damaged (wrong digest)")
        files = {name: _read_verified(path / name, sha256) for name, sha256 in manifest["files"].items()}
        weights = safetensors.torch.load(files[WEIGHTS])
        ema_weights = safetensors.torch.load(files[EMA_WEIGHTS]) if EMA_WEIGHTS in files else None
        train_state = torch.load(io.BytesIO(files[TRAIN_STATE]), map_location="cpu", weights_only=True)
        return Checkpoint(path, manifest["step"], weights, train_state, ema_weights)
    except OSError as error:
        raise InvalidCheckpoint(f"{error.filename or path} can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"{path / MANIFEST} is not a manifest ({error})") from error
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError) as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        reason = f" ({forbidden[1]}), and loading it could run code" if forbidden else ""
        raise InvalidCheckpoint(f"{path} is refused: it holds more than tensors and plain values{reason}") from error


def _sha256(content: Bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_verified(path: Path, sha256: str) -> bytes:
    content = path.read_bytes()
    if _sha256(content) != sha256:
        raise InvalidCheckpoint(f"{path} is damaged (its sha256 differs from the manifest's)")
    return content


def _write(folder: Path, step: int, files: Mapping[str, Callable[[Path], None]]) -> None:
    if folder.exists():
        remove_tree(folder)
    folder.mkdir()
    with ThreadPoolExecutor(len(files)) as pool:  # hashes one file while another is written
        digests = {name: pool.submit(_flushed, write, folder / name) for name, write in files.items()}
    manifest = {"step": step, "files": {name: digest.result() for name, digest in digests.items()}}
    manifest["digest"] = _manifest_digest(manifest)
    content = json.dumps(manifest, indent=2).encode()
    _flushed(lambda path: path.write_bytes(content), folder / MANIFEST)
    _flush(folder)


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flushed(write: Callable[[Path], Any], path: Path) -> str:
    """Write a file, fsync it, and return its sha256."""
    write(path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return _sha256(content)


def _flush(folder: Path) -> None:
    if os.name == "nt":  # a folder can't be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_weights(weights: dict[str, Tensor], path: Path) -> None:
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
    path.chmod(path.parent.stat().st_mode & 0o666)
