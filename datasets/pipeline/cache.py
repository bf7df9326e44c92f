"""Cache decoded datasets as safetensors next to their files, which loads in a fraction of the time.

A cache is valid while every file has the same size and modification time and the cache's own checksum matches. One written
without verification isn't used where verification is requested.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datasets.pipeline.splits import Images, Loaded
from models.loading.files import MalformedFile, first_line, open_regular, replace_file

log = logging.getLogger(__name__)

LAYOUT = 3  # of the cache; another number invalidates older ones
PARTS, KINDS = ("train", "test"), ("images", "labels")
TENSORS = tuple(f"{part}_{kind}" for part in PARTS for kind in KINDS)


def load_cached(cache: Path, files: Sequence[Path], *, channels: int, verify: bool, read: Callable[[], Loaded]) -> Loaded:
    """Load the dataset from `cache`, or call `read`, which reads `files`, and write the cache."""
    stamp = json.dumps([LAYOUT, *((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)])
    if (loaded := _read_cache(cache, stamp, channels, verify)) is not None:
        return loaded
    loaded = read()
    tensors = {f"{part}_{kind}": getattr(getattr(loaded, part), kind) for part in PARTS for kind in KINDS}
    classes = json.dumps(loaded.classes)
    facts = {"stamp": stamp, "verified": json.dumps(verify), "checksum": _checksum(tensors, classes), "classes": classes}

    def write(path: Path) -> None:
        save_file(tensors, path, facts)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read

    try:
        replace_file(cache, write)
    except (OSError, SafetensorError) as error:
        log.info("%s can't be written (%s); the dataset is read from its files each time", cache, error)
    return loaded


def _read_cache(cache: Path, stamp: str, channels: int, verify: bool) -> Loaded | None:
    try:
        open_regular(cache).close()
        with safe_open(cache, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("stamp") != stamp or (verify and facts.get("verified") != "true"):
                return None
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        classes = json.loads(facts["classes"])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are not a list of names")
        train, test = (Images(tensors[f"{part}_images"], tensors[f"{part}_labels"]) for part in PARTS)
        for split in (train, test):
            images, labels = split.images, split.labels
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels or not images.numel():
                raise ValueError(f"its images are not N x {channels} x H x W bytes")
            fits = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
            if not fits or not 0 <= labels.min() <= labels.max() < len(classes):
                raise ValueError("its labels are not a class for each image")
        if train.images.shape[1:] != test.images.shape[1:]:
            raise ValueError("its splits have images of different sizes")
        if facts["checksum"] != _checksum(tensors, facts["classes"]):
            raise ValueError("its checksum is wrong")
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
        log.warning("%s is damaged (%s); the dataset's files are read instead", cache, first_line(str(error)))
        return None
    return Loaded(train, test, tuple(classes))


def _checksum(tensors: dict[str, Tensor], classes: str) -> str:
    value = zlib.crc32(classes.encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().view(-1).numpy().data, value)
    return str(value)


def cache_paths(file: Path, ending: str) -> tuple[Path, Path]:
    """Return the two places for a cache of a file: beside it or, where that folder isn't writable, in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "image-backbones"
    digest = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:16]
    return file.with_name(f".{file.name}{ending}"), home / f"{digest}{ending}"


def write_first(caches: Sequence[Path], write: bytes | Callable[[Path], Any]) -> list[OSError]:
    """Write the first of these caches that can be written. Return the errors of those before it, one for each."""
    errors: list[OSError] = []
    for cache in caches:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            replace_file(cache, write)
            break
        except MalformedFile:  # of what is copied: another folder would not help
            raise
        except OSError as error:
            errors.append(error)
    return errors
