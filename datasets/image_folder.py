"""A folder of images, one folder per class: train/<class>/*.jpg and val/<class>/*.jpg, the layout of ImageNet.

The validation folder may also be valid/ or validation/, and there may be test/. Without both, or without train/, a part of each
class is held out. Folders inside a class folder belong to the class. Links are followed; hidden files and folders are not read.

Olga Russakovsky et al. (2015): ImageNet Large Scale Visual Recognition Challenge. IJCV. https://arxiv.org/abs/1409.0575

The list of files is cached, in the data folder or else in the user's cache folder, and is valid until a folder changes.
"""

import io
import json
import logging
import os
import re
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from datasets.pipeline.cache import cache_paths, load_cached, write_first
from datasets.pipeline.cores import usable_cores
from datasets.pipeline.images import IMAGE_ENDINGS, PACKAGES, EvaluationImages, log_rotated
from datasets.pipeline.splits import PARTS, PHOTOGRAPHS, Files, Images, Loaded, Source, from_parts
from models.loading.files import MalformedFile, first_line, one_line, open_regular, read_limited, stays_inside

log = logging.getLogger(__name__)

IMG_SIZE = 224
WORDNET = re.compile(r"n\d{8}")
MAX_LIST = 1 << 30  # bytes of a file for data.exclude
RECENT = 2.0  # seconds; after a more recent change, another may follow with the same timestamp
MANY = 5  # of which a message names no more

Folders = dict[str, dict[str, Path]]  # the folder of each class, by split and name
Listing = dict[str, np.ndarray]  # of each split: names, relative to the data folder, and labels; stamp and unread, as JSON


def load(source: Source, *, in_memory: bool = False, exclude: str | None = None, test_ratio: float = 0.2) -> Loaded:
    """`exclude` names a file with one line for each image to skip, as tools/verify_dataset.py writes it.

    Without a folder for validation or test, `test_ratio` of each class is held out, the same images for the same seed.
    """
    root = source.root
    folders = class_folders(root)
    listing = _listing(root, folders)
    if unread := Counter[str](json.loads(str(listing["unread"]))):
        n = sum(unread.values())
        level = logging.WARNING if unread.keys() & PACKAGES.keys() else logging.INFO
        log.log(level, "%s: %s not read: %s", root, f"{n:,} file{'s' * (n > 1)}", _kinds(unread))
    if exclude is not None:
        listing = _without(listing, Path(exclude).expanduser(), folders)
    prefix = os.fsencode(root) + os.fsencode(os.sep)
    parts = {}
    for name, part in ((name, part) for name, parts_of in PARTS.items() for part in parts_of if part in folders):
        parts[name] = Files(np.char.add(prefix, listing[f"{part}_names"]), torch.from_numpy(listing[f"{part}_labels"]))
    loaded = from_parts(parts, class_names(tuple(folders["train"])), test_ratio, source.seed, by_class=True)
    return _read_into_memory(loaded, source) if in_memory else loaded


def class_folders(root: Path) -> Folders:
    """Return the class folders of each split by name; if there are no splits, those in `root` as train. OSError if a split has
    no class folders, or classes that train doesn't have.

    A folder with the name of a split is one if it holds folders. Where none is, it may be a class.
    """

    def folders_in(folder: Path) -> dict[str, Path]:
        return {name: folder / name for name in _entries(folder)[0]}

    at_root = folders_in(root) if root.is_dir() else {}
    inside = {part: folders_in(at_root[part]) for names in PARTS.values() for part in names if part in at_root}
    if not any(inside.values()) and not at_root.keys() <= inside.keys():
        return {"train": at_root}
    if inside.get("test") == {}:  # as in many competitions, its images have no labels
        del inside["test"]
    if unused := sorted(at_root.keys() - inside.keys()):
        log.info("%s: folders that are neither a split nor a class are not read: %s", root, _some(unused))
    expected = f"expected {root}/train/<class>/*.jpg and {root}/val/<class>/*.jpg, or {root}/<class>/*.jpg"
    if "train" not in inside:
        raise OSError(f"{root / 'train'}: no such folder; {expected}")
    if len(validation := [str(at_root[part]) for part in PARTS["val"] if part in inside]) > 1:
        raise OSError(f"{' and '.join(validation)}: there can be one folder for validation")
    for part, found in inside.items():
        if not found:
            raise OSError(f"{at_root[part]} holds no class folders; {expected}")
        if unknown := sorted(found.keys() - inside["train"].keys()):
            raise OSError(f"{found[unknown[0]]} is a class that {at_root['train']} doesn't have")
    return inside


def _entries(folder: Path | str) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files in a folder, sorted, without hidden ones."""
    folders, files = list[str](), list[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # false for a link to itself
                (folders if is_folder else files).append(entry.name)
    return sorted(folders), sorted(files)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MANY:,} more" if len(names) > MANY else ""
    return one_line(", ".join(names[:MANY])) + more


def class_names(folders: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words for folders that are all named by WordNet ids, as ImageNet's, else the names of the folders."""
    if not all(WORDNET.fullmatch(folder) for folder in folders):
        return folders
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    words = [info.label_name_to_description(folder).partition(",")[0] if folder in known else folder for folder in folders]
    counts = Counter(words)  # a crane is a bird and a machine
    return tuple(word if counts[word] == 1 else f"{word} ({folder})" for word, folder in zip(words, folders, strict=True))


