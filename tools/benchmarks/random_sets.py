"""Write random images in the formats of CIFAR-10, MNIST and image folders, for benchmarks and tests."""

import os
import pickle
import struct
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

HEIGHT, WIDTH, QUALITY = 375, 500, 88  # of the JPEGs: about 60 kB each
DIFFERENT_JPEGS = 64


def write_cifar10(root: Path, n_train: int = 60, n_test: int = 20) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, n in {**{f"data_batch_{i}": n_train // 5 for i in range(1, 6)}, "test_batch": n_test}.items():
        pixels = random.integers(0, 256, (n, 3072), dtype=np.uint8)
        content = {"data": pixels, "labels": random.integers(0, 10, n).tolist()}
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}, protocol=2))
    return root


def write_mnist(root: Path, name: str = "MNIST", n_train: int = 60, n_test: int = 20) -> Path:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, n in (("train", n_train), ("t10k", n_test)):
        images = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, n, dtype=np.uint8)
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            (folder / f"{part}-{kind}").write_bytes(content)
    return root


def write_jpegs(root: Path, n: int, pictures: Sequence[Path] = ()) -> None:
    """Write a folder of one class with `n` names of these pictures, or of a few generated ones."""
    folder = root / "class"
    folder.mkdir(parents=True)
    names = [folder / f"{i:06d}.jpg" for i in range(n)]
    if not pictures:
        _generate_jpegs(names[:DIFFERENT_JPEGS])
    link, same = (os.symlink, pictures) if pictures else (os.link, names[:DIFFERENT_JPEGS])
    for i in range(0 if pictures else DIFFERENT_JPEGS, n):
        link(same[i % len(same)].absolute(), names[i])


def _generate_jpegs(paths: Iterable[Path]) -> None:
    """Write clouds of several sizes with some grain."""
    import torch  # here, as --help needs this module and does without torch
    from PIL import Image
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(0)
    for path in paths:
        picture = torch.full((1, 3, HEIGHT, WIDTH), 128.0)
        for cells, strength in ((3, 70), (6, 45), (12, 32), (24, 23), (48, 16), (96, 11), (192, 7)):
            gray, color = (torch.randn(1, n, cells, cells * 4 // 3, generator=generator) for n in (1, 3))
            picture += strength * F.interpolate(gray + 0.4 * color, (HEIGHT, WIDTH), mode="bicubic")
        picture += 5 * torch.randn(1, 1, HEIGHT, WIDTH, generator=generator)
        pixels = picture[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(path, quality=QUALITY)


def write_shards(root: Path, folder: Path, n: int, per_shard: int = 1024) -> None:
    """Write the first `n` JPEGs of a folder, all of class 0, into tar files in WebDataset's layout."""
    root.mkdir()
    (root / "0.cls").write_text("0")
    for first in range(0, n, per_shard):
        with tarfile.open(root / f"{first // per_shard:06d}.tar", "w", dereference=True) as tar:
            for i in range(first, min(first + per_shard, n)):
                tar.add(root / "0.cls", f"{i:06d}.cls")
                tar.add(folder / f"{i:06d}.jpg", f"{i:06d}.jpg")
