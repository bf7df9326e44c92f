"""Images with masks: the class of every pixel, or IGNORED.

In memory, image and mask are augmented as one picture of four channels. In files, they are read by workers and scaled, cropped
and mirrored together by torchvision's transforms for tv_tensors. A batch of evaluation has the masks at their own size: the
network's input shows the whole image, scaled so that its longer side fits, in the upper left corner, and the rest is filled up.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from datasets.pipeline.augment import AUGMENT, ColorJitter, CropAndFlip, Normalize
from datasets.pipeline.counters import derive, draws
from datasets.pipeline.images import ImageFile, UnreadableImage, seeded
from datasets.pipeline.loaders import EvalLoader, Preparation, TrainLoader, Workers
from datasets.pipeline.order import Order
from datasets.pipeline.splits import Files, Images
from datasets.pipeline.workers import Packed, Request, SceneBatches, evaluation_requests, first_problem, training_requests

IGNORED = 255  # the label of pixels that neither a loss nor a metric counts
CHECKED = ".masks-checked"  # holds the digest of the list of files that were found to be right

Batch = tuple[Tensor, Tensor | list[Tensor]]  # normalized images B 3 H W; masks, uint8: B H W, or for evaluation each of its size


def fitted(height: int, width: int, side: int) -> tuple[int, int]:
    """The size of an image whose longer side is scaled to `side`."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


# In memory


