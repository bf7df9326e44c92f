"""Images of somebody's own: found, read, and prepared as a model's validation images are."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.pipeline.images import IMAGE_ENDINGS, EvaluationImages, ImageFile, UnreadableImage
from datasets.pipeline.masks import IGNORED, ReadForEvaluation
from datasets.pipeline.workers import Packed
from engine.build import dataset_spec, workers
from engine.config.errors import RunError
from engine.inference.trained import Trained

FEW = 64  # images, which are read before a worker has started
LUMA = (19595, 38470, 7471)  # of red, green and blue, of 65536: how Pillow makes a gray image (ITU-R BT.601)


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
    batch: Any  # what the task predicts from, with targets that say nothing; None where no image is there
    sizes: list[tuple[int, int]]  # of these images in their files: height, width
    unreadable: list[str]  # why others aren't there; each line names its file


def read_images(trained: Trained, paths: Sequence[str | Path], batch_size: int) -> Iterator[ReadBatch]:
    """The images in batches, as many as are read at a time held in memory."""
    several = workers(trained.config)
    several = replace(several, num_workers=min(several.num_workers, len(paths) // FEW))
    read, batched = _how(trained)
    reader = _Reader(np.array([os.fsencode(path) for path in paths]), read)
    loader = DataLoader(reader, batch_size, collate_fn=_collated, **several.options())
    for places, packed, sizes, unreadable in loader:
        batch = None
        if places:
            packed = Packed(packed.flat.to(trained.accelerator.device), packed.shapes)
            batch = batched(packed, sizes)
        yield ReadBatch(places, batch, sizes, unreadable)


def batches_of(trained: Trained, paths: Sequence[str | Path], batch_size: int) -> Iterator[Any]:
    """The batches, where all images must be readable."""
    for read in read_images(trained, paths, batch_size):
        if read.unreadable:
            raise RunError(read.unreadable[0])
        yield read.batch


Read = Callable[[Image.Image], Tensor]  # in a worker: C H W, uint8
Batched = Callable[[Packed, list[tuple[int, int]]], Any]  # what the task takes of them


def _how(trained: Trained) -> tuple[Read, Batched]:
    spec = dataset_spec(trained.config)
    if spec.channels not in (1, 3):
        raise RunError(f"{spec.name} has {spec.channels} channels; an image in a file has 3, or is made gray")
    return {"classes": _for_classes, "masks": _for_masks, "boxes": _for_boxes}[spec.targets](trained)


def _for_classes(trained: Trained) -> tuple[Read, Batched]:
    """As the images of the set are prepared for an evaluation.

    An image for a set that is held in memory is scaled to the size of the set's own, from which the model's size is made as in an
    evaluation. Otherwise it is prepared from its file as those of the set are.
    """
    config, prepare, spec = trained.config, trained.prepare, dataset_spec(trained.config)
    if spec.in_files and not config.data.args.get("in_memory"):
        read = EvaluationImages(prepare.img_size, prepare.crop_pct, prepare.interpolation).prepared
    else:
        is_of_any_size = spec.in_files or spec.any_size
        own_size = (config.data.img_size or spec.img_size) if is_of_any_size else spec.img_size
        read = EvaluationImages(own_size, crop_pct=1.0, interpolation="bilinear").prepared
    return partial(_gray, read) if spec.channels == 1 else read, lambda packed, sizes: (trained.normalize(_stacked(packed)), None)


def _for_masks(trained: Trained) -> tuple[Read, Batched]:
    """The whole image, and a mask of its size in which no pixel has a class."""

    def batched(packed: Packed, sizes: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        nothing = torch.tensor(IGNORED, dtype=torch.uint8, device=trained.accelerator.device)
        return trained.normalize(_stacked(packed)), [nothing.expand(size) for size in sizes]

    return partial(_whole, ReadForEvaluation(trained.prepare, IGNORED)), batched


def _for_boxes(trained: Trained) -> tuple[Read, Batched]:
    return _pixels, lambda packed, sizes: ([image / 255 for image in packed.unpacked()], None)


def _stacked(packed: Packed) -> Tensor:
    return packed.flat.view(len(packed.shapes), *packed.shapes[0])


def _gray(read: Read, image: Image.Image) -> Tensor:
    summed = (read(image).int() * torch.tensor(LUMA, dtype=torch.int32).view(3, 1, 1)).sum(0, keepdim=True)
    return ((summed + 0x8000) >> 16).to(torch.uint8)


def _whole(evaluation: ReadForEvaluation, image: Image.Image) -> Tensor:
    return evaluation.prepared(_pixels(image))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass
class _Reader(Dataset):
    """What a worker knows: the names of the files, as one array of bytes, and how they are read."""

    paths: np.ndarray
    read: Read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str, tuple[int, int]]:
        try:
            file = ImageFile(os.fsdecode(self.paths[place]))
            return place, self.read(file.decode()), (file.height, file.width)
        except UnreadableImage as error:
            return place, str(error), (0, 0)


def _collated(read: Sequence[tuple]) -> tuple[list[int], Packed | None, list[tuple[int, int]], list[str]]:
    there = [item for item in read if isinstance(item[1], Tensor)]
    unreadable = [why for _, why, _ in read if isinstance(why, str)]
    places, images, sizes = map(list, zip(*there, strict=True)) if there else ([], [], [])
    return places, Packed.of(images) if there else None, sizes, unreadable
