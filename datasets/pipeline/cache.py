"""Cache decoded datasets as safetensors next to their files, which loads in a fraction of the time.

A cache is valid while every file has the same size and modification time and the cache's own checksum matches. One written
without verification isn't used where verification is requested.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datasets.pipeline.splits import Images, Loaded

log = logging.getLogger(__name__)

LAYOUT = 1  # of the cache; another number invalidates older ones


def load_cached(cache: Path, files: Sequence[Path], *, verify: bool, read: Callable[[], Loaded]) -> Loaded:
    """Load the dataset from `cache`, or call `read`, which reads `files`, and write the cache."""
    stamp = json.dumps([LAYOUT, *((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)])
    loaded = _read_cache(cache, stamp, verify)
    if loaded is None:
        loaded = read()
        _write_cache(cache, stamp, verify, loaded)
    return loaded


def _read_cache(cache: Path, stamp: str, verify: bool) -> Loaded | None:
    if not cache.is_file():
        return None
    try:
        with safe_open(cache, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("stamp") != stamp or (verify and facts.get("verified") != "true"):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        if facts["checksum"] != _checksum(tensors):
            return None
        train, test = (Images(tensors[f"{part}_images"], tensors[f"{part}_labels"]) for part in ("train", "test"))
        return Loaded(train, test, tuple(json.loads(facts["classes"])))
    except (SafetensorError, KeyError, ValueError, OSError):  # a damaged cache: the dataset's files are read instead
        return None


def _write_cache(cache: Path, stamp: str, verify: bool, loaded: Loaded) -> None:
    tensors = {
        f"{part}_{kind}": getattr(getattr(loaded, part), kind) for part in ("train", "test") for kind in ("images", "labels")
    }
    facts = {
        "stamp": stamp,
        "verified": json.dumps(verify),
        "checksum": _checksum(tensors),
        "classes": json.dumps(loaded.classes),
    }
    part = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        save_file(tensors, part, facts)
        part.chmod(part.parent.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
        part.replace(cache)
    except (OSError, SafetensorError) as error:
        log.info("%s can't be written (%s); the dataset is read from its files each time", cache, error)
        part.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().view(-1).numpy().data, value)
    return str(value)
