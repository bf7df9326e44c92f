"""Tar files of samples, in the layout of WebDataset: 0001.jpg and 0001.cls, or 0001.json, one after the other.

https://github.com/webdataset/webdataset. Shards lie on a local disk and are not read as a stream: an index of each, made once,
lets workers read any image. So the order of a training and its resumption are exact, as those of any other dataset.
"""

import json
import logging
import os
import posixpath
import re
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from datasets.pipeline.cache import cache_paths, write_first
from datasets.pipeline.images import IMAGE_ENDINGS
from datasets.pipeline.labels import TEST, TRAIN, VALID, Labels, make_splits, part_of_name
from datasets.pipeline.places import part_of
from datasets.pipeline.splits import PHOTOGRAPHS, Files, Loaded, Source
from models.loading.files import MalformedFile, first_line, one_line, open_regular, read_json, read_limited, stays_inside

log = logging.getLogger(__name__)

LAYOUT = 1  # of an index; another number makes older ones invalid
MAX_INDEX, MAX_LABEL = 1 << 32, 1 << 20  # bytes
MAX_SHARDS = 100_000
BRACES = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
CHECKSUM = re.compile(rb"[\0 ]*([0-7]+)[\0 ]*")
N_CHECKED = 16  # entries of an index that are compared with the shard

Entry = tuple[str, int, int, Any]  # an image's name, where its bytes begin, their number, and its label or labels


def load(
    source: Source,
    *,
    several: bool,
    train_shards: str | None = None,
    val_shards: str | None = None,
    test_shards: str | None = None,
    label_key: str | None = None,
    test_ratio: float = 0.2,
) -> Loaded:
    """Shards are named by patterns, such as train-{000000..000146}.tar or train/*.tar; null: the split is the first word of the
    name of a shard or its folder. `label_key` is the label's key in a sample's .json; null: the label is its .cls. Without shards
    for validation or testing, `test_ratio` of the samples are held out, the same ones for the same seed."""
    shards = find_shards(source.root, {TRAIN: train_shards, VALID: val_shards, TEST: test_shards})
    labels, places, parts = Labels(several, "sample"), [], array("b")
    for part, shard in shards:
        found = []
        for name, offset, length, label in index_of(shard, label_key):
            if isinstance(label, list) and not several:
                raise labels.error(shard, name, "it has a list of labels, which only task: multilabel reads")
            labels.add(label if isinstance(label, list) else [label], shard, name)
            found.append(part_of(str(shard), offset, length, name))
        places.append(np.array(found))
        parts.extend([part] * len(found))
    targets, classes = labels.targets(class_names(source.root), source.n_classes)
    files = Files(np.concatenate(places), targets)
    return make_splits(files, np.frombuffer(parts, np.int8), classes, source, test_ratio, source.root)


def class_names(root: Path) -> tuple[str, ...] | None:
    """Return the names in classes.txt or classes.json, if there is one."""
    for path in (root / "classes.txt", root / "classes.json"):
        if path.exists():
            names = read_json(path) if path.suffix == ".json" else read_limited(path).decode(errors="replace").split("\n")
            is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
            names = [name.strip() for name in names if name.strip()] if is_list else []
            if not names or len(set(names)) < len(names):
                raise MalformedFile(path, "it is not a list of different names")
            return tuple(names)
    return None


def find_shards(root: Path, patterns: dict[int, str | None]) -> list[tuple[int, Path]]:
    """Return the shards with the split of each."""
    if any(patterns.values()):
        return [(part, shard) for part, pattern in patterns.items() if pattern is not None for shard in matching(root, pattern)]
    found = sorted(path for path in [*root.glob("*.tar"), *root.glob("*/*.tar")] if not path.name.startswith("."))
    if root.suffix == ".tar" and root.is_file():
        found = [root]
    if not found:
        packed = next((path for path in (*root.glob("*.tar.*"), *root.glob("*.tgz"), *root.glob("*/*.tar.*"))), None)
        if packed is not None:
            raise MalformedFile(packed, "a compressed shard can't be read in any order; decompress it (gunzip, zstd -d)")
        raise OSError(f"{root}: no shard; expected train-*.tar and val-*.tar, or train/*.tar and val/*.tar")
    named = [(part_of_name(path.name) if path.parent == root else part_of_name(path.parent.name), path) for path in found]
    with_part = [(part, path) for part, path in named if part is not None]
    if unused := [path for part, path in named if part is None and with_part]:
        n, first = len(unused), unused[0]
        log.warning("%s: %d shards are not used, as their names begin with no split's; the first is %s", root, n, first)
    return with_part or [(TRAIN, path) for path in found]