def _listing(root: Path, folders: Folders) -> Listing:
    caches = cache_paths(root / "image-list", ".npz")
    for cache in caches:
        if (listing := _read_cache(cache, root, folders)) is not None:
            return listing
    listing, latest = _scan(root, folders)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **listing)  # type: ignore[arg-type]  # no part is called allow_pickle

    if latest / 1e9 < time.time() - RECENT and len(write_first(caches, write)) == len(caches):
        log.info("neither %s nor %s can be written; the folder is listed each time", *caches)
    return listing


def _scan(root: Path, folders: Folders) -> tuple[Listing, int]:
    """List the images as part/class/file, in arrays of bytes: a million strings would take many times the memory. Also return
    the time of the latest change of a folder."""
    listing: Listing = {}
    times: dict[str, int] = {}  # a folder's time changes when a file is added, removed or renamed
    unread: Counter[str] = Counter()
    numbers = {name: number for number, name in enumerate(folders["train"])}
    for part, of_class in folders.items():
        names, labels, part_folder = [], [], next(iter(of_class.values())).parent
        outside = [_ending(file) for file in _entries(part_folder)[1]]
        unread.update(f"{ending} outside of a class" for ending in outside if ending in IMAGE_ENDINGS)
        for name, folder in of_class.items():
            found, others = [], Counter[str]()
            for inside, time_ns, files in _tree(folder, above=(root, part_folder)):
                within = os.path.relpath(inside, root)
                times[within] = time_ns
                for file in files:
                    if (ending := _ending(file)) in IMAGE_ENDINGS:
                        found.append(os.fsencode(os.path.join(within, file)))
                    else:
                        others[ending] += 1
            if not found:
                raise OSError(f"{folder} holds no image ({', '.join(IMAGE_ENDINGS)}); not read: {_kinds(others) or 'nothing'}")
            names.append(np.array(found))
            labels.append(np.full(len(found), numbers[name], dtype=np.int64))
            unread += others
        listing |= {f"{part}_names": np.concatenate(names), f"{part}_labels": np.concatenate(labels)}
    stamp = {"endings": IMAGE_ENDINGS, "times": times}
    return listing | {"stamp": np.array(json.dumps(stamp)), "unread": np.array(json.dumps(unread))}, max(times.values())


def _tree(top: Path, above: tuple[Path, ...]) -> list[tuple[str, int, list[str]]]:
    """Return each folder from `top` down, with its time and the names of its files, in the order of torchvision's ImageFolder.

    A folder that several links lead to counts once, and those `above` don't count, so that a cycle of links ends.
    """
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, above)}
    found, waiting = [], [str(top)]
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files = _entries(folder)
        found.append((folder, status.st_mtime_ns, files))
        waiting += [os.path.join(folder, name) for name in reversed(folders)]
    return sorted(found)


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower() or "without an ending"


def _kinds(unread: Counter[str]) -> str:
    return _some([f"{n:,} {kind}" + (f" ({PACKAGES[kind]})" if kind in PACKAGES else "") for kind, n in unread.most_common()])


def _read_cache(cache: Path, root: Path, folders: Folders) -> Listing | None:
    try:
        with open_regular(cache) as file, zipfile.ZipFile(file) as archive:  # the checksums of a zip file are verified on reading
            if not _is_current(json.loads(str(_member(archive, "stamp"))), root, folders):
                return None
            names = ["unread", *(f"{part}_{kind}" for part in folders for kind in ("names", "labels"))]
            listing = {name: _member(archive, name) for name in names}
        _check(listing, root, folders)
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile and numpy raise exceptions of many types for a damaged file
        log.warning("%s is damaged (%s); the folders are listed again", cache, first_line(str(error)) or type(error).__name__)
        return None
    return listing


