import os

import pytest
import torch

from datasets import Source, find_dataset
from tests import on_disk


@pytest.fixture(params=["CIFAR-10", "MNIST"])
def written(request, tmp_path):
    """A dataset on disk, its loading function, and one of its files."""
    write = {"CIFAR-10": on_disk.write_cifar10, "MNIST": on_disk.write_mnist}[request.param]
    root = write(tmp_path / "set")
    source = Source(root, verify=False, download=False)
    file = next(path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size > 1000)
    return root, lambda: find_dataset(request.param).load(source), file


def same(a, b):
    return all(
        torch.equal(getattr(x, kind), getattr(y, kind))
        for x, y in ((a.train, b.train), (a.test, b.test))
        for kind in ("images", "labels")
    )


def cache_of(root):
    (cache,) = root.rglob(".cache.safetensors")
    return cache


def test_the_second_load_reads_the_same_from_the_cache(written, monkeypatch):
    root, load, _ = written
    first = load()
    assert cache_of(root).stat().st_mode & 0o777 == cache_of(root).parent.stat().st_mode & 0o666
    for read in ("cifar.read_pickle", "mnist.read_idx"):
        monkeypatch.setattr(f"datasets.{read}", lambda path: pytest.fail("read again"))
    second = load()
    assert same(first, second)
    assert first.classes == second.classes


def test_a_changed_file_is_read_again(written):
    _, load, file = written
    first = load()
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert not same(first, load())


def test_a_damaged_cache_is_not_used(written, caplog):
    root, load, _ = written
    first = load()
    cache = cache_of(root)
    content = bytearray(cache.read_bytes())
    for position in (4, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        cache.write_bytes(damaged)
        assert same(first, load())
    assert caplog.text.count("is damaged") == 3
    cache.write_bytes(b"")
    assert same(first, load())
    assert list(cache.parent.glob("*.cache*")) == [cache]


def test_an_unverified_cache_is_not_used_with_verification(written):
    root, load, _ = written
    load()
    name = "CIFAR-10" if "cifar" in str(cache_of(root)) else "MNIST"
    with pytest.raises(OSError, match="not the published file"):
        find_dataset(name).load(Source(root, verify=True, download=False))
