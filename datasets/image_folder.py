"""A folder of images, one folder per class: train/<class>/*.jpg and val/<class>/*.jpg, the layout of ImageNet.

Olga Russakovsky et al. (2015): ImageNet Large Scale Visual Recognition Challenge. IJCV. https://arxiv.org/abs/1409.0575

The list of files is cached, in the data folder or else in the user's cache folder, and is valid until a folder changes.
"""

import hashlib
import io
import json
import logging
import os
import re
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from datasets.pipeline.cache import load_cached
from datasets.pipeline.images import IMAGE_ENDINGS, EvaluationImages
from datasets.pipeline.splits import PHOTOGRAPHS, Files, Images, Loaded, Source
from models.loading.files import MalformedFile, first_line, open_regular, read_limited, replace_file

log = logging.getLogger(__name__)

IMG_SIZE = 224
WORDNET = re.compile(r"n\d{8}")
MAX_LIST = 1 << 30  # bytes of a file for data.exclude
RECENT = 2.0  # seconds; after a more recent change, another may follow with the same timestamp

Listing = dict[str, np.ndarray]  # of train and val: names, relative to the data folder, and labels


def load(source: Source, *, in_memory: bool = False, exclude: str | None = None) -> Loaded:
    """`exclude` names a file with one line for each image to skip, as tools/verify_dataset.py writes it."""
    folders = class_folders(source.root)
    listing = _listing(source.root, folders)
    if exclude is not None:
        listing = _without(listing, Path(exclude).expanduser(), tuple(folders["train"]))
    classes = class_names(tuple(folders["train"]))
    prefix = os.fsencode(source.root) + os.fsencode(os.sep)
    train, test = (
        Files(np.char.add(prefix, listing[f"{part}_names"]), torch.from_numpy(listing[f"{part}_labels"]))
        for part in ("train", "val")
    )
    if not in_memory:
        return Loaded(train, test, classes)
    size, n = source.img_size or IMG_SIZE, len(train) + len(test)
    needed, available = n * 3 * size * size, psutil.virtual_memory().total
    if needed > available:
        sizes = f"take {needed / 1e9:.0f} GB; there are {available / 1e9:.0f}"
        raise OSError(f"data.in_memory: {n:,} images of {size}x{size} {sizes}")
    return load_cached(
        source.root / f".cache-{size}.safetensors",
        [Path(os.fsdecode(path)) for path in (*train.paths, *test.paths)],
        channels=3,
        verify=False,
        read=lambda: Loaded(_in_memory(train, size), _in_memory(test, size), classes),
    )


def class_folders(root: Path) -> dict[str, dict[str, Path]]:
    """Return the folders of train and val by class name. OSError if a folder is missing or val has other classes."""
    found = {}
    for part in ("train", "val"):
        folder = root / part
        if not folder.is_dir():
            raise OSError(f"{folder}: no such folder; expected {root}/train/<class>/*.jpg and {root}/val/<class>/*.jpg")
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise OSError(f"{folder} holds no class folders; expected {folder}/<class>/*.jpg")
        found[part] = {name: folder / name for name in names}
    if unknown := sorted(found["val"].keys() - found["train"].keys()):
        raise OSError(f"{found['val'][unknown[0]]} is a class that {root / 'train'} doesn't have")
    return found


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


# The list of files


def _listing(root: Path, folders: dict[str, dict[str, Path]]) -> Listing:
    times = {f"{part}/{name}": path.stat().st_mtime_ns for part in folders for name, path in folders[part].items()}
    stamp = json.dumps(times)  # a folder's time changes when a file is added, removed or renamed
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "image-backbones"
    caches = [root / ".image-list.npz", user_cache / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.npz"]
    for cache in caches:
        if (listing := _read_cache(cache, stamp, folders)) is not None:
            return listing
    listing = _scan(folders)
    if max(times.values()) / 1e9 < time.time() - RECENT and not any(_write_cache(cache, stamp, listing) for cache in caches):
        log.info("neither %s nor %s can be written; the folder is listed each time", *caches)
    return listing


def _scan(folders: dict[str, dict[str, Path]]) -> Listing:
    """List the images as part/class/file, in arrays of bytes: a million strings would take many times the memory."""
    listing: Listing = {}
    numbers = {name: number for number, name in enumerate(folders["train"])}
    for part, of_class in folders.items():
        names, labels = [], []
        for name, folder in of_class.items():
            found = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_ENDINGS))
            if not found:
                raise OSError(f"{folder} holds no image ({', '.join(IMAGE_ENDINGS)})")
            names.append(np.array([os.fsencode(os.path.join(part, name, file)) for file in found]))
            labels.append(np.full(len(found), numbers[name], dtype=np.int64))
        listing |= {f"{part}_names": np.concatenate(names), f"{part}_labels": np.concatenate(labels)}
    return listing


