"""Images in files: decoded, cropped and scaled by workers, a batch of bytes at a time.

A request carries the paths of its batch, so that a worker holds no list of files. Everything random is drawn from (seed, epoch,
sample). All pixels are those that Pillow decodes, except in training crops of a JPEG that was decoded at a fraction of its size.
Evaluation also scales as Pillow does, as published accuracies were measured. docs/performance.md has the deviations.
"""

import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError, features
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from datasets.pipeline.augment import AUGMENT
from datasets.pipeline.counters import derive, draws
from datasets.pipeline.places import read_place, shown
from datasets.pipeline.preparation import Preparation
from models.loading.files import first_line

log = logging.getLogger(__name__)

HAS_AVIF, HAS_HEIF = features.check("avif"), find_spec("pillow_heif") is not None
IMAGE_ENDINGS: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_ENDINGS += ((".avif",) if HAS_AVIF else ()) + ((".heic", ".heif") if HAS_HEIF else ())
IMAGE_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS: Pillow would run Ghostscript
IMAGE_FORMATS += ("AVIF",) if HAS_AVIF else ()
PACKAGES = {".heic": "pip install pillow-heif", ".heif": "pip install pillow-heif", ".avif": "pip install --upgrade pillow"}
N_SAMPLED = 100  # files whose orientation is looked at before a training
MOST_DROPPED = 32  # rows or columns, in _part
MOST_OBLONG = 4  # times as long as wide: of longer images, evaluations scale only the center
PILLOW_MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels, an error, is at twice the size of the warning


class Turn(NamedTuple):
    """How the pixels in a file become an upright picture: rows become columns, then axes of C H W are reversed."""

    transposed: bool
    reversed: tuple[int, ...]
    method: Image.Transpose | None  # Pillow's name for it


UPRIGHT = Turn(False, (), None)
TURNS = {  # by the orientation in EXIF data
    2: Turn(False, (-1,), Image.Transpose.FLIP_LEFT_RIGHT),
    3: Turn(False, (-2, -1), Image.Transpose.ROTATE_180),
    4: Turn(False, (-2,), Image.Transpose.FLIP_TOP_BOTTOM),
    5: Turn(True, (), Image.Transpose.TRANSPOSE),
    6: Turn(True, (-1,), Image.Transpose.ROTATE_270),
    7: Turn(True, (-2, -1), Image.Transpose.TRANSVERSE),
    8: Turn(True, (-2,), Image.Transpose.ROTATE_90),
}


class UnreadableImage(OSError):
    """A file that isn't an image, or a broken one; the message names it."""


def max_pixels() -> int:
    """Return the size above which Pillow refuses an image, which may be a small file that takes gigabytes of memory."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 1 << 40)


def read_image_file(place: str) -> bytes:
    """Return the content of a place that may hold an image. It has no more bytes than the largest image takes decoded."""
    content = read_place(place, 4 * max_pixels())
    if not content:
        raise ValueError("it is empty")
    return content


def problem_of(error: Exception) -> str:
    """Return the reason why an image can't be read, in one line."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {max_pixels():,} pixels"
    reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return first_line(reason)


@dataclass(frozen=True)
class Request:
    """A batch for a worker to read."""

    paths: np.ndarray  # of bytes
    samples: np.ndarray  # the counters of the random numbers
    epoch: int = 0
    targets: Any = None  # a label, mask path or array of boxes for each path


