"""Images of somebody's own: found, read, and prepared as a model's validation images are."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.files import IMAGE_ENDINGS, EvaluationImages, UnreadableImage
from engine.builder import dataset_of, workers
from engine.errors import RunError
from engine.trained import Trained

FEW = 64  # images, which are read before a worker has started
LUMA = (19595, 38470, 7471)  # of red, green and blue, of 65536: how Pillow makes a grey image (ITU-R BT.601)


def find_images(words: Sequence[str]) -> list[Path]:
    """The images that files, folders (with what is in them) and globs mean, each once, in this order."""
    return [Path(name) for name in image_names(words)]


def image_names(words: Sequence[str]) -> list[str]:
    """The same by name, which takes a tenth of the memory."""
    return list(dict.fromkeys(name for word in words for name in _images_of(word)))


def _images_of(word: str) -> Iterator[str]:
    path = os.path.expanduser(word)
    if os.path.isdir(path):
        images, why = _in_folder(path), f"{path}: there is no image in this folder ({', '.join(IMAGE_ENDINGS)})"
    elif not os.path.exists(path) and has_magic(path):
        found = glob(path, recursive=True)
        images, why = (name for name in sorted(found) if _is_image(name)), f"{word}: no image has such a name"
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
    places: list[int]  # of the images below, among the paths
    images: Tensor | None  # normalised, on the model's device; None where there are none
    unreadable: list[str]  # why others aren't there; each line names its file


def read_images(trained: Trained, paths: Sequence[str | Path], batch_size: int) -> Iterator[ReadBatch]:
    """The images in batches, as many as are read at a time held in memory."""
    several = workers(trained.config)
    several = replace(several, num_workers=min(several.num_workers, len(paths) // FEW))
    reader = _Reader(np.array([os.fsencode(path) for path in paths]), *_how(trained))
    loader = DataLoader(reader, batch_size, collate_fn=_collated, **several.options())
    for places, images, unreadable in loader:
        if images is not None:
            images = trained.normalise(images.to(trained.accelerator.device))
        yield ReadBatch(places, images, unreadable)


def batches_of(trained: Trained, paths: Sequence[str | Path], batch_size: int) -> Iterator[Tensor]:
    """The images of the batches, where all must be readable."""
    for batch in read_images(trained, paths, batch_size):
        if batch.unreadable:
            raise RunError(batch.unreadable[0])
        yield batch.images


def _how(trained: Trained) -> tuple[EvaluationImages, int]:
    """How an image becomes one of the set, before it is normalised, and its channels.

    An image for a set that is held in memory is scaled to the size of the set's own, from which the model's size is made as in an
    evaluation. Otherwise it is prepared from its file as those of the set are.
    """
    config, prepare, spec = trained.config, trained.prepare, dataset_of(trained.config)
    if spec.channels not in (1, 3):
        raise RunError(f"{spec.name} has {spec.channels} channels; an image in a file has 3, or is made grey")
    if spec.in_files and not config.data.args.get("in_memory"):
        return EvaluationImages(prepare.img_size, prepare.crop_pct, prepare.interpolation), spec.channels
    is_of_any_size = spec.in_files or spec.any_size
    own_size = (config.data.img_size or spec.img_size) if is_of_any_size else spec.img_size
    return EvaluationImages(own_size, crop_pct=1.0, interpolation="bilinear"), spec.channels


@dataclass
class _Reader(Dataset):
    """What a worker knows: the names of the files, as one array of bytes, and how they are read."""

    paths: np.ndarray
    evaluation: EvaluationImages
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        try:
            image = self.evaluation.read(os.fsdecode(self.paths[place]))
        except UnreadableImage as error:
            return place, str(error)
        return place, _grey(image) if self.channels == 1 else image


def _grey(image: Tensor) -> Tensor:
    summed = (image.int() * torch.tensor(LUMA, dtype=torch.int32).view(3, 1, 1)).sum(0, keepdim=True)
    return ((summed + 0x8000) >> 16).to(torch.uint8)


def _collated(read: Sequence[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, list[str]]:
    there = [(place, image) for place, image in read if isinstance(image, Tensor)]
    unreadable = [why for _, why in read if isinstance(why, str)]
    return [place for place, _ in there], torch.stack([image for _, image in there]) if there else None, unreadable
