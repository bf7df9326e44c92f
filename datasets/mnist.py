"""MNIST and FashionMNIST: 60,000 + 10,000 gray images of 28x28.

Yann LeCun, Corinna Cortes, Christopher J. C. Burges (1998): The MNIST database of handwritten digits.
http://yann.lecun.com/exdb/mnist/
Han Xiao, Kashif Rasul, Roland Vollgraf (2017): Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms.
https://arxiv.org/abs/1708.07747
"""

import gzip
import zlib
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from datasets.pipeline.cache import load_cached
from datasets.pipeline.downloads import fetch, missing_files
from datasets.pipeline.splits import DatasetSpec, Images, Loaded, Source


def load(source: Source, *, fashion: bool) -> Loaded:
    from torchvision.datasets import MNIST, FashionMNIST

    published = FashionMNIST if fashion else MNIST
    folder = source.root / published.__name__ / "raw"
    archives = [(folder / name, md5) for name, md5 in published.resources]
    if not all(path.is_file() or path.with_suffix("").is_file() for path, _ in archives):
        urls = [(f"{published.mirrors[0]}{name}", name, md5) for name, md5 in published.resources]
        fetch(urls, source, wanted=folder, what=published.__name__, into=folder)
    # the .gz files are preferred, because they are the ones with published checksums
    files = [path if path.is_file() else path.with_suffix("") for path, _ in archives]

    def read() -> Loaded:
        if source.verify and (broken := missing_files(archives, verify=True)):
            raise OSError(
                f"{broken[0]}: missing or not the published file (the checksums are those of the .gz files); "
                "set data.verify false to read the dataset as it is"
            )
        classes = tuple(published.classes)
        train, test = (_read(*pair, len(classes)) for pair in ((files[0], files[1]), (files[2], files[3])))
        return Loaded(train, test, classes)

    return load_cached(folder / ".cache.safetensors", files, verify=source.verify, read=read)


def _read(image_file: Path, label_file: Path, n_classes: int) -> Images:
    images, labels = read_idx(image_file).unsqueeze(1), read_idx(label_file).long()
    if len(images) != len(labels) or labels.ndim != 1:
        raise OSError(f"{label_file} holds {len(labels)} labels for {len(images)} images")
    if len(labels) and int(labels.max()) >= n_classes:
        raise OSError(f"{label_file} holds the label {int(labels.max())}; there are {n_classes} classes, numbered from 0")
    return Images(images, labels)


def read_idx(path: Path) -> Tensor:
    """Read an array in the IDX format: two zeros, 8 for uint8, the number of dimensions, each as four bytes, then the data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OSError(f"{path} can't be unpacked, maybe it is truncated ({error})") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise OSError(f"{path} is not an IDX file of bytes")
    n_dims = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_dims)]
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)[4 + 4 * n_dims :]
    if len(values) != int(torch.tensor(shape).prod()):
        raise OSError(
            f"{path} is truncated or too long: its header declares {' x '.join(map(str, shape))} bytes, it holds {len(values)}"
        )
    return values.view(shape)


_MNIST = partial(DatasetSpec, channels=1, img_size=28, n_classes=10)

DATASETS = [
    _MNIST("MNIST", partial(load, fashion=False), mean=(0.1307,), std=(0.3081,), crop_padding=2),
    _MNIST("FashionMNIST", partial(load, fashion=True), mean=(0.2860,), std=(0.3530,), crop_padding=2, hflip=True),
]
