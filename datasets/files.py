"""Images in files: decoded, cropped and scaled by workers, one by one, as uint8."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as v2

from datasets.augment import AUGMENT
from datasets.counters import derive
from datasets.splits import Files

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def decode(path: str) -> Tensor:
    """An RGB image, C H W."""
    try:
        if path.lower().endswith(".bmp"):  # which torchvision's decoder doesn't know
            from PIL import Image

            return v2.pil_to_tensor(Image.open(path).convert("RGB"))
        return decode_image(path, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise OSError(f"{path}: this image can't be read ({str(error).splitlines()[0]})") from error


@dataclass
class TrainFiles(Dataset):
    """Read sample (epoch, index): a random crop of random area, scaled to the size that is trained, maybe mirrored."""

    files: Files
    img_size: int
    scale: tuple[float, float]
    hflip: bool
    augment: bool
    crop_pct: float
    seed: int

    def __post_init__(self) -> None:
        self.crop = RandomResizedCrop(self.img_size, scale=self.scale, antialias=True)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image = decode(os.fsdecode(self.files.paths[index]))
        if self.augment:
            torch.manual_seed(derive(self.seed, AUGMENT, epoch, index))
            image = self.crop(image)
            if self.hflip and torch.rand(()) < 0.5:
                image = v2.horizontal_flip(image)
        else:
            image = resize_and_crop(image, self.img_size, self.crop_pct)
        return image, self.files.labels[index]


@dataclass
class EvalFiles(Dataset):
    """Read sample index: the middle of the image, after its shorter side was scaled to img_size / crop_pct."""

    files: Files
    img_size: int
    crop_pct: float

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = decode(os.fsdecode(self.files.paths[index]))
        return resize_and_crop(image, self.img_size, self.crop_pct), self.files.labels[index]


def resize_and_crop(image: Tensor, img_size: int, crop_pct: float) -> Tensor:
    image = v2.resize(image, [round(img_size / crop_pct)], interpolation=InterpolationMode.BILINEAR, antialias=True)
    return v2.center_crop(image, [img_size, img_size])
