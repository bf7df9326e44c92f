"""Read files of tensors that may come from a stranger: those of torch.save, and safetensors.

`load_pickled` replaces torch.load. It runs no code from the file, checks every size before it takes memory, and never takes more
than a small multiple of the file's size: entries are stored without compression, and a tensor is never larger than its storage.
"""

import io
import math
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from models.loading.files import first_line
from models.loading.unpickle import ERRORS, ForbiddenContent, Ignored, PlainUnpickler

MAX_PICKLE = 10_000_000  # bytes; a thousand tensors need half a million
MAX_HEADER = 10_000_000  # bytes of a safetensors file's header
MAX_DEPTH, MAX_VALUES = 50, 1_000_000  # of the plain values around the tensors
MAX_SHARING = 4  # all tensors together, relative to the file: tied weights share their storage
FAILURES: tuple[type[Exception], ...] = (*ERRORS, zipfile.BadZipFile, safetensors.SafetensorError)
LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # the magic number and the protocol of torch.save until 1.5
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,  # of newer types, which each tensor names
}


def load_pickled(file: BinaryIO) -> Any:
    """Return the content of a torch.save file. Raise ForbiddenContent if it holds anything but tensors and plain values, and
    ValueError if it is damaged or its sizes are wrong."""
    try:
        value = _load_zipped(file) if zipfile.is_zipfile(file) else _load_legacy(file)
        _require_moderate(value, [MAX_VALUES])
        return value
    except ForbiddenContent:
        raise
    except MemoryError as error:
        raise ValueError("it is too large for this machine's memory") from error
    except FAILURES as error:
        has_words = isinstance(error, (ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile))
        raise ValueError((has_words and first_line(str(error))) or "it is damaged or ends too early") from error


def load_safetensors(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raise ValueError if it is damaged."""
    try:
        check_safetensors_header(content[:8])
        return safetensors.torch.load(content)
    except MemoryError as error:
        raise ValueError("it is too large for this machine's memory") from error
    except FAILURES as error:
        raise ValueError(first_line(str(error))) from error


def check_safetensors_header(start: bytes) -> None:
    """Raise ValueError unless a file that begins with these 8 bytes has a header of a sensible size."""
    if len(start) < 8 or int.from_bytes(start, "little") > MAX_HEADER:
        raise ValueError("it has no header of a sensible size")


@dataclass
class _Storage:
    data: Tensor  # its bytes
    dtype: torch.dtype


class _Reader(PlainUnpickler):
    """Unpickles plain values and tensors."""

    def __init__(self, file: BinaryIO, n_bytes: int, storage_of: Callable[[Any, int], Tensor]) -> None:
        super().__init__(file, max_values=MAX_VALUES)
        self.n_left, self.storage_of = MAX_SHARING * n_bytes, storage_of
        self.known |= {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "collections.OrderedDict": lambda: OrderedDict(),
            "collections.Counter": lambda counts: Counter({str(key): value for key, value in counts.items()}),
            "torch.Size": lambda sizes: tuple(sizes),
            "torch.device": Ignored,
            "argparse.Namespace": Ignored,
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Storage(torch.empty(0), STORAGES[name])
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, n_items, *view = pid
        if kind != "storage" or type(n_items) is not int or n_items < 0 or (view and view != [None]):
            raise ValueError("a storage has no size")
        return _Storage(self.storage_of(key, n_items * storage.dtype.itemsize), storage.dtype)

    def _tensor(
        self, storage: _Storage, offset: int, size: Any, stride: Any, grad: Any = 0, hooks: Any = 0, dtype: Any = None, *_: Any
    ) -> Tensor:
        """Make a tensor, which must lie within its storage and have no more elements than that."""
        dtype = dtype if isinstance(dtype, torch.dtype) else storage.dtype
        numbers = (offset, *size, *stride)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
            raise ValueError("a tensor has no valid shape")
        n_bytes = math.prod(size) * dtype.itemsize
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if n_bytes and max(n_bytes, (end + 1) * dtype.itemsize) > len(storage.data):
            raise ValueError("a tensor is larger than its storage")
        self.n_left -= n_bytes
        if self.n_left < 0:
            raise ValueError("its tensors are much larger than the file")
        return torch.empty(0, dtype=dtype).set_(storage.data.untyped_storage(), offset, size, stride)


def _load_zipped(file: BinaryIO) -> Any:
    n_bytes = file.seek(0, io.SEEK_END)
    storages: dict[str, Tensor] = {}
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        is_stored = all(info.compress_type == zipfile.ZIP_STORED for info in entries.values())
        if not is_stored or sum(info.file_size for info in archive.infolist()) > n_bytes:
            raise ValueError("it is compressed, or its entries overlap")
        (folder,) = {name.partition("/")[0] for name in entries}
        order = f"{folder}/byteorder"
        if order in entries and entries[order].file_size < 10 and archive.read(order) != sys.byteorder.encode():
            raise ValueError("it was written on a machine with another byte order")
        if entries[f"{folder}/data.pkl"].file_size > MAX_PICKLE:
            raise ValueError(f"its plain values have more than {MAX_PICKLE:,} bytes")

        def storage_of(key: Any, size: int) -> Tensor:
            info = entries[f"{folder}/data/{key}"]
            if info.file_size != size:
                raise ValueError(f"a storage has {info.file_size:,} instead of {size:,} bytes")
            if key not in storages:
                storages[key] = torch.empty(size, dtype=torch.uint8)
                if size:
                    storages[key].copy_(torch.frombuffer(bytearray(archive.read(info)), dtype=torch.uint8))
            return storages[key]

        return _Reader(io.BytesIO(archive.read(f"{folder}/data.pkl")), n_bytes, storage_of).load()


def _load_legacy(file: BinaryIO) -> Any:
    """Read the format of torch.save until 1.5: pickles one after the other, and then the storages."""
    file.seek(0)
    content = file.read()
    pickles, storages, n_left = io.BytesIO(content[:MAX_PICKLE]), dict[str, Tensor](), len(content)

    def storage_of(key: Any, size: int) -> Tensor:
        nonlocal n_left
        if key not in storages:
            n_left -= size
            if n_left < 0:
                raise ValueError("its storages are larger than the file")
            storages[key] = torch.empty(size, dtype=torch.uint8)
        if len(storages[key]) != size:
            raise ValueError("a storage has two sizes")
        return storages[key]

    def read() -> Any:
        return _Reader(pickles, len(content), storage_of).load()

    if (read(), read()) != LEGACY:
        raise ValueError("it is not a file of torch.save")
    _, value, keys = read(), read(), read()
    position = pickles.tell()
    for storage in (storages[key] for key in keys):
        position += 8  # the number of elements
        part = memoryview(content)[position : position + len(storage)]
        storage.copy_(torch.frombuffer(bytearray(part), dtype=torch.uint8) if len(storage) else storage)
        position += len(storage)
    return value


def _require_moderate(value: Any, n_left: list[int], depth: int = 0) -> None:
    """Raise ValueError if plain values are nested too deep or, with shared ones counted each time, too many to walk through."""
    n_left[0] -= 1
    if depth > MAX_DEPTH or n_left[0] < 0:
        raise ValueError("its plain values are nested too deep, or too many")
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for item in value:
        _require_moderate(item, n_left, depth + 1)
