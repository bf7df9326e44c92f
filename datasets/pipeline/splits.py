"""What a dataset consists of: two splits, class names, and a specification that is available before anything is read."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from models.loading.files import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """A split held in memory."""

    images: Tensor  # N C H W, uint8
    labels: Tensor  # N, int64; N x classes, uint8, if an image may have several

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Self:
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class Files:
    """A split whose images are files.

    The paths are one array of bytes: every worker process would copy a list of a million strings as it reads them.
    """

    paths: np.ndarray  # N, bytes: files or parts of files, as places.py writes them
    labels: Any  # N, int64 tensor; the subclasses in masks.py and boxes.py hold other targets

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Self:
        return replace(self, paths=self.paths[indices.numpy()], labels=self.labels[indices.numpy()])


Split = Images | Files  # a subclass may bring its own train_loader and eval_loader, as in masks.py and boxes.py
AnySplit = TypeVar("AnySplit", bound=Split)  # a split and its parts have one type


@dataclass(frozen=True)
class Loaded:
    train: Split
    test: Split
    classes: tuple[str, ...]
    category_ids: tuple[int | None, ...] | None = None  # of each class, where the files have other ids than 0, 1, ...
    valid: Split | None = None  # in data that already has three splits
    by_class: bool = False  # the test split was held out class by class; so is one for validation


@dataclass(frozen=True)
class Source:
    """Where and how a dataset is read."""

    root: Path
    verify: bool = True
    download: bool = True
    seed: int = 0
    img_size: int | None = None  # None: the dataset's own
    n_classes: int | None = None  # likewise
    exif_rotate: bool = False  # turn images as their EXIF data say


@dataclass(frozen=True)
class DatasetSpec:
    """What a config can rely on before the dataset is read."""

    name: str
    load: Callable[..., Loaded]  # load(source, **options)
    channels: int
    img_size: int
    mean: tuple[float, ...]  # of the channels, in [0, 1]
    std: tuple[float, ...]
    n_classes: int | None = None  # None: the files decide
    crop_padding: int = 0  # default augmentation: random crop of the padded image ...
    hflip: bool = False  # ... and mirroring, if a mirrored image still belongs to its class
    targets: str = "classes"  # or labels, masks, boxes; a dataset with several kinds has a spec for each
    any_size: bool = False  # generated at the size that the model expects
    in_files: bool = False  # decoded by workers, unless data.in_memory is true


# images in files of three channels, normalized by ImageNet's statistics
PHOTOGRAPHS = partial(DatasetSpec, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), hflip=True, in_files=True)


def hold_out(split: AnySplit, ratio: float, seed: int, *, by_class: bool = False) -> tuple[AnySplit, AnySplit]:
    """Split off `ratio` of the samples, the same ones for the same seed; `by_class`, that ratio of each class."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    n_held_out = round(len(split) * ratio)
    if not 0 < n_held_out < len(split):
        raise ValueError(f"holding out {ratio:g} of {len(split)} training samples leaves one side empty")
    if by_class:
        order = _first_of_each_class(order, split.labels, n_held_out)
    held_out, kept = order[:n_held_out].sort().values, order[n_held_out:].sort().values
    return split.subset(kept), split.subset(held_out)  # type: ignore[return-value]  # mypy resolves Self to the bound, a union


PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # and the names of their folders


def from_parts(
    parts: Mapping[str, Split],
    classes: tuple[str, ...],
    test_ratio: float,
    seed: int,
    category_ids: tuple[int | None, ...] | None = None,
    *,
    by_class: bool = False,
) -> Loaded:
    """Return data in the parts train, val and test. Without val and test, `test_ratio` of train is held out, `by_class` if so."""
    train, test = parts["train"], parts.get("test", parts.get("val"))
    by_class &= test is None
    if test is None:
        train, test = hold_out(train, test_ratio, seed, by_class=by_class)
        words = "there is no val or test split: %d of the %d images are held out%s (data.test_ratio %g)"
        log.info(words, len(test), len(parts["train"]), ", class by class" if by_class else "", test_ratio)
    valid = parts.get("val") if "test" in parts else None
    return Loaded(train, test, classes, category_ids, valid=valid, by_class=by_class)


def warn_of_absent_classes(what: str, part: str, absent: Sequence[str]) -> None:
    if absent:
        names = one_line(", ".join(absent[:10])) + (f" and {len(absent) - 10} others" if len(absent) > 10 else "")
        log.warning("no %s in %s is of the class %s", what, part, names)


def _first_of_each_class(order: Tensor, labels: Tensor, n: int) -> Tensor:
    """Reorder so that the first `n` are as many of each class as its share, rounded; at least one of each class comes later."""
    counts = labels.bincount()
    shares = counts * n / len(labels)
    taken = shares.floor().long()
    by_remainder = (taken + 1 - shares + (taken + 1 >= counts)).argsort(stable=True)
    taken[by_remainder[: n - int(taken.sum())]] += 1
    of_class = labels[order]
    places = torch.empty_like(order)  # of each sample among those of its class
    for label in range(len(counts)):
        places[of_class == label] = torch.arange(int(counts[label]))
    is_taken = places < taken[of_class]
    return torch.cat([order[is_taken], order[~is_taken]])