def _read_cache(cache: Path, stamp: str, folders: dict[str, dict[str, Path]]) -> Listing | None:
    try:
        with open_regular(cache) as file, zipfile.ZipFile(file) as archive:  # the checksums of a zip file are verified on reading
            if str(_member(archive, "stamp")) != stamp:
                return None
            listing = {f"{part}_{kind}": _member(archive, f"{part}_{kind}") for part in folders for kind in ("names", "labels")}
        _check(listing, folders)
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile and numpy raise exceptions of many types for a damaged file
        log.warning("%s is damaged (%s); the folders are listed again", cache, first_line(str(error)) or type(error).__name__)
        return None
    return listing


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


def _check(listing: Listing, folders: dict[str, dict[str, Path]]) -> None:
    """Raise ValueError unless each name is that of a file directly in the class folder of its label."""
    numbers = {name: number for number, name in enumerate(folders["train"])}
    for part, of_class in folders.items():
        names, labels = listing[f"{part}_names"], listing[f"{part}_labels"]
        if names.dtype.kind != "S" or labels.dtype != np.int64 or not names.shape == labels.shape == (names.size,):
            raise ValueError(f"{part} is not a list of names and labels")
        if (np.diff(labels) < 0).any() or np.unique(labels).tolist() != [numbers[name] for name in of_class]:
            raise ValueError(f"{part} has labels that are not those of its folders")
        letters = names.view(np.uint8).reshape(len(names), -1)
        ends_early = (letters[:, :-1] == 0) & (letters[:, 1:] != 0)
        if ends_early.any() or ((letters == ord(os.sep)).sum(1) != 2).any():
            raise ValueError(f"{part} has names that are not those of files in its folders")
        for name in of_class:
            first, last = np.searchsorted(labels, (numbers[name], numbers[name] + 1))
            prefix = os.fsencode(os.path.join(part, name, ""))
            own = letters[first:last, : len(prefix)]
            is_folder = np.isin(names[first:last], (prefix, prefix + b".", prefix + b".."))
            if own.shape[1] < len(prefix) or (own != np.frombuffer(prefix, np.uint8)).any() or is_folder.any():
                raise ValueError(f"{part} has names outside of its folders")


def _write_cache(cache: Path, stamp: str, listing: Listing) -> bool:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(
                file,
                stamp=np.array(stamp),
                train_names=listing["train_names"],
                train_labels=listing["train_labels"],
                val_names=listing["val_names"],
                val_labels=listing["val_labels"],
            )

    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        replace_file(cache, write)
    except OSError:
        return False
    return True


def _without(listing: Listing, exclude: Path, classes: tuple[str, ...]) -> Listing:
    try:
        lines = read_limited(exclude, MAX_LIST).splitlines()
    except MalformedFile as error:
        raise OSError(f"data.exclude: {error}") from error
    except OSError as error:
        raise OSError(f"data.exclude: {exclude} can't be read ({error.strerror})") from error
    excluded = np.array([line for line in lines if line and not line.startswith(b"#")], dtype="S")
    kept: Listing = {}
    for part in ("train", "val"):
        keep = ~np.isin(listing[f"{part}_names"], excluded)
        kept |= {f"{part}_{kind}": listing[f"{part}_{kind}"][keep] for kind in ("names", "labels")}
        emptied = np.setdiff1d(listing[f"{part}_labels"], kept[f"{part}_labels"])
        if len(emptied):
            raise OSError(f"{exclude} leaves no image of {part}/{classes[emptied[0]]}")
    n_skipped = sum(len(listing[name]) - len(kept[name]) for name in ("train_names", "val_names"))
    if n_skipped < len(excluded):
        log.warning("%d of the %d files in %s are not in the dataset", len(excluded) - n_skipped, len(excluded), exclude)
    log.info("%d images are left out (data.exclude)", n_skipped)
    return kept


# In memory


def _in_memory(files: Files, size: int) -> Images:
    """Scale and center-crop the images to a common size, in threads: decoders release Python's global lock."""
    prepare = EvaluationImages(size, crop_pct=1.0, interpolation="bilinear")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def read(i: int) -> None:
        images[i] = prepare.read(os.fsdecode(files.paths[i]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, range(len(files))))  # raises the first exception
    return Images(images, files.labels)


_FOLDER = partial(PHOTOGRAPHS, load=load, img_size=IMG_SIZE)

DATASETS = [_FOLDER(name="imagefolder"), _FOLDER(name="ImageNet", n_classes=1000)]