class ImageFile:
    """A file, or a part of one (places.py), in memory. The size of its image is available before the pixels are decoded.

    `exif_rotate` turns it as the camera's EXIF data say. Published accuracies were measured without. Pillow does it by itself
    for TIFF and HEIC.
    """

    def __init__(self, path: str, exif_rotate: bool = False) -> None:
        self.path = path
        with self._naming_the_file():
            self.data = read_image_file(path)
            self.is_plain_jpeg = False
            if self.data.startswith(b"\xff\xd8"):
                with suppress(ValueError):  # then Pillow decides whether the file is readable
                    self.rows, self.columns, colors, _ = decode_jpeg_header(self.data)
                    self.is_plain_jpeg = colors in ("YCbCr", "Gray")
            if not self.is_plain_jpeg:
                self.columns, self.rows = self._opened().size
            if self.columns * self.rows > max_pixels():
                raise Image.DecompressionBombError
            if not self.columns * self.rows:
                raise ValueError("it has no pixels")
        self.turn = UPRIGHT
        if exif_rotate:
            with suppress(Exception):  # damaged EXIF data raise exceptions of many types, and the picture may be fine
                image = self._opened()
                orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
                self.turn = UPRIGHT if image.format == "TIFF" else TURNS.get(orientation, UPRIGHT)
        self.height, self.width = (self.columns, self.rows) if self.turn.transposed else (self.rows, self.columns)

    def decode(self) -> Image.Image:
        """Decode to RGB, and turn."""
        image = Image.fromarray(self.pixels()) if self.is_plain_jpeg else self._decoded_by_pillow()
        return image if self.turn.method is None else image.transpose(self.turn.method)

    def tensor(self) -> Tensor:
        """Decode to C H W in RGB, and turn."""
        return self.turned(torch.from_numpy(self.pixels()).permute(2, 0, 1))

    def pixels(self, shrink: int = 1, n_rows: int | None = None) -> np.ndarray:
        """Decode to H W C in RGB, not turned. For most JPEGs, `shrink` 2, 4 or 8 saves time by decoding at that fraction of the
        size, and `n_rows` by decoding only the upper rows, and a few more of which the last ones may be inexact.

        libjpeg-turbo decodes plain JPEGs, with the settings of Pillow and faster. Pillow decides about those with flaws.
        """
        if self.is_plain_jpeg:
            data, height = self._with_rows((n_rows or self.rows) + shrink)
            shape = (-(-height // shrink), -(-self.columns // shrink))
            pixels = np.empty((*shape, 3), np.uint8)
            try:
                return decode_jpeg(data, min_height=shape[0], min_width=shape[1], buffer=pixels)
            except ValueError as error:
                # libjpeg-turbo reports the first irregularity that it meets: here the rows above were correct
                if height < self.rows and str(error).endswith("extraneous bytes before marker 0xd9"):
                    return pixels
        return np.array(self._decoded_by_pillow())

    def _decoded_by_pillow(self) -> Image.Image:
        with self._naming_the_file():
            image = self._opened()
            image.load()
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                raise ValueError(f"its gray levels are numbers of mode {image.mode}, of unknown range; 8 and 16 bits can be read")
            if image.mode.startswith("I"):  # 16 bits, which `convert` would clip; in color, Pillow has dropped the lower 8
                levels, highest = np.array(image, np.uint32), 2 ** getattr(image, "tag_v2", {}).get(258, (16,))[0] - 1
                image = Image.fromarray(((levels * 255 + highest // 2) // highest).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")

    def turned(self, pixels: Tensor) -> Tensor:
        """Turn a part of the decoded image, C H W."""
        return (pixels.transpose(-2, -1) if self.turn.transposed else pixels).flip(self.turn.reversed)

    def in_file(self, box: "Box") -> "Box":
        """Return a box of the turned picture in rows and columns of the file."""
        top = self.height - box.top - box.height if -2 in self.turn.reversed else box.top
        left = self.width - box.left - box.width if -1 in self.turn.reversed else box.left
        return Box(left, top, box.width, box.height) if self.turn.transposed else Box(top, left, box.height, box.width)

    def _with_rows(self, n: int) -> tuple[bytes, int]:
        """Return the JPEG with a header of only `n` rows or a few more, after which its decoder stops, and their number."""
        n = -(-n // 16) * 16  # whole blocks
        if n >= self.rows:
            return self.data, self.rows
        height, width = (side.to_bytes(2, "big") for side in (self.rows, self.columns))
        frame = b"\xff\xc0\x00\x11\x08%b%b\x03"  # the start of frame of a sequential JPEG with three colors
        before, found, after = self.data.partition(frame % (height, width))
        if not found or b"\xff\xdd" in self.data:  # restart markers would be extraneous bytes too
            return self.data, self.rows
        return b"".join((before, frame % (n.to_bytes(2, "big"), width), after)), n

    def _opened(self) -> Image.Image:
        if HAS_HEIF and self.data[4:8] == b"ftyp":
            from pillow_heif import register_heif_opener  # type: ignore[import-not-found, unused-ignore]  # optional

            register_heif_opener()
            return Image.open(io.BytesIO(self.data), formats=(*IMAGE_FORMATS, "HEIF"))
        return Image.open(io.BytesIO(self.data), formats=IMAGE_FORMATS)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except UnidentifiedImageError as error:
            hint = PACKAGES.get(os.path.splitext(self.path)[1].lower())
            problem = "its content is not an image" + (f"; {hint} if it is one" if hint else "")
            raise UnreadableImage(f"{shown(self.path)}: this image can't be read ({problem})") from error
        except Exception as error:  # Pillow's decoders raise exceptions of any type
            raise UnreadableImage(f"{shown(self.path)}: this image can't be read ({problem_of(error)})") from error


def log_rotated(paths: np.ndarray) -> None:
    """Say how many of the first files `exif_rotate` would turn, if any. One that can't be read doesn't count."""
    n_rotated = 0
    for path in (first := paths[:N_SAMPLED]):
        with suppress(UnreadableImage):
            n_rotated += ImageFile(os.fsdecode(path), exif_rotate=True).turn is not UPRIGHT
    if n_rotated:
        message = "EXIF data rotate %d of the first %d training images, and are ignored; data.exif_rotate true turns such images"
        log.info(message, n_rotated, len(first))


class EvaluationImages:
    """The center crop of images whose shorter side was scaled to img_size / crop_pct, by Pillow or, in less time, by torch."""

    def __init__(
        self, img_size: int, crop_pct: float, interpolation: str, exif_rotate: bool = False, by_torch: bool = False
    ) -> None:
        self.exif_rotate, self.by_torch = exif_rotate, by_torch
        self.img_size, self.interpolation, self.mode = img_size, interpolation, PILLOW_MODES[interpolation]
        self.shorter_side = math.floor(img_size / crop_pct + 1e-6)  # 224 / (224 / 232) is slightly less than 232

    @classmethod
    def of(cls, prepare: Preparation) -> "EvaluationImages":
        return cls(prepare.img_size, prepare.crop_pct, prepare.interpolation, prepare.exif_rotate, prepare.resize_by_torch)

    def __call__(self, request: Request, out: Tensor) -> None:
        for path, into in zip(request.paths, out, strict=True):
            np.copyto(into.numpy(), self.read(os.fsdecode(path)).numpy())  # reorders in half the time of copy_

    def read(self, path: str) -> Tensor:
        return self.prepared(ImageFile(path, self.exif_rotate))

    def prepared(self, file: ImageFile) -> Tensor:
        size, shorter = self.img_size, min(file.height, file.width)
        height, width = (int(self.shorter_side * side / shorter) for side in (file.height, file.width))
        top, left = (round((side - size) / 2) for side in (height, width))
        image, is_oblong = file.tensor(), max(height, width) > MOST_OBLONG * self.shorter_side
        if self.by_torch and not is_oblong:
            return _interpolated(image, self.interpolation, size=(height, width))[:, top : top + size, left : left + size]
        pixels = image.permute(1, 2, 0).numpy()
        if is_oblong:  # the whole could have billions of pixels; its center alone rounds differently
            edges = (left / width, top / height, (left + size) / width, (top + size) / height)
            box = [min(edge * side, side) for edge, side in zip(edges, (file.width, file.height) * 2, strict=True)]
            crop = Image.fromarray(pixels).resize((size, size), self.mode, (box[0], box[1], box[2], box[3]))
        else:  # as Pillow does it, columns before rows, but without the rows and columns that the crop drops
            scale = file.height / height
            margin = 2 * max(1, scale) + 1  # the kernel's
            first, last = max(0, math.floor(top * scale - margin)), math.ceil((top + size) * scale + margin)
            rows = Image.fromarray(pixels[first:last])
            columns = rows.resize((width, rows.height), self.mode).crop((left, -first, left + size, file.height - first))
            crop = columns.resize((size, height), self.mode).crop((0, top, size, top + size))
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


def _interpolated(image: Tensor, mode: str, **options: Any) -> Tensor:
    """Scale C H W, a view of H W C, by torch's antialiased kernel, which is fastest in this layout."""
    batch = image.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2)  # its strides say that channels are last
    return F.interpolate(batch, mode=mode, antialias=True, **options)[0]


class Box(NamedTuple):
    top: int
    left: int
    height: int
    width: int


class TrainingImages:
    """A random part of each image, scaled to the requested size; optionally mirrored, distorted by a policy, and with a rectangle
    erased.

    Policies: RandAugment (Cubuk et al. 2019), https://arxiv.org/abs/1909.13719; TrivialAugment (Müller, Hutter 2021),
    https://arxiv.org/abs/2103.10158; AugMix (Hendrycks et al. 2019), https://arxiv.org/abs/1912.02781.
    Random Erasing: Zhong et al. (2017), https://arxiv.org/abs/1708.04896.
    """

    TRIES = 10  # for a box that fits into the image
    CROP, FLIP, ERASE = slice(0, 2 + 2 * TRIES), 2 + 2 * TRIES, slice(3 + 2 * TRIES, 8 + 2 * TRIES)  # the draws of each

    def __init__(self, prepare: Preparation, seed: int) -> None:
        self.scale, self.hflip, self.interpolation, self.seed = prepare.scale, prepare.hflip, prepare.interpolation, seed
        self.erasing, self.exif_rotate = prepare.erasing, prepare.exif_rotate
        self.mean = torch.tensor(prepare.mean).mul(255).round().to(torch.uint8).view(3, 1, 1)
        randaugment, bilinear = partial(v2.RandAugment, magnitude=prepare.magnitude), v2.InterpolationMode.BILINEAR
        policies = {"randaugment": randaugment, "trivialaugment": v2.TrivialAugmentWide, "augmix": v2.AugMix}
        policy = [policies[prepare.policy](interpolation=bilinear)] if prepare.policy else []
        self.distortions = [*policy, *jitter(prepare.color_jitter)]

    def __call__(self, request: Request, out: Tensor) -> None:
        bits = draws(self.seed ^ AUGMENT, request.epoch, torch.from_numpy(request.samples), self.ERASE.stop)
        numbers = (bits.T.double() / 2**31).tolist()
        for path, sample, of_sample, into in zip(request.paths, request.samples.tolist(), numbers, out, strict=True):
            image = self._cropped(ImageFile(os.fsdecode(path), self.exif_rotate), out.shape[-1], of_sample[self.CROP])
            if self.hflip and of_sample[self.FLIP] < 0.5:
                image = image.flip(-1)
            image = distorted(image, self.distortions, derive(self.seed, AUGMENT, request.epoch, sample))
            np.copyto(into.numpy(), image.numpy())
            draw, area, ratio, y, x = of_sample[self.ERASE]
            if draw < self.erasing:  # fill 2 % to 33 % of the area, of an aspect ratio from 0.3 to 1 / 0.3, with the mean color
                img_size = out.shape[-1]
                side, stretch = img_size * math.sqrt(0.02 + 0.31 * area), 0.3 ** (ratio - 0.5)
                height, width = (min(round(length), img_size) for length in (side * stretch, side / stretch))
                top, left = int(y * (img_size - height + 1)), int(x * (img_size - width + 1))
                into[:, top : top + height, left : left + width] = self.mean

    def _cropped(self, file: ImageFile, img_size: int, numbers: Sequence[float]) -> Tensor:
        box = random_box(file.height, file.width, self.scale, numbers)
        # decode at the smallest scale at which the box is no smaller than the result
        shrink = next((n for n in (8, 4, 2) if min(box.height, box.width) >= n * img_size), 1)
        box = file.in_file(box)
        pixels = file.pixels(shrink, box.top + box.height)
        scale = round(file.columns / pixels.shape[1])  # 1 if it isn't a JPEG
        rows, columns = (slice(first // scale, -(-(first + n) // scale)) for first, n in (box[::2], box[1::2]))
        crop = pixels[rows, columns]
        if scale > 1:
            return file.turned(_part(crop, box, scale, img_size, self.interpolation))
        return file.turned(_interpolated(torch.from_numpy(crop).permute(2, 0, 1), self.interpolation, size=(img_size, img_size)))


def _part(crop: np.ndarray, box: Box, shrink: int, size: int, interpolation: str) -> Tensor:
    """Scale a box of a picture that was decoded at 1 / `shrink` of its size. `crop` has the pixels that the box touches.

    The box may begin at a fraction of a pixel, but torch's kernel begins at a whole one. So a few more rows and columns are
    computed, as many as begin closest to a whole pixel, and dropped. The center of the box is then exact, and its ends nearly.
    """
    dropped, padding, factors = [], [], []
    for first, n_pixels in (box[::2], box[1::2]):
        offset, length = first % shrink / shrink, n_pixels / shrink
        shifts = [n * length / size - offset for n in range(MOST_DROPPED)]  # from the first result to the edge of `crop`
        n = min(range(MOST_DROPPED), key=lambda n: (shifts[n] < -0.5, abs(shifts[n] - round(shifts[n]))))
        n_padded = round(shifts[n])
        dropped.append(slice(n, n + size))
        padding.append((n_padded, 1))
        factors.append((n + size / 2) / (n_padded + offset + length / 2))
    crop = np.pad(crop, (*padding, (0, 0)), "edge")
    return _interpolated(torch.from_numpy(crop).permute(2, 0, 1), interpolation, scale_factor=factors)[:, dropped[0], dropped[1]]


def random_box(height: int, width: int, scale: tuple[float, float], numbers: Sequence[float]) -> Box:
    """Draw a box as torchvision's RandomResizedCrop does: its area within `scale`, its aspect ratio from 3/4 to 4/3, anywhere.

    `numbers` are uniform from 0 to 1: two for the position, then an area and a ratio for each try. If no box fits, return the
    largest centered one with an allowed ratio.
    """
    y, x, *tries = numbers
    low, high = scale
    for area, ratio in zip(tries[::2], tries[1::2], strict=True):
        side = math.sqrt(height * width * (low + area * (high - low)))
        stretch = (4 / 3) ** (ratio - 0.5)
        box_height, box_width = round(side / stretch), round(side * stretch)
        if 0 < box_height <= height and 0 < box_width <= width:
            return Box(int(y * (height - box_height + 1)), int(x * (width - box_width + 1)), box_height, box_width)
    box_height, box_width = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def jitter(strength: float) -> list[v2.Transform]:
    """Return the change of brightness, contrast and saturation, or nothing for strength 0."""
    return [v2.ColorJitter(strength, strength, strength)] if strength else []


def distorted(image: Tensor, distortions: Sequence[v2.Transform], seed: int) -> Tensor:
    """Apply the distortions. They draw from torch's global generator, which is seeded for them and restored afterwards."""
    if not distortions:
        return image
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        for distort in distortions:
            image = distort(image)
    finally:
        torch.set_rng_state(state)
    return image