def matching(root: Path, pattern: str) -> list[Path]:
    """Return the files that a pattern means, of which {000..146} is a range and * any text."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(f"{pattern!r}: shards are files on a local disk; a URL or a command is not run")
    if not stays_inside(pattern):
        raise ValueError(f"{pattern!r} leads out of the data folder {root}")
    names = [pattern]
    while braces := BRACES.search(names[0]):
        first, last = braces.groups()
        if not 0 <= int(last) - int(first) < MAX_SHARDS // len(names):
            raise ValueError(f"{pattern!r}: the range is empty or has more than {MAX_SHARDS:,} shards")
        numbers = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
        names = [BRACES.sub(number, name, count=1) for name in names for number in numbers]
    found = [path for name in names for path in (sorted(root.glob(name)) if set(name) & set("*?[") else [root / name])]
    if missing := [path for path in found if not path.is_file()]:
        raise OSError(f"{missing[0]} is missing ({len(missing):,} of the {len(found):,} shards of {pattern!r})")
    if not found:
        raise OSError(f"{root}: there is no shard {pattern!r}")
    return found


def index_of(shard: Path, label_key: str | None) -> list[Entry]:
    """Return the entries of a shard, from its index or, if this is older or damaged, from its headers."""
    facts, caches = os.stat(shard), cache_paths(shard, ".index")
    stamp = [LAYOUT, facts.st_size, facts.st_mtime_ns, label_key]
    for cache in caches:
        if (entries := _read_index(cache, stamp, shard)) is not None:
            return entries
    entries = read_samples(shard, label_key)
    content = json.dumps([stamp, *(list(part) for part in zip(*entries, strict=True))]).encode()
    for cache, error in zip(caches, write_first(caches, content), strict=False):
        log.info("%s can't be written (%s)", cache, error.strerror)
    return entries


def _read_index(cache: Path, stamp: list[Any], shard: Path) -> list[Entry] | None:
    try:
        found, names, offsets, lengths, labels = read_json(cache, MAX_INDEX)
        if found != stamp:
            log.info("%s is of another state of its shard; it is made again", cache)
            return None
        begins, sizes = np.array(offsets), np.array(lengths)
        if not begins.dtype == sizes.dtype == np.int64 or not (begins.ndim == sizes.ndim == 1):
            raise ValueError("its offsets are not whole numbers")
        if (begins < 512).any() or (sizes < 1).any() or begins[-1] + sizes[-1] > stamp[1] or (np.diff(begins) < sizes[:-1]).any():
            raise ValueError("its offsets are not those of the shard")
        entries: list[Entry] = list(zip(names, offsets, lengths, labels, strict=True))
        os.fsencode("".join(names))  # TypeError or UnicodeEncodeError unless all are names
        with open_regular(shard) as file:
            for name, offset, length, _ in entries[:: 1 + len(entries) // N_CHECKED]:
                file.seek(offset - 512)
                header = file.read(512)
                has_name = not name.isascii() or len(name) > 100 or header[:100].rstrip(b"\0") == name.encode()
                if not has_name or number_in(header[124:136]) != length:
                    raise ValueError(f"{first_line(name)} is not where it says")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, IndexError) as error:
        log.warning("%s is damaged (%s); it is made again", cache, first_line(str(error)))
        return None
    return entries


def read_samples(shard: Path, label_key: str | None) -> list[Entry]:
    """Read the headers and labels of a shard. MalformedFile unless each image has a label, and each label an image."""
    label_ending = "cls" if label_key is None else "json"
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, Any] = {}
    log.info("%s: making its index, once", shard)
    with open_regular(shard) as file:
        for name, offset, length in members(shard, file):
            folder, base = posixpath.split(name)
            first, _, ending = base.partition(".")
            key, ending = posixpath.join(folder, first), ending.lower()
            is_image = f".{ending}" in IMAGE_ENDINGS
            if not first or not (is_image or ending == label_ending):
                continue
            if key in (images if is_image else labels) or not length:
                problem = f"the sample has this {'image' if is_image else 'label'} twice" if length else "it is empty"
                raise MalformedFile(shard, f"{one_line(name)}: {problem}")
            if is_image:
                images[key] = (name, offset, length)
                continue
            try:
                labels[key] = _label(file.read(length) if length <= MAX_LABEL else b"", label_key)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                what = "a whole number or a name" if label_key is None else f"JSON with the key {label_key!r}"
                raise MalformedFile(shard, f"{one_line(name)}: the label can't be read; expected {what}") from error
    for those, these, what in ((images, labels, "label"), (labels, images, "image")):
        if alone := [key for key in those if key not in these]:
            kind = f".{label_ending}" if what == "label" else " or ".join(IMAGE_ENDINGS)
            raise MalformedFile(shard, f"the sample {one_line(alone[0])} has no {what} ({kind}); {len(alone):,} such")
    if not images:
        raise MalformedFile(shard, f"it holds no sample, such as 0001.jpg and 0001.{label_ending}")
    return [(*image, labels[key]) for key, image in images.items()]


def _label(content: bytes, key: str | None) -> Any:
    if key is not None:
        return json.loads(content)[key]
    text = content.decode().strip()
    return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text


# The tar format (POSIX.1-1988, with the long names of GNU and POSIX.1-2001). tarfile needs twice as long, reads names of any
# length into memory, and mistakes a damaged header for the end.


def members(shard: Path, file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yield the name, offset and size of each file in a tar; `file` is then at its content."""
    total, at, extended = os.fstat(file.fileno()).st_size, 0, dict[bytes, bytes]()
    while True:
        file.seek(at)
        header = file.read(512)
        if header == bytes(512):
            break
        try:
            if len(header) < 512:
                raise ValueError("it ends without the end mark of a tar file, so it may be truncated")
            checksum = CHECKSUM.fullmatch(header[148:156])
            if checksum is None or int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                raise ValueError("there is no header of an uncompressed tar file")
            size, kind, prefix = number_in(header[124:136]), header[156:157], header[345:500].rstrip(b"\0")
            parts = (prefix if header[257:263] == b"ustar\0" else b"", header[:100].rstrip(b"\0"))
            name = os.fsdecode(extended.get(b"path", b"/".join(filter(None, parts))))
            size, begin = int(extended.get(b"size", size)), at + 512
            if not 0 <= size <= total - begin:
                raise ValueError(f"{name} is truncated")
            if kind in (b"x", b"L", b"g"):
                body = file.read(size) if size <= MAX_LABEL else b""
                if kind != b"g":  # a global header is a comment
                    extended |= _records(body) if kind == b"x" else {b"path": body.rstrip(b"\0")}
            elif kind not in (b"0", b"\0", b"5", b"7") or any(key.startswith(b"GNU.sparse") for key in extended):
                raise ValueError(f"{name} is a link, a sparse or a special file")
        except ValueError as error:
            raise MalformedFile(shard, f"byte {at:,}: {one_line(str(error))}") from error
        at = begin + -(-size // 512) * 512
        if kind in (b"0", b"\0", b"7"):
            yield name, begin, size
        if kind not in (b"x", b"L", b"g"):
            extended = {}
    if file.read(1 << 20).strip(b"\0"):
        raise MalformedFile(shard, f"byte {at:,}: there is more after the end mark; it was made of several tar files")


def number_in(field: bytes) -> int:
    """Return a number of a header: octal digits or, after a byte of 128, binary."""
    return int.from_bytes(field[1:], "big") if field[0] & 128 else int(field.strip(b"\0 ") or b"0", 8)


def _records(body: bytes) -> dict[bytes, bytes]:
    """Return the records of an extended header, each "<length> <key>=<value>\\n"."""
    found, at = dict[bytes, bytes](), 0
    while at < len(body.rstrip(b"\0")):
        digits = body[at : at + 8].split(b" ")[0]
        if not len(digits) + 2 < int(digits) <= len(body) - at:
            raise ValueError("an extended header is damaged")
        key, _, value = body[at + len(digits) + 1 : at + int(digits) - 1].partition(b"=")
        found[key], at = value, at + int(digits)
    return found


_SHARDS = partial(PHOTOGRAPHS, name="shards", img_size=224)

DATASETS = [_SHARDS(load=partial(load, several=False)), _SHARDS(load=partial(load, several=True), targets="labels")]