def _is_current(stamp: dict[str, Any], root: Path, folders: Folders) -> bool:
    """Return whether a list was made of these class folders, and none of the folders in them has changed since."""
    times = stamp.get("times", {})
    top = {os.path.relpath(path, root) for of_class in folders.values() for path in of_class.values()}
    if stamp.get("endings") != list(IMAGE_ENDINGS) or not top <= times.keys() or not all(map(stays_inside, times)):
        return False
    try:
        return all(os.stat(os.path.join(root, name)).st_mtime_ns == time_ns for name, time_ns in times.items())
    except OSError:
        return False


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array as np.savez writes it: not compressed, so that it has no more bytes than the file."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or not info.compress_size == info.file_size <= archive.start_dir:
        raise ValueError(f"{name} has not the size of its content")
    content = io.BytesIO(archive.read(info))
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError(f"{name} is written by another version of numpy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    return np.frombuffer(content.getbuffer()[content.tell() :], dtype).reshape(shape)


def _check(listing: Listing, root: Path, folders: Folders) -> None:
    """Raise ValueError unless each name is that of a file in the class folder of its label."""
    unread = json.loads(str(listing["unread"]))
    if not isinstance(unread, dict) or not all(type(n) is int for n in unread.values()):
        raise ValueError("unread is not a table of numbers")
    numbers = {name: number for number, name in enumerate(folders["train"])}
    for part, of_class in folders.items():
        names, labels = listing[f"{part}_names"], listing[f"{part}_labels"]
        if names.dtype.kind != "S" or labels.dtype != np.int64 or not names.shape == labels.shape == (names.size,):
            raise ValueError(f"{part} is not a list of names and labels")
        if (np.diff(labels) < 0).any() or np.unique(labels).tolist() != [numbers[name] for name in of_class]:
            raise ValueError(f"{part} has labels that are not those of its folders")
        letters = names.view(np.uint8).reshape(len(names), -1)
        ends_early = (letters[:, :-1] == 0) & (letters[:, 1:] != 0)
        # no part of a path is empty or begins with a dot
        next_letters = np.pad(letters, ((0, 0), (0, 1)))[:, 1:][letters == ord(os.sep)]
        if ends_early.any() or np.isin(next_letters, [0, ord("."), ord(os.sep)]).any():
            raise ValueError(f"{part} has names that are not those of files in its folders")
        for name, folder in of_class.items():
            first, last = np.searchsorted(labels, (numbers[name], numbers[name] + 1))
            prefix = os.fsencode(os.path.join(os.path.relpath(folder, root), ""))
            own = letters[first:last, : len(prefix)]
            if own.shape[1] < len(prefix) or (own != np.frombuffer(prefix, np.uint8)).any():
                raise ValueError(f"{part} has names outside of its folders")


def _without(listing: Listing, exclude: Path, folders: Folders) -> Listing:
    try:
        lines = read_limited(exclude, MAX_LIST).splitlines()
    except MalformedFile as error:
        raise OSError(f"data.exclude: {error}") from error
    except OSError as error:
        raise OSError(f"data.exclude: {exclude} can't be read ({error.strerror})") from error
    excluded = np.array([line for line in lines if line and not line.startswith(b"#")], dtype="S")
    kept: Listing = {}
    for part in folders:
        keep = ~np.isin(listing[f"{part}_names"], excluded)
        kept |= {f"{part}_{kind}": listing[f"{part}_{kind}"][keep] for kind in ("names", "labels")}
        emptied = np.setdiff1d(listing[f"{part}_labels"], kept[f"{part}_labels"])
        if len(emptied):
            raise OSError(f"{exclude} leaves no image of {part}/{tuple(folders['train'])[emptied[0]]}")
    n_skipped = sum(len(listing[name]) - len(kept[name]) for name in kept if name.endswith("_names"))
    if n_skipped < len(excluded):
        log.warning("%d of the %d files in %s are not in the dataset", len(excluded) - n_skipped, len(excluded), exclude)
    log.info("%d images are left out (data.exclude)", n_skipped)
    return kept


def _read_into_memory(loaded: Loaded, source: Source) -> Loaded:
    train, *others = splits = [split for split in (loaded.train, loaded.valid, loaded.test) if isinstance(split, Files)]
    size, n = source.img_size or IMG_SIZE, sum(map(len, splits))
    needed, available = n * 3 * size * size, psutil.virtual_memory().total
    if needed > available:
        sizes = f"take {needed / 1e9:.0f} GB; there are {available / 1e9:.0f}"
        raise OSError(f"data.in_memory: {n:,} images of {size}x{size} {sizes}")
    upright = source.exif_rotate
    if not upright:
        log_rotated(train.paths)
    # the cache has two splits; validation and test are one of them
    rest = Files(np.concatenate([split.paths for split in others]), torch.cat([split.labels for split in others]))
    cached = load_cached(
        source.root / f".cache-{size}{'-upright' if upright else ''}.safetensors",
        [Path(os.fsdecode(path)) for path in (*train.paths, *rest.paths)],
        channels=3,
        verify=False,
        read=lambda: replace(loaded, train=_in_memory(train, size, upright), test=_in_memory(rest, size, upright)),
    )
    assert isinstance(cached.test, Images)
    n_valid = len(rest) - len(loaded.test)
    valid, test = (Images(cached.test.images[part], cached.test.labels[part]) for part in (slice(n_valid), slice(n_valid, None)))
    return replace(loaded, train=cached.train, test=test, valid=valid if n_valid else None)


def _in_memory(files: Files, size: int, exif_rotate: bool) -> Images:
    """Scale and center-crop the images to a common size, in threads: decoders release Python's global lock."""
    prepare = EvaluationImages(size, 1.0, "bilinear", exif_rotate)
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def read(i: int) -> None:
        images[i] = prepare.read(os.fsdecode(files.paths[i]))

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(read, range(len(files))))  # raises the first exception
    return Images(images, files.labels)


_FOLDER = partial(PHOTOGRAPHS, load=load, img_size=IMG_SIZE)

DATASETS = [_FOLDER(name="imagefolder"), _FOLDER(name="ImageNet", n_classes=1000)]
