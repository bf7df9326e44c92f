"""User images, outside any dataset: found, read, and prepared as a model's validation images are."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.pipeline.augment import Normalize
from datasets.pipeline.images import IMAGE_ENDINGS, EvaluationImages, ImageFile, UnreadableImage
from datasets.pipeline.masks import IGNORED, ReadForEvaluation
from datasets.pipeline.workers import Packed
from engine.build import dataset_spec, workers
from engine.config.errors import RunError
from engine.inference.trained import Trained

FEW = 64  # images are read faster than a worker starts
LUMA = (19595, 38470, 7471)  # weights of red, green and blue, in 1/65536, as in Pillow's conversion to gray (ITU-R BT.601)


def find_images(words: Sequence[str]) -> list[Path]:
    """Return the images that files, folders and globs name, each once, in this order."""
    return [Path(name) for name in image_names(words)]


def image_names(words: Sequence[str]) -> list[str]:
    """Return the same as names, which need a tenth of the memory."""
    return list(dict.fromkeys(name for word in words for name in _images_of(word)))


def _images_of(word: str) -> Iterator[str]:
    path = os.path.expanduser(word)
    if os.path.isdir(path):
        images, why = _in_folder(path), f"{path}: no image in this folder ({', '.join(IMAGE_ENDINGS)})"
    elif not os.path.exists(path) and has_magic(path):
        found = glob(path, recursive=True)
        images, why = (name for name in sorted(found) if _is_image(name)), f"{word}: no image matches"
    else:
        images, why = iter([path] if os.path.isfile(path) else []), f"{path}: no such image"
    first = next(images, None)
    if first is None:
        raise RunError(why)
    yield first
    yield from images


def _in_folder(folder: str) -> Iterator[str]:
    for inside, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(inside, name) for name in sorted(names) if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


class ReadBatch(NamedTuple):
    places: list[int]  # indices of the images in the list of paths
    batch: Any  # the task's input, with empty targets; None if no image could be read
    sizes: list[tuple[int, int]]  # of the images in their files: height, width
    unreadable: list[str]  # why others could not be read; each line names its file


def read_images(trained: Trained, paths: Sequence[str | Path], batch_size: int) -> Iterator[ReadBatch]:
    """Yield the images in batches; only those that are being read are in memory."""
    reading = workers(trained.config)
    reading = replace(reading, num_workers=min(reading.num_workers, len(paths) // FEW))
    read, batched = _reader(trained)
    reader = _Reader(np.array([os.fsencode(path) for path in paths]), read, trained.config.data.exif_rotate)
    loader = DataLoader(reader, batch_size, collate_fn=_collated, **reading.options())
    for places, packed, sizes, unreadable in loader:
        batch = None
        if places:
            packed = Packed(packed.flat.to(trained.accelerator.device), packed.shapes)
            batch = batched(packed, sizes)
        yield ReadBatch(places, batch, sizes, unreadable)


def batches_of(trained: Trained, paths: Sequence[str | Path], batch_size: int) -> Iterator[Any]:
    """Yield the batches; an unreadable image raises RunError."""
    for read in read_images(trained, paths, batch_size):
        if read.unreadable:
            raise RunError(read.unreadable[0])
        yield read.batch


Read = Callable[[ImageFile], Tensor]  # in a worker: C H W, uint8
Batched = Callable[[Packed, list[tuple[int, int]]], Any]  # makes the task's input


def _reader(trained: Trained) -> tuple[Read, Batched]:
    """Return how to read an image, as for an evaluation, and how to make the task's input of a batch."""
    config, prepare, spec = trained.config, trained.prepare, dataset_spec(trained.config)
    if spec.channels not in (1, 3):
        raise RunError(f"{spec.name} has {spec.channels} channels; an image in a file has 3, or is converted to gray")
    if spec.targets == "boxes":
        return ImageFile.tensor, lambda packed, sizes: ([image / 255 for image in packed.unpacked()], None)
    normalize = trained.normalize
    assert isinstance(normalize, Normalize), "only detectors normalize images themselves"

    def batched(packed: Packed, sizes: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor] | None]:
        inputs = normalize(packed.flat.view(len(packed.shapes), *packed.shapes[0]))
        if spec.targets != "masks":
            return inputs, None
        ignored = torch.tensor(IGNORED, dtype=torch.uint8, device=inputs.device)  # each pixel of the masks
        return inputs, [ignored.expand(size) for size in sizes]

    if spec.targets == "masks":
        return partial(_whole, ReadForEvaluation(prepare, IGNORED)), batched
    if spec.in_files and not config.data.args.get("in_memory"):
        read = EvaluationImages.of(prepare).prepared
    else:  # first scaled to the size of the dataset's images, and from there to the model's size
        is_of_any_size = spec.in_files or spec.any_size
        own_size = (config.data.img_size or spec.img_size) if is_of_any_size else spec.img_size
        read = EvaluationImages(own_size, crop_pct=1.0, interpolation="bilinear").prepared
    return partial(_gray, read) if spec.channels == 1 else read, batched


def _gray(read: Read, file: ImageFile) -> Tensor:
    summed = (read(file).int() * torch.tensor(LUMA, dtype=torch.int32).view(3, 1, 1)).sum(0, keepdim=True)
    return ((summed + 0x8000) >> 16).to(torch.uint8)


def _whole(evaluation: ReadForEvaluation, file: ImageFile) -> Tensor:
    return evaluation.prepared(file.tensor())


@dataclass
class _Reader(Dataset):
    """The state of a worker: the names of the files, as one array of bytes, and how to read them."""

    paths: np.ndarray
    read: Read
    exif_rotate: bool

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str, tuple[int, int]]:
        try:
            file = ImageFile(os.fsdecode(self.paths[place]), self.exif_rotate)
            return place, self.read(file), (file.height, file.width)
        except UnreadableImage as error:
            return place, str(error), (0, 0)


def _collated(read: Sequence[tuple]) -> tuple[list[int], Packed | None, list[tuple[int, int]], list[str]]:
    present = [item for item in read if isinstance(item[1], Tensor)]
    unreadable = [why for _, why, _ in read if isinstance(why, str)]
    places, images, sizes = map(list, zip(*present, strict=True)) if present else ([], [], [])
    return places, Packed.of(images) if present else None, sizes, unreadable
