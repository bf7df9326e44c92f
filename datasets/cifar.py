"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 images of 32x32.

Alex Krizhevsky (2009): Learning Multiple Layers of Features from Tiny Images. https://www.cs.toronto.edu/~kriz/cifar.html

The files are pickles, which are compared to their published checksums. If that is turned off (`verify: false`), the unpickler
still creates only arrays, bytes and plain values.
"""

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.pipeline.cache import load_cached
from datasets.pipeline.downloads import fetch, missing_files
from datasets.pipeline.splits import DatasetSpec, Images, Loaded, Source

ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it imports {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_pickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return ArrayUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise OSError(f"{path} is refused: it is not a CIFAR file ({error})") from error
    except (EOFError, AttributeError, IndexError, KeyError, ValueError) as error:
        raise OSError(f"{path} can't be read, maybe it is truncated ({error})") from error


def load(source: Source, *, fine_labels: bool) -> Loaded:
    from torchvision.datasets import CIFAR10, CIFAR100

    published = CIFAR100 if fine_labels else CIFAR10
    folder = source.root / published.base_folder
    label_key, name_key = ("fine_labels", "fine_label_names") if fine_labels else ("labels", "label_names")
    files = [*published.train_list, *published.test_list, (published.meta["filename"], published.meta["md5"])]
    wanted = [(folder / name, md5) for name, md5 in files]
    paths, n_train = [path for path, _ in wanted], len(published.train_list)
    if missing_files(wanted, verify=False):
        fetch([(published.url, published.filename, published.tgz_md5)], source, wanted=folder, what=published.__name__)

    def read() -> Loaded:
        if broken := missing_files(wanted, verify=source.verify):
            raise OSError(
                f"{broken[0]}: missing or not the published file; remove {folder} to fetch it again, or set data.verify false"
            )
        classes = tuple(read_pickle(paths[-1])[name_key])
        train, test = (_read(part, label_key, len(classes)) for part in (paths[:n_train], paths[n_train:-1]))
        return Loaded(train, test, classes)

    if missing_files(wanted, verify=False):
        return read()  # raises an error that names the file
    return load_cached(folder / ".cache.safetensors", paths, verify=source.verify, read=read)


def _read(paths: Sequence[Path], label_key: str, n_classes: int) -> Images:
    images, labels = [], []
    for path in paths:
        entry = read_pickle(path)
        pixels, found = np.asarray(entry.get("data")), entry.get(label_key)
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072 or found is None or len(found) != len(pixels):
            raise OSError(f"{path} is not a CIFAR file: expected n x 3072 bytes in 'data' and n numbers in {label_key!r}")
        if not all(0 <= label < n_classes for label in found):
            raise OSError(f"{path} holds a label outside 0 to {n_classes - 1}")
        images.append(torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()))
        labels.append(torch.tensor(found, dtype=torch.int64))
    return Images(torch.cat(images), torch.cat(labels))


_CIFAR = partial(DatasetSpec, channels=3, img_size=32, crop_padding=4, hflip=True)

DATASETS = [
    _CIFAR(
        "CIFAR-10", partial(load, fine_labels=False), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), n_classes=10
    ),
    _CIFAR(
        "CIFAR-100", partial(load, fine_labels=True), mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), n_classes=100
    ),
]
