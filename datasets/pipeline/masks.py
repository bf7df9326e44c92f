"""Images with masks, which hold the class of every pixel, or IGNORED.

In memory, image and mask are augmented as one image of four channels. In files, workers read both and scale, crop and mirror them
together with torchvision's transforms. Evaluation keeps the masks at their own size. Its images are scaled so that the longer
side fits the network's input, and padded on the right and at the bottom.
"""

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from datasets.pipeline.augment import AUGMENT, ColorJitter, CropAndFlip
from datasets.pipeline.cores import usable_cores
from datasets.pipeline.counters import derive, draws
from datasets.pipeline.images import UPRIGHT, ImageFile, Request, UnreadableImage, distorted, jitter, problem_of, read_image_file
from datasets.pipeline.loaders import EvalLoader, FileEvaluation, FileTraining, TrainLoader
from datasets.pipeline.order import Order
from datasets.pipeline.preparation import Preparation
from datasets.pipeline.splits import Files, Images, warn_of_absent_classes
from datasets.pipeline.workers import Packed, StructuredBatches, Workers
from models.loading.files import MalformedFile, one_line, read_limited, replace_file

log = logging.getLogger(__name__)

MASK_ENDINGS, MASK_FORMATS = (".png", ".bmp", ".gif"), ("PNG", "BMP", "GIF")  # lossless
IGNORED = 255  # the label of pixels that neither the loss nor a metric counts
CHECKED = ".masks-checked"  # lists of files that passed check_masks: a digest of each, and the labels that occur in it
PASSED, MAX_PASSED, MAX_LINE = re.compile(rb"(?:([0-9a-f]{64})(?: ((?:\d{1,3},?)*))?\n)"), 1000, 64 + 256 * 4 + 2

Batch = tuple[Tensor, Tensor | list[Tensor]]  # normalized images B 3 H W; masks, uint8: B H W, for evaluation a list of H W


