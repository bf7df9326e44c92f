"""Reading files of torch.save without torch.load: the same content, and no more memory than the file's size suggests."""

import io
import pickle
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict

import pytest
import torch

from models.loading.tensors import ForbiddenContent, load_pickled, load_safetensors

SHARED = torch.arange(20.0).view(4, 5)
CONTENT = {
    "view": SHARED,
    "transposed": SHARED.t(),
    "slice": SHARED[1:, 2],
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3),
    "state dict": torch.nn.BatchNorm1d(2).state_dict(),
    "plain": [1, 2.5, None, True, 2**70, (1, "x"), "ü", OrderedDict(a=1), Counter("abb"), torch.Size([1, 2]), torch.float64],
    **{str(t): torch.ones(3).to(t) for t in (torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64)},
    3: {0: {"step": torch.tensor(1.0)}},
}


def saved(value, **options) -> io.BytesIO:
    torch.save(value, file := io.BytesIO(), **options)
    return file


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert_same(list(a.values()), list(b.values()))
    else:
        assert a == b


@pytest.mark.parametrize("is_zipped", [True, False])
def test_content_is_that_of_torch_load(is_zipped):
    file = saved(CONTENT, _use_new_zipfile_serialization=is_zipped)
    read = load_pickled(file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), read)
    assert read["view"].data_ptr() == read["transposed"].data_ptr()


def test_newer_types_are_read_from_untyped_storages():
    content = {"a": torch.arange(3).to(torch.uint16), "b": torch.ones(3).to(torch.float8_e4m3fn)}
    read = load_pickled(saved(content))
    assert torch.equal(read["a"], content["a"])
    assert torch.equal(read["b"].float(), content["b"].float())


def test_options_of_a_training_script_are_ignored():
    read = load_pickled(saved({"model": {"w": torch.ones(2)}, "args": Namespace(lr=0.1)}))
    assert torch.equal(read["model"]["w"], torch.ones(2))


class RunsCode:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize("is_zipped", [True, False])
@pytest.mark.parametrize("value", [RunsCode(), torch.nn.Linear(1, 1), {"a": torch.ones(2).to_sparse()}, {1: b"bytes"}])
def test_other_content_is_refused(value, is_zipped, capsys):
    with pytest.raises(ForbiddenContent):
        load_pickled(saved(value, _use_new_zipfile_serialization=is_zipped))
    assert not capsys.readouterr().out


def repacked(value, change, compression=zipfile.ZIP_STORED) -> io.BytesIO:
    with zipfile.ZipFile(saved(value)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file := io.BytesIO(), "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name.partition("/")[2], content))
    return file


def doubled(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


DEEP_KEY = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.TUPLE1 * 1_000_000 + pickle.NONE + b"s."
BOMBS = {
    "compressed": (lambda: repacked(torch.zeros(1_000_000), lambda name, content: content, zipfile.ZIP_DEFLATED), "compressed"),
    "expanded tensor": (lambda: saved(torch.zeros(1).expand(1 << 40)), "larger than its storage"),
    "expanded tensor, legacy": (
        lambda: saved(torch.zeros(1).expand(1 << 40), _use_new_zipfile_serialization=False),
        "larger than its storage",
    ),
    "many tensors in one storage": (lambda: saved(list(torch.zeros(100_000).expand(9, -1))), "much larger than the file"),
    "a storage that is too short": (
        lambda: repacked(SHARED, lambda name, content: content[:-8] if name == "data/0" else content),
        "a storage has 72 instead of 80 bytes",
    ),
    "doubled lists": (lambda: saved(doubled(40)), "nested too deep, or too many"),
    "deep lists": (lambda: saved(pickle.loads(pickle.PROTO + b"\2" + b"]" * 100 + b"a" * 99 + b".")), "nested too deep"),
    "a deep key": (lambda: repacked(0, lambda name, content: DEEP_KEY if name == "data.pkl" else content), "not plain values"),
    "large plain values": (lambda: saved("x" * 10_000_001), "more than 10,000,000 bytes"),
    "a storage larger than a legacy file": (
        lambda: io.BytesIO(
            saved(SHARED, _use_new_zipfile_serialization=False).getvalue().replace(b"K\x14N", b"J\0\0\0\x7fN", 1),
        ),
        "larger than the file",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_sizes_are_checked_before_memory_is_used(bomb):
    make, words = BOMBS[bomb]
    with pytest.raises(ValueError, match=words):
        load_pickled(make())


def test_a_safetensors_header_of_many_gigabytes_is_refused():
    with pytest.raises(ValueError, match="no header of a sensible size"):
        load_safetensors((1 << 40).to_bytes(8, "little") + bytes(100))
