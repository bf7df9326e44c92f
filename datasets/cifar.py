"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 images of 32x32.

Alex Krizhevsky (2009): Learning Multiple Layers of Features from Tiny Images. https://www.cs.toronto.edu/~kriz/cifar.html

The files are pickles, which are compared to their published checksums. If that is turned off (`verify: false`), the unpickler
still runs no code and creates only plain values and arrays of numbers.
"""

import io
import math
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.pipeline.cache import load_cached
from datasets.pipeline.downloads import fetch, missing_files
from datasets.pipeline.splits import DatasetSpec, Images, Loaded, Source
from models.loading.files import MalformedFile, read_limited
from models.loading.unpickle import ERRORS, ForbiddenContent, PlainUnpickler

MAX_BYTES = 1 << 28  # of a file; the largest has 156 MB
MAX_VALUES = 700_000  # of one file; CIFAR-100's train has 100,000
NUMBERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


class Dtype:
    """Stands for numpy.dtype: the type of an array's numbers."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if code not in NUMBERS:
            raise pickle.UnpicklingError(f"it has an array of type {code!r}, which is not one of numbers")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stands for numpy.ndarray: an empty array, which `build` fills."""

    def __init__(self, encode: Callable[[Any], bytes]) -> None:
        self.encode = encode
        self.values: np.ndarray = np.empty(0)

    def build(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        if not isinstance(kind, Dtype) or not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("it has an array without shape or type")
        content = content if isinstance(content, bytes) else self.encode(content)
        if len(content) != math.prod(shape) * kind.dtype.itemsize:
            raise pickle.UnpicklingError(f"it has an array of shape {shape} with {len(content)} bytes")
        self.values = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


class ArrayUnpickler(PlainUnpickler):
    """Reads plain values and arrays of numbers."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), max_values=MAX_VALUES, encoding="latin1")
        self.bytes_left = len(content)
        self.known |= {"numpy.ndarray": None, "numpy.dtype": Dtype, "_codecs.encode": self.encode}
        self.known |= {f"numpy.{core}.multiarray._reconstruct": lambda *_: Array(self.encode) for core in ("core", "_core")}

    def encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """Return bytes that Python 2, or 3 for Python 2, wrote as text. The sum of all is no longer than the file."""
        self.bytes_left -= len(text)
        if not isinstance(text, str) or encoding != "latin1" or self.bytes_left < 0:
            raise pickle.UnpicklingError("it has bytes that aren't written as usual")
        return text.encode("latin1")


def read_pickle(path: Path) -> dict[str, Any]:
    content = read_limited(path, MAX_BYTES)
    try:
        entry = ArrayUnpickler(content).load()
    except pickle.UnpicklingError as error:
        problem = f"it imports {error}" if isinstance(error, ForbiddenContent) else error
        raise MalformedFile(path, f"refused: it is not a CIFAR file ({problem})") from error
    except ERRORS as error:
        raise MalformedFile(path, f"it can't be read, maybe it is truncated ({error or type(error).__name__})") from error
    if not isinstance(entry, dict) or not all(isinstance(name, str) for name in entry):
        raise MalformedFile(path, "refused: it is not a CIFAR file (it holds no dictionary of names)")
    return {name: value.values if isinstance(value, Array) else value for name, value in entry.items()}


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
            hint = f"remove {folder} to fetch it again, or set data.verify false"
            raise MalformedFile(broken[0], f"missing or not the published file; {hint}")
        classes = read_pickle(paths[-1]).get(name_key)
        if not isinstance(classes, list) or not all(isinstance(name, str) and name.isprintable() for name in classes):
            raise MalformedFile(paths[-1], f"it is not a CIFAR file: expected a list of names in {name_key!r}")
        train, test = (_read(part, label_key, len(classes)) for part in (paths[:n_train], paths[n_train:-1]))
        return Loaded(train, test, tuple(classes))

    if missing_files(wanted, verify=False):
        return read()  # raises an error that names the file
    return load_cached(folder / ".cache.safetensors", paths, channels=3, verify=source.verify, read=read)


def _read(paths: Sequence[Path], label_key: str, n_classes: int) -> Images:
    images, labels = [], []
    for path in paths:
        entry = read_pickle(path)
        pixels, found = entry.get("data"), entry.get(label_key)
        found = found.tolist() if isinstance(found, np.ndarray) else found
        is_array = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3072,)
        if pixels is None or not is_array or not isinstance(found, list) or not 0 < len(found) == len(pixels):
            raise MalformedFile(path, f"it is not a CIFAR file: expected n x 3072 bytes in 'data' and n numbers in {label_key!r}")
        if not all(type(label) is int and 0 <= label < n_classes for label in found):
            raise MalformedFile(path, f"it holds a label outside 0 to {n_classes - 1}")
        images.append(torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()))
        labels.append(torch.tensor(found, dtype=torch.int64))
    return Images(torch.cat(images), torch.cat(labels))


_CIFAR10, _CIFAR100 = (partial(load, fine_labels=fine) for fine in (False, True))
_CIFAR = partial(DatasetSpec, channels=3, img_size=32, crop_padding=4, hflip=True)

DATASETS = [
    _CIFAR("CIFAR-10", _CIFAR10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), n_classes=10),
    _CIFAR("CIFAR-100", _CIFAR100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), n_classes=100),
]
