"""What a data set is made of."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """A split held in memory."""

    images: Tensor  # N C H W, uint8
    labels: Tensor  # N, int64

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Images":
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class Files:
    """A split whose images are files. The paths are one array of bytes: a list of a million strings would be copied into
    every worker as it touches them."""

    paths: np.ndarray  # N, bytes
    labels: Tensor  # N, int64

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "Files":
        return replace(self, paths=self.paths[indices.numpy()], labels=self.labels[indices])


Split = Images | Files  # or a kind of its own, such as those of masks.py, which brings its loaders


@dataclass(frozen=True)
class Loaded:
    train: Split
    test: Split
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where and how a data set is read."""

    root: Path
    verify: bool = True
    download: bool = True
    seed: int = 0
    img_size: int | None = None  # that the config asks for; None: the data set's own
    n_classes: int | None = None  # likewise


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before it is read."""

    name: str
    load: Callable[..., Loaded]  # load(source, **options)
    channels: int
    img_size: int
    mean: tuple[float, ...]  # of the channels, in [0, 1]
    std: tuple[float, ...]
    n_classes: int | None = None  # None where only the files say so
    crop_padding: int = 0  # the usual augmentation: random crop of the padded image ...
    hflip: bool = False  # ... and mirroring, where a mirrored image is still of its class
    targets: str = "classes"  # or masks, or boxes; a set that has several kinds has a spec for each
    any_size: bool = False  # made as large as the model sees them
    in_files: bool = False  # decoded by workers, unless data.in_memory asks for something else


def hold_out(split: Split, ratio: float, seed: int) -> tuple[Split, Split]:
    """Split off `ratio` of the samples, the same ones for the same seed."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    n_held_out = round(len(split) * ratio)
    if not 0 < n_held_out < len(split):
        raise ValueError(f"holding out {ratio:g} of {len(split)} training samples leaves one side empty")
    held_out, kept = order[:n_held_out].sort().values, order[n_held_out:].sort().values
    return split.subset(kept), split.subset(held_out)
