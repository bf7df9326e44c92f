"""How images become the model's input: sizes, normalization and augmentation."""

from dataclasses import dataclass, replace

import torch

from datasets.pipeline.augment import Normalize


@dataclass(frozen=True)
class Growth:
    """Progressive resizing: training begins with small images, which take less time."""

    first: int
    n_epochs: float  # until the full size is reached
    step: int


@dataclass(frozen=True)
class Preparation:
    """The settings of preprocessing and augmentation, of which every loader uses the ones that apply to it."""

    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool
    crop_padding: int
    padding_mode: str
    hflip: bool | str  # "alternating": every other epoch
    cutout: int
    color_jitter: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)  # from here on: only for images in files
    zoom: tuple[float, float] = (0.5, 2.0)  # only for images with masks
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    policy: str | None = None  # randaugment, trivialaugment or augmix
    magnitude: int = 9  # of randaugment
    erasing: float = 0.0  # probability
    repeats: int = 1
    growth: Growth | None = None
    exif_rotate: bool = False
    resize_by_torch: bool = False  # in evaluations

    def size(self, epoch: int) -> int:
        """Height and width of the training images of an epoch."""
        if self.growth is None:
            return self.img_size
        missing = (self.img_size - self.growth.first) * max(0.0, 1 - epoch / self.growth.n_epochs)
        return self.img_size - round(missing / self.growth.step) * self.growth.step

    def normalize(self, device: torch.device) -> Normalize:
        return Normalize(self.mean, self.std, self.img_size, device)

    def for_training(self) -> "Preparation":
        """Return the settings with every augmentation turned off if `augment` is false."""
        if self.augment:
            return self
        return replace(
            self, crop_padding=0, hflip=False, cutout=0, color_jitter=0.0, zoom=(1.0, 1.0), growth=None, resize_by_torch=False
        )