@dataclass(frozen=True)
class MaskedImages(Images):
    labels: Tensor  # N H W, uint8

    def train_loader(self, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
        return InMemoryMaskTraining(self, order, prepare, device)

    def eval_loader(self, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> EvalLoader:
        return InMemoryMaskEvaluation(self, batch_size, prepare, device)


class InMemoryMaskTraining:
    def __init__(self, split: MaskedImages, order: Order, prepare: Preparation, device: torch.device) -> None:
        self.order = order
        # masks are held one higher, so that the zeros of the padding are IGNORED
        pictures = torch.cat([split.images, (split.labels + 1).unsqueeze(1)], dim=1)
        self.cut = CropAndFlip(
            pictures.to(device),
            padding=prepare.crop_padding if prepare.augment else 0,
            padding_mode=prepare.padding_mode,
            hflip=prepare.augment and prepare.hflip,
            seed=order.seed,
        )
        self.jitter = ColorJitter(prepare.color_jitter, order.seed) if prepare.augment and prepare.color_jitter else None
        self.normalize = Normalize(prepare.mean, prepare.std, prepare.img_size, device)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for step in range(first, last):
            epoch, samples = self.order.epoch(step), self.order.samples(step)
            pictures = self.cut(epoch, samples)
            images, masks = pictures[:, :-1], pictures[:, -1] - 1
            if self.jitter is not None:
                images = self.jitter(epoch, samples, images)
            yield self.normalize(images), self._resized(masks)

    def _resized(self, masks: Tensor) -> Tensor:
        if masks.shape[-2:] == self.normalize.size:
            return masks
        return F.interpolate(masks.unsqueeze(1), self.normalize.size, mode="nearest-exact").squeeze(1)


class InMemoryMaskEvaluation:
    def __init__(self, split: MaskedImages, batch_size: int, prepare: Preparation, device: torch.device) -> None:
        self.images, self.masks = split.images.to(device), split.labels.to(device)
        self.batch_size = batch_size
        self.normalize = Normalize(prepare.mean, prepare.std, prepare.img_size, device)

    def batches(self) -> Iterator[Batch]:
        for images, masks in zip(self.images.split(self.batch_size), self.masks.split(self.batch_size), strict=True):
            yield self.normalize(images), masks


# In files


@dataclass(frozen=True)
class MaskedFiles(Files):
    labels: np.ndarray  # N, bytes: the paths of the masks
    ignored: int = IGNORED  # the label in these files that means IGNORED

    def subset(self, indices: Tensor) -> "MaskedFiles":
        return replace(self, paths=self.paths[indices.numpy()], labels=self.labels[indices.numpy()])

    def train_loader(self, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
        return FileMaskTraining(self, order, prepare, workers, device)

    def eval_loader(self, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> EvalLoader:
        return FileMaskEvaluation(self, batch_size, prepare, workers, device)


class FileMaskTraining:
    def __init__(self, split: MaskedFiles, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> None:
        self.split, self.order = split, order
        self.normalize = Normalize(prepare.mean, prepare.std, prepare.img_size, device)
        self.read = SceneBatches(ReadForTraining(prepare, split.ignored, order.seed), workers, device)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for images, masks in self.read(training_requests(self.split.paths, self.split.labels, self.order, first, last)):
            yield self.normalize(images), masks


class FileMaskEvaluation:
    def __init__(self, split: MaskedFiles, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> None:
        self.split, self.batch_size = split, batch_size
        self.normalize = Normalize(prepare.mean, prepare.std, prepare.img_size, device)
        self.read = SceneBatches(ReadForEvaluation(prepare, split.ignored), workers, device)

    def batches(self) -> Iterator[Batch]:
        for images, masks in self.read(evaluation_requests(self.split.paths, self.split.labels, self.batch_size)):
            yield self.normalize(images), masks


class ReadForEvaluation:
    def __init__(self, prepare: Preparation, ignored: int) -> None:
        self.side, self.ignored = prepare.img_size, ignored
        self.fill = [round(255 * mean) for mean in prepare.mean]

    def __call__(self, request: Request) -> tuple[Tensor, Packed]:
        pairs = [read_pair(*names, self.ignored) for names in zip(request.paths, request.targets, strict=True)]
        return torch.stack([self.prepared(image) for image, _ in pairs]), Packed.of([mask for _, mask in pairs])

    def prepared(self, image: tv_tensors.Image) -> Tensor:
        image = v2.functional.resize(image, list(fitted(*image.shape[-2:], self.side)), antialias=True)
        return filled_up(image, self.side, self.fill)


class ReadForTraining:
    """A random square of image and mask at a random scale, maybe mirrored and with other colors."""

    def __init__(self, prepare: Preparation, ignored: int, seed: int) -> None:
        self.side, self.ignored, self.seed = prepare.img_size, ignored, seed
        self.zoom = prepare.zoom if prepare.augment else (1.0, 1.0)
        self.augment, self.hflip = prepare.augment, prepare.augment and bool(prepare.hflip)
        self.fill = [round(255 * mean) for mean in prepare.mean]
        strength = prepare.color_jitter if prepare.augment else 0.0
        self.jitter = v2.ColorJitter(strength, strength, strength) if strength else None

    def __call__(self, request: Request) -> tuple[Tensor, Tensor]:
        samples = torch.from_numpy(request.samples)
        numbers = (draws(self.seed ^ AUGMENT, request.epoch, samples, 4).T.double() / 2**31).tolist()
        images, masks = [], []
        for path, of_mask, sample, drawn in zip(request.paths, request.targets, request.samples.tolist(), numbers, strict=True):
            image, mask = self._cut(*read_pair(path, of_mask, self.ignored, fast=True), *drawn)
            if self.jitter is not None:
                with seeded(derive(self.seed, AUGMENT, request.epoch, sample)):
                    image = self.jitter(image)
            images.append(filled_up(image, self.side, self.fill))
            masks.append(filled_up(mask, self.side, IGNORED))
        return torch.stack(images), torch.stack(masks)

    def _cut(
        self, image: tv_tensors.Image, mask: tv_tensors.Mask, zoom: float, y: float, x: float, mirrored: float
    ) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """The part of the image that the square shows; it is smaller than the square where the image ends."""
        height, width = image.shape[-2:]
        low, high = self.zoom
        scale = self.side / min(height, width) * (low + zoom * (high - low))
        y, x = (y, x) if self.augment else (0.5, 0.5)
        rows, columns = (min(length, max(1, round(self.side / scale))) for length in (height, width))
        top, left = int(y * (height - rows + 1)), int(x * (width - columns + 1))
        size = [min(self.side, max(1, round(length * scale))) for length in (rows, columns)]
        both = (v2.functional.resized_crop(part, top, left, rows, columns, size, antialias=True) for part in (image, mask))
        return tuple(v2.functional.horizontal_flip(part) if self.hflip and mirrored < 0.5 else part for part in both)


def filled_up(part: Tensor, side: int, fill: int | list[int]) -> Tensor:
    """To a square, on the right and at the bottom."""
    height, width = part.shape[-2:]
    return v2.functional.pad(part, [0, 0, side - width, side - height], fill=fill).as_subclass(Tensor)


def read_pair(path: bytes, of_mask: bytes, ignored: int, *, fast: bool = False) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    file, mask = ImageFile(os.fsdecode(path)), read_mask(os.fsdecode(of_mask))
    if mask.shape != (file.height, file.width):
        raise UnreadableImage(_of_other_size(os.fsdecode(of_mask), mask.shape, file))
    pixels = file.decode_fast() if fast else np.array(file.decode())  # H W C
    mask[mask == ignored] = IGNORED
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(mask))


def read_mask(path: str) -> np.ndarray:
    """H W, uint8: of a picture with a palette, the numbers of the colors."""
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L", "1"):
                raise ValueError(f"its mode is {picture.mode}; a mask has one number of 8 bits per pixel")
            return np.array(picture, dtype=np.uint8)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise UnreadableImage(f"{path}: this mask can't be read ({str(error).splitlines()[0]})") from error


# What must be right before the first step


def check_masks(split: MaskedFiles, n_classes: int) -> None:
    """Every mask has the size of its image and no label beyond the classes; OSError names the first that hasn't.

    It is looked at once: a digest of the files' names, sizes and times is kept beside the masks, where that can be written.
    """
    names = [os.fsdecode(name) for name in (*split.paths, *split.labels)]
    facts = [(name, status.st_size, status.st_mtime_ns) for name, status in ((name, os.stat(name)) for name in names)]
    digest = hashlib.sha256(json.dumps([n_classes, split.ignored, facts]).encode()).hexdigest()
    note = Path(os.fsdecode(split.labels[0])).parent / CHECKED
    if note.is_file() and digest in note.read_text().split():
        return
    if problem := first_problem(lambda i: what_is_wrong(split, i, n_classes), len(split)):
        raise OSError(problem)
    try:
        with note.open("a") as file:
            file.write(f"{digest}\n")
    except OSError:
        return  # they are looked at again next time


def what_is_wrong(split: MaskedFiles, i: int, n_classes: int) -> str | None:
    of_mask = os.fsdecode(split.labels[i])
    try:
        image, mask = ImageFile(os.fsdecode(split.paths[i])), read_mask(of_mask)
    except UnreadableImage as error:
        return str(error)
    if mask.shape != (image.height, image.width):
        return _of_other_size(of_mask, mask.shape, image)
    found = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    beyond = [label for label in found.tolist() if label >= n_classes and label != split.ignored]
    if beyond:
        return (
            f"{of_mask}: the label {beyond[0]} is out of range; there are {n_classes} classes, 0 to {n_classes - 1}, and "
            f"{split.ignored} is ignored"
        )
    return None


def _of_other_size(of_mask: str, mask: tuple[int, int], image: ImageFile) -> str:
    return f"{of_mask} is {mask[1]}x{mask[0]}, and its image {image.path} is {image.width}x{image.height}"


def highest_label(masks: np.ndarray, ignored: int) -> int:
    def highest(path: bytes) -> int:
        labels = read_mask(os.fsdecode(path))
        return int(labels[labels != ignored].max(initial=0))

    return max(map(highest, masks))
