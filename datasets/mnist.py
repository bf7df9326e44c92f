"""MNIST and FashionMNIST: 60,000 + 10,000 gray images of 28x28.

Yann LeCun, Corinna Cortes, Christopher J. C. Burges (1998): The MNIST database of handwritten digits.
http://yann.lecun.com/exdb/mnist/
Han Xiao, Kashif Rasul, Roland Vollgraf (2017): Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms.
https://arxiv.org/abs/1708.07747
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from datasets.pipeline.cache import load_cached
from datasets.pipeline.downloads import fetch, missing_files
from datasets.pipeline.splits import DatasetSpec, Images, Loaded, Source
from models.loading.files import MalformedFile, open_regular

MAX_BYTES = 1_000_000_000  # of an array
MAX_UNPACKED = 400_000_000  # of an array in an archive: a few kilobytes could declare any number


def load(source: Source, *, fashion: bool) -> Loaded:
    from torchvision.datasets import MNIST, FashionMNIST

    published = FashionMNIST if fashion else MNIST
    folder = source.root / published.__name__ / "raw"
    archives = [(folder / name, md5) for name, md5 in published.resources]
    if not all(path.exists() or path.with_suffix("").exists() for path, _ in archives):
        urls = [(f"{published.mirrors[0]}{name}", name, md5) for name, md5 in published.resources]
        fetch(urls, source, wanted=folder, what=published.__name__, into=folder)
    # the .gz files are preferred, because they are the ones with published checksums
    files = [path if path.exists() else path.with_suffix("") for path, _ in archives]

    def read() -> Loaded:
        if source.verify and (broken := missing_files(archives, verify=True)):
            problem = "missing or not the published file (the checksums are those of the .gz files)"
            raise MalformedFile(broken[0], f"{problem}; set data.verify false to read the dataset as it is")
        classes = tuple(published.classes)
        train, test = (_read(*pair, len(classes)) for pair in ((files[0], files[1]), (files[2], files[3])))
        return Loaded(train, test, classes)

    return load_cached(folder / ".cache.safetensors", files, channels=1, verify=source.verify, read=read)


def _read(image_file: Path, label_file: Path, n_classes: int) -> Images:
    images, labels = read_idx(image_file), read_idx(label_file).long()
    if images.ndim != 3 or not images.numel():
        raise MalformedFile(image_file, f"its shape is {_shape(images.shape)}, not that of gray images")
    if labels.shape != images.shape[:1]:
        raise MalformedFile(label_file, f"it holds {_shape(labels.shape)} labels for {len(images)} images")
    if int(labels.max()) >= n_classes:
        raise MalformedFile(label_file, f"it holds the label {int(labels.max())}; there are {n_classes} classes, numbered from 0")
    return Images(images.unsqueeze(1), labels)


def read_idx(path: Path) -> Tensor:
    """Read an array in the IDX format: two zeros, 8 for uint8, the number of dimensions, each as four bytes, then the data."""
    try:
        with open_regular(path) as file:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    return _read_array(path, unpacked, MAX_UNPACKED)
            return _read_array(path, file, MAX_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise MalformedFile(path, f"it can't be unpacked, maybe it is truncated ({error})") from error


def _read_array(path: Path, file: IO[bytes] | gzip.GzipFile, most: int) -> Tensor:
    """Read what the header declares and one byte more, in pieces: memory grows with the content of the file."""
    start = file.read(4)
    if len(start) < 4 or start[:3] != b"\0\0\x08":
        raise MalformedFile(path, "it is not an IDX file of bytes")
    sizes = file.read(4 * start[3])
    shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 4 * start[3], 4)]
    n_bytes = math.prod(shape)
    if n_bytes > most:
        raise MalformedFile(path, f"its header declares {_shape(shape)} bytes, more than {most:,}")
    data = bytearray()
    while len(data) <= n_bytes and (piece := file.read(min(1 << 20, n_bytes + 1 - len(data)))):
        data += piece
    if len(data) != n_bytes or not data:
        held = "more" if len(data) > n_bytes else len(data)
        raise MalformedFile(path, f"it is truncated or too long: its header declares {_shape(shape)} bytes, it holds {held}")
    return torch.frombuffer(data, dtype=torch.uint8).view(shape)


def _shape(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


_MNIST = partial(DatasetSpec, channels=1, img_size=28, n_classes=10)

DATASETS = [
    _MNIST("MNIST", partial(load, fashion=False), mean=(0.1307,), std=(0.3081,), crop_padding=2),
    _MNIST("FashionMNIST", partial(load, fashion=True), mean=(0.2860,), std=(0.3530,), crop_padding=2, hflip=True),
]
