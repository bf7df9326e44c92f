"""Augmentation of images in memory: a whole batch at once, on the training device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.pipeline.counters import below, draws

AUGMENT, CUTOUT, JITTER = 2, 5, 7  # separate these uses of the seed from others
GRAY = (0.2989, 0.587, 0.114)  # weights of red, green and blue in perceived brightness (ITU-R BT.601)


class Normalize:
    """Resizes uint8 images to the model's input size if theirs differs, then computes (x / 255 - mean) / std."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], img_size: int, device: torch.device | str) -> None:
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        self.scale, self.shift = 1 / (255 * self.std), -self.mean / self.std  # then two passes over the batch suffice
        self.size = (img_size, img_size)

    def __call__(self, images: Tensor, out: Tensor | None = None, *, size: tuple[int, int] | None = None) -> Tensor:
        size = size or self.size
        if images.shape[-2:] != size:
            images = F.interpolate(images.to(self.scale.dtype), size, mode="bilinear", antialias=True)
        out = torch.empty(images.shape, dtype=self.scale.dtype, device=images.device) if out is None else out
        return out.copy_(images).mul_(self.scale).add_(self.shift)  # half the time of a mixed-type multiplication

    def undo(self, x: Tensor) -> Tensor:
        """Return images from 0 to 1, for drawing."""
        return (x.float() * self.std + self.mean).clamp_(0, 1)


class CropAndFlip:
    """Random crops of the padded images, half of them mirrored; each a function of (seed, epoch, sample).

    The padded images are contiguous in memory, so the crop of image n at (y, x) is the window that begins at
    n * (bytes per image) + y * (bytes per row) + x. A single index_select on a view of all windows cuts a batch. Zeros between
    two rows, channels or images pad both. `unpadded` is a view of the original images, which saves a second copy of them.
    """

    def __init__(self, images: Tensor, padding: int, padding_mode: str, hflip: bool | str, seed: int) -> None:
        self.n, channels, height, width = images.shape
        self.padding, self.hflip, self.seed = padding, hflip, seed
        between = padding if padding_mode == "constant" else 2 * padding
        self.row = width + between
        channel = (height + between) * self.row
        self.image_bytes = channels * channel
        strides, first = (self.image_bytes, channel, self.row, 1), padding * (self.row + 1)
        window = (channels - 1) * channel + (height - 1) * self.row + width
        n_windows = (self.n - 1) * self.image_bytes + 2 * first + 1
        self.memory = images.new_zeros(n_windows + window - 1) if padding else images.contiguous().flatten()
        self.unpadded = self.memory.as_strided(images.shape, strides, first)
        if padding and padding_mode == "constant":
            self.unpadded.copy_(images)
        elif padding:
            padded = self.memory.as_strided((self.n, channels, height + 2 * padding, width + 2 * padding), strides)
            for part, into in zip(images.split(4096), padded.split(4096), strict=True):
                # reflection requires floats, which represent every uint8 exactly
                into.copy_(F.pad(part.float(), [padding] * 4, mode=padding_mode))
        self.windows = self.memory.as_strided((n_windows, channels, height, width), (1, *strides[1:]))
        self._epoch, self._begin, self._mirrored = -1, torch.empty(0), torch.empty(0)

    def __call__(self, epoch: int, samples: Tensor, counters: Tensor | None = None) -> Tensor:
        """Cut the samples. `counters` are for an epoch that may have a sample several times: the crop is a function of them."""
        if counters is not None:
            begin, mirrored = self._drawn(epoch, samples, counters)
        else:  # drawn for a whole epoch; per batch, the overhead would dominate
            if epoch != self._epoch:
                every = torch.arange(self.n, device=self.memory.device)
                self._epoch, (self._begin, self._mirrored) = epoch, self._drawn(epoch, every, every)
            begin, mirrored = self._begin.index_select(0, samples), self._mirrored.index_select(0, samples)
        images = self.windows.index_select(0, begin)
        if not self.hflip:
            return images
        # torch.where is as fast per 8-byte element as per byte, so it gets long words
        word = torch.int64 if images[0].numel() % 8 == 0 else images.dtype
        as_they_are, flipped = (x.flatten(1).view(word) for x in (images, images.flip(-1)))
        return torch.where(mirrored.unsqueeze(1), flipped, as_they_are).view(images.dtype).view(images.shape)

    def _drawn(self, epoch: int, samples: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
        """Draw where each sample's window begins and whether it is mirrored."""
        vertical, horizontal, side = draws(self.seed ^ AUGMENT, epoch, counters, 3)
        turn = 0
        if self.hflip == "alternating":  # the first orientation of an image is drawn once
            side, turn = draws(self.seed ^ AUGMENT, 0, counters, 3)[2], epoch % 2
        mirrored = below(side, 2) != turn
        y, x = (below(bits, 2 * self.padding + 1) for bits in (vertical, horizontal))
        return samples * self.image_bytes + y * self.row + x, mirrored


class ColorJitter:
    """Brightness, contrast and saturation, in this order, each changed by a factor from 1 - strength to 1 + strength.

    The result of uint8 images is floats from 0 to 255: rounding would lose precision before normalization.
    """

    def __init__(self, strength: float, seed: int) -> None:
        self.strength, self.seed = strength, seed

    def __call__(self, epoch: int, samples: Tensor, images: Tensor) -> Tensor:
        bits = draws(self.seed ^ JITTER, epoch, samples, 3).float() / 2**31
        brightness, contrast, saturation = (1 + self.strength * (2 * bits - 1)).view(3, -1, 1, 1, 1)
        images = (images * brightness).clamp_(0, 255)
        images = _blend(images, _gray(images).mean((1, 2, 3), keepdim=True), contrast)
        return images if images.shape[1] == 1 else _blend(images, _gray(images), saturation)


def _blend(images: Tensor, towards: Tensor, factor: Tensor) -> Tensor:
    """Interpolate from `towards`; a factor above 1 extrapolates away from it."""
    return torch.lerp(towards.expand_as(images), images, factor).clamp_(0, 255)


def _gray(images: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else torch.einsum("bchw,c->bhw", images, images.new_tensor(GRAY)).unsqueeze(1)


class Cutout:
    """Sets a square of the normalized image to zero, the mean color. Its center may be anywhere, so an edge can clip it.

    DeVries, Taylor (2017): Improved Regularization of Convolutional Neural Networks with Cutout. https://arxiv.org/abs/1708.04552
    """

    def __init__(self, side: int, seed: int) -> None:
        self.side, self.seed = side, seed

    def __call__(self, epoch: int, samples: Tensor, images: Tensor) -> Tensor:
        vertical, horizontal = draws(self.seed ^ CUTOUT, epoch, samples, 2)
        covered = []  # B x H, true for the rows that the square covers, and B x W
        for bits, length in ((vertical, images.shape[-2]), (horizontal, images.shape[-1])):
            begin = (below(bits, length) - self.side // 2).unsqueeze(1)
            place = torch.arange(length, device=bits.device)
            covered.append((place >= begin) & (place < begin + self.side))
        rows, columns = covered
        return images.masked_fill_((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0)