def fitted(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the size of an image whose longer side is scaled to `side`."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


@dataclass(frozen=True)
class MaskedImages(Images):
    labels: Tensor  # N H W, uint8

    def train_loader(self, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
        return InMemoryMaskTraining(self, order, prepare, device)


class InMemoryMaskTraining:
    def __init__(self, split: MaskedImages, order: Order, prepare: Preparation, device: torch.device) -> None:
        self.order = order
        # labels are raised by one, so that the zeros of the padding become IGNORED when one is subtracted
        both = torch.cat([split.images, (split.labels + 1).unsqueeze(1)], dim=1).to(device)
        self.cut = CropAndFlip(both, prepare.crop_padding, prepare.padding_mode, prepare.hflip, order.seed)
        self.jitter = ColorJitter(prepare.color_jitter, order.seed) if prepare.color_jitter else None
        self.normalize = prepare.normalize(device)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        for step in range(first, last):
            epoch, samples = self.order.epoch(step), self.order.samples(step)
            both = self.cut(epoch, samples)
            images, masks = both[:, :-1], both[:, -1] - 1
            if self.jitter is not None:
                images = self.jitter(epoch, samples, images)
            if masks.shape[-2:] != self.normalize.size:
                masks = F.interpolate(masks.unsqueeze(1), self.normalize.size, mode="nearest-exact").squeeze(1)
            yield self.normalize(images), masks


class Palette(NamedTuple):
    """The labels of colors, for masks in which a color means a class."""

    colors: np.ndarray  # red << 16 | green << 8 | blue, ascending
    labels: np.ndarray  # uint8

    def labels_of(self, pixels: np.ndarray) -> np.ndarray:
        """Return the labels H W of colors H W 3. ValueError for a color that isn't in the palette."""
        red, green, blue = (pixels[..., i].astype(np.uint32) for i in range(3))
        packed = red << 16 | green << 8 | blue
        found = np.searchsorted(self.colors, packed).clip(max=len(self.colors) - 1)
        if (unknown := self.colors[found] != packed).any():
            y, x = np.argwhere(unknown)[0].tolist()
            color = " ".join(map(str, pixels[y, x].tolist()))
            raise ValueError(f"the pixel at x={x}, y={y} has the color {color}, which is not in the palette")
        return self.labels[found]


@dataclass(frozen=True)
class MaskedFiles(Files):
    labels: np.ndarray  # N, bytes: the paths of the masks
    ignored: int = IGNORED  # the label in these files that means IGNORED
    palette: Palette | None = None  # None: the files hold labels

    def train_loader(self, order: Order, prepare: Preparation, workers: Workers, device: torch.device) -> TrainLoader:
        normalize, read = prepare.normalize(device), ReadForTraining(prepare, self.ignored, self.palette, order.seed)
        batches = StructuredBatches(read, lambda images, masks: (normalize(images), masks), workers, device)
        return FileTraining(self, order, batches, normalize)

    def eval_loader(self, batch_size: int, prepare: Preparation, workers: Workers, device: torch.device) -> EvalLoader:
        normalize, read = prepare.normalize(device), ReadForEvaluation(prepare, self.ignored, self.palette)
        batches = StructuredBatches(read, lambda images, masks: (normalize(images), masks), workers, device)
        return FileEvaluation(self, batch_size, batches)


class ReadForEvaluation:
    """Whole images, scaled and padded to the input size, and masks at their own size."""

    def __init__(self, prepare: Preparation, ignored: int, palette: Palette | None = None) -> None:
        self.side = prepare.img_size
        self.read_pair = partial(read_pair, ignored=ignored, palette=palette, exif_rotate=prepare.exif_rotate)
        self.fill = [round(255 * mean) for mean in prepare.mean]

    def __call__(self, request: Request) -> tuple[Tensor, Packed]:
        pairs = [self.read_pair(path, of_mask) for path, of_mask in zip(request.paths, request.targets, strict=True)]
        return torch.stack([self.prepared(image) for image, _ in pairs]), Packed.of([mask for _, mask in pairs])

    def prepared(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        image = v2.functional.resize(image, list(fitted(height, width, self.side)), antialias=True)
        return padded(image, self.side, self.fill)


class ReadForTraining:
    """A random square of image and mask at a random scale, optionally mirrored and with other colors."""

    def __init__(self, prepare: Preparation, ignored: int, palette: Palette | None, seed: int) -> None:
        self.side, self.seed = prepare.img_size, seed
        self.read_pair = partial(read_pair, ignored=ignored, palette=palette, exif_rotate=prepare.exif_rotate)
        self.zoom, self.augment, self.hflip = prepare.zoom, prepare.augment, prepare.hflip
        self.fill = [round(255 * mean) for mean in prepare.mean]
        self.jitter = jitter(prepare.color_jitter)

    def __call__(self, request: Request) -> tuple[Tensor, Tensor]:
        bits = draws(self.seed ^ AUGMENT, request.epoch, torch.from_numpy(request.samples), 4)
        numbers = (bits.T.double() / 2**31).tolist()
        images, masks = [], []
        for path, of_mask, sample, drawn in zip(request.paths, request.targets, request.samples.tolist(), numbers, strict=True):
            image, mask = self._cut(*self.read_pair(path, of_mask), *drawn)
            image = distorted(image, self.jitter, derive(self.seed, AUGMENT, request.epoch, sample))
            images.append(padded(image, self.side, self.fill))
            masks.append(padded(mask, self.side, IGNORED))
        return torch.stack(images), torch.stack(masks)

    def _cut(self, image: Tensor, mask: Tensor, zoom: float, y: float, x: float, mirrored: float) -> tuple[Tensor, Tensor]:
        """Cut the square out of both; it is smaller where the image ends."""
        height, width = image.shape[-2:]
        low, high = self.zoom
        scale = self.side / min(height, width) * (low + zoom * (high - low))
        y, x = (y, x) if self.augment else (0.5, 0.5)
        rows, columns = (min(length, max(1, round(self.side / scale))) for length in (height, width))
        top, left = int(y * (height - rows + 1)), int(x * (width - columns + 1))
        size = [min(self.side, max(1, round(length * scale))) for length in (rows, columns)]
        image, mask = (v2.functional.resized_crop(part, top, left, rows, columns, size, antialias=True) for part in (image, mask))
        if self.hflip and mirrored < 0.5:
            image, mask = v2.functional.horizontal_flip(image), v2.functional.horizontal_flip(mask)
        return image, mask


def padded(part: Tensor, side: int, fill: int | list[int]) -> Tensor:
    """Pad to a square, on the right and at the bottom."""
    height, width = part.shape[-2:]
    return v2.functional.pad(part, [0, 0, side - width, side - height], fill=fill).as_subclass(Tensor)


def read_pair(
    path: bytes, of_mask: bytes, *, ignored: int, palette: Palette | None = None, exif_rotate: bool = False
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Read an image and its mask. With `exif_rotate`, the mask is that of the turned image; it is not turned itself."""
    file, mask = _opened(os.fsdecode(path), os.fsdecode(of_mask), palette, exif_rotate)
    mask[mask == ignored] = IGNORED
    return tv_tensors.Image(file.tensor()), tv_tensors.Mask(torch.from_numpy(mask))


def _opened(path: str, of_mask: str, palette: Palette | None, exif_rotate: bool) -> tuple[ImageFile, np.ndarray]:
    """Open an image and read its mask. UnreadableImage if they differ in size."""
    image, mask = ImageFile(path, exif_rotate), read_mask(of_mask, palette)
    if mask.shape == (image.height, image.width):
        return image, mask
    size, turned = f"{image.width}x{image.height}", " after data.exif_rotate turned it" if image.turn is not UPRIGHT else ""
    raise UnreadableImage(f"{of_mask} is {mask.shape[1]}x{mask.shape[0]}, and its image {path} is {size}{turned}")


def read_mask(path: str, palette: Palette | None = None) -> np.ndarray:
    """Return H W, uint8. Without `palette`, the labels of a file with a palette are its indices."""
    try:
        with Image.open(io.BytesIO(read_image_file(path)), formats=MASK_FORMATS) as image:
            if palette is not None and image.mode in ("P", "L", "1", "RGB", "RGBA"):
                return palette.labels_of(np.asarray(image.convert("RGB")))
            if image.mode not in ("P", "L", "1"):
                expected = "a mask has one number of 8 bits per pixel, or colors of which data.palette names a list"
                raise ValueError(f"its mode is {image.mode}; {expected}")
            return np.array(image, dtype=np.uint8)
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        raise UnreadableImage(f"{one_line(path)}: this mask can't be read ({problem_of(error)})") from error


def check_masks(parts: Mapping[str, MaskedFiles], classes: Sequence[str], exif_rotate: bool = False) -> None:
    """Raise OSError for the first mask that differs in size from its image or has a label that is out of range.

    Classes that no pixel of a part has are named in a warning.
    """
    for part, split in parts.items():
        found = _labels_of_checked(split, len(classes), exif_rotate)
        warn_of_absent_classes("pixel", part, [name for label, name in enumerate(classes) if label not in found])


def _labels_of_checked(split: MaskedFiles, n_classes: int, exif_rotate: bool) -> set[int]:
    """Return the labels that occur.

    Masks that passed are not read again: a digest of the files' names, sizes and times is kept in their folder, if writable.
    """
    names = [os.fsdecode(name) for name in (*split.paths, *split.labels)]
    facts = [(name, status.st_size, status.st_mtime_ns) for name, status in ((name, os.stat(name)) for name in names)]
    palette = [part.tolist() for part in split.palette or ()]
    content = json.dumps([n_classes, split.ignored, palette, exif_rotate, facts])
    digest = hashlib.sha256(content.encode()).hexdigest().encode()
    note, passed = Path(os.fsdecode(split.labels[0])).parent / CHECKED, dict[bytes, bytes]()
    if note.exists():
        try:
            noted = read_limited(note, MAX_LINE * MAX_PASSED)
            if PASSED.sub(b"", noted):
                raise MalformedFile(note, "it is damaged")
            lines = PASSED.finditer(noted)
            passed = {line[1]: line[2] for line in lines if line[2] is not None}  # None: written by an older version
        except OSError as error:
            log.warning("%s; the masks are checked again", error)
    if digest in passed:
        return {int(label) for label in passed[digest].split(b",") if label}
    found: set[int] = set()
    with ThreadPoolExecutor(usable_cores()) as pool:  # decoders release Python's global lock
        try:
            found.update(*pool.map(lambda i: labels_of_mask(split, i, n_classes, exif_rotate), range(len(split))))
        except UnreadableImage as error:
            pool.shutdown(cancel_futures=True)
            raise OSError(str(error)) from error
    passed[digest] = b",".join(b"%d" % label for label in sorted(found))
    try:
        replace_file(note, b"".join(b"%s %s\n" % line for line in [*passed.items()][-MAX_PASSED:]))
    except OSError as error:
        log.info("%s can't be written (%s); the masks are checked each time", note, error.strerror)
    return found


def labels_of_mask(split: MaskedFiles, i: int, n_classes: int, exif_rotate: bool = False) -> list[int]:
    """Return the labels of a mask, without the ignored one. UnreadableImage if it doesn't fit its image or the classes."""
    of_mask = os.fsdecode(split.labels[i])
    _, mask = _opened(os.fsdecode(split.paths[i]), of_mask, split.palette, exif_rotate)
    found = [label for label in np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist() if label != split.ignored]
    if found and found[-1] >= n_classes:
        label = next(label for label in found if label >= n_classes)
        classes = f"there are {n_classes} classes, 0 to {n_classes - 1}, and {split.ignored} is ignored"
        raise UnreadableImage(f"{of_mask}: the label {label} is out of range; {classes}")
    return found


def highest_label(split: MaskedFiles) -> int:
    masks = (read_mask(os.fsdecode(path)) for path in split.labels)
    return max(int(mask[mask != split.ignored].max(initial=0)) for mask in masks)
