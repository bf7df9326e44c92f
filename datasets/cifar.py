"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 images of 32x32.

Alex Krizhevsky (2009): Learning Multiple Layers of Features from Tiny Images. https://www.cs.toronto.edu/~kriz/cifar.html

The files are pickles, which are compared to their published checksums. If that is turned off (`verify: false`), the unpickler
still runs no code and creates only plain values and arrays of numbers.
"""

import io
import math
import pickle
import struct
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

MAX_BYTES = 1 << 28  # of a file; the largest has 156 MB
MAX_READS = 2_000_000  # of one file; an opcode takes one to three, CIFAR-100's train 300,000
NUMBERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
OPCODES = (  # what Python 2 and 3 write for such a file, without any that creates an object of a class
    *("PROTO", "FRAME", "STOP", "MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
)


class Dtype:
    """Stands for numpy.dtype: the type of an array's numbers."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if code not in NUMBERS:
            raise pickle.UnpicklingError(f"it has an array of type {code!r}, which is not one of numbers")
        self.dtype = np.dtype(code)

    def build(self, state: Any, encode: Callable[[Any], bytes]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stands for numpy.ndarray: an empty array, which `build` fills."""

    def __init__(self, *empty: Any) -> None:
        self.values: np.ndarray = np.empty(0)

    def build(self, state: Any, encode: Callable[[Any], bytes]) -> None:
        _, shape, kind, is_fortran, content = state
        if not isinstance(kind, Dtype) or not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("it has an array without shape or type")
        content = content if isinstance(content, bytes) else encode(content)
        if len(content) != math.prod(shape) * kind.dtype.itemsize:
            raise pickle.UnpicklingError(f"it has an array of shape {shape} with {len(content)} bytes")
        self.values = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


class ArrayUnpickler(pickle._Unpickler):
    """Reads values and arrays of numbers. Its memory and time are proportional to the size of the content.

    The unpickler in C would crash on objects that it hashes or fills without a check, and take gigabytes for a memo's index.
    """

    stack: list[Any]  # of the base class
    pop_mark: Callable[[], list[Any]]

    def __init__(self, content: bytes) -> None:
        self.file, self.reads_left, self.bytes_left = io.BytesIO(content), MAX_READS, len(content)
        super().__init__(self, encoding="latin1")

    def read(self, n: int) -> bytes:
        self._count_read()
        return self.file.read(n)

    def readline(self) -> bytes:
        self._count_read()
        return self.file.readline()

    def _count_read(self) -> None:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise pickle.UnpicklingError("it has too many values")

    def find_class(self, module: str, name: str) -> Any:
        known: dict[str, Any] = {"numpy.ndarray": None, "numpy.dtype": Dtype, "_codecs.encode": self.encode}
        known |= {f"numpy.{core}.multiarray._reconstruct": Array for core in ("core", "_core")}
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it imports {module}.{name}")
        return known[f"{module}.{name}"]

    def encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """Return bytes that Python 2, or 3 for Python 2, wrote as text. The sum of all is no longer than the file."""
        self.bytes_left -= len(text)
        if not isinstance(text, str) or encoding != "latin1" or self.bytes_left < 0:
            raise pickle.UnpicklingError("it has bytes that aren't written as usual")
        return text.encode("latin1")

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (Array, Dtype)):
            raise pickle.UnpicklingError("it has the state of an object that is no array")
        target.build(state, self.encode)

    def load_frame(self) -> None:
        self.read(8)  # a frame only tells how much to read at once

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._add(items)

    def load_setitem(self) -> None:
        value, name = self.stack.pop(), self.stack.pop()
        self._add([name, value])

    def load_setitems(self) -> None:
        self._add(self.pop_mark())

    def _add(self, items: list[Any]) -> None:
        names, values = items[::2], items[1::2]
        if not isinstance(self.stack[-1], dict) or not all(isinstance(name, str) for name in names):
            raise pickle.UnpicklingError("it has a dictionary with keys that are no names")
        self.stack[-1].update(zip(names, values, strict=True))


_DISPATCH = {code: pickle._Unpickler.dispatch[code].__name__ for code in (getattr(pickle, name)[0] for name in OPCODES)}
ArrayUnpickler.dispatch = {code: getattr(ArrayUnpickler, name) for code, name in _DISPATCH.items()}


def read_pickle(path: Path) -> dict[str, Any]:
    content = read_limited(path, MAX_BYTES)
    try:
        entry = ArrayUnpickler(content).load()
    except pickle.UnpicklingError as error:
        raise MalformedFile(path, f"refused: it is not a CIFAR file ({error})") from error
    except (EOFError, AttributeError, LookupError, ValueError, TypeError, OverflowError, struct.error) as error:
        raise MalformedFile(path, f"it can't be read, maybe it is truncated ({error or type(error).__name__})") from error
    if not isinstance(entry, dict):
        raise MalformedFile(path, "refused: it is not a CIFAR file (it holds no dictionary)")
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
            expected = f"n x 3072 bytes in 'data' and n numbers in {label_key!r}"
            raise MalformedFile(path, f"it is not a CIFAR file: expected {expected}")
        if not all(type(label) is int and 0 <= label < n_classes for label in found):
            raise MalformedFile(path, f"it holds a label outside 0 to {n_classes - 1}")
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
