"""Mixing of images and their labels, a batch at a time, on the device that trains.

Mixup: Zhang, Cisse, Dauphin, Lopez-Paz (2018): mixup: Beyond Empirical Risk Minimization. https://arxiv.org/abs/1710.09412
CutMix: Yun et al. (2019): CutMix: Regularization Strategy to Train Strong Classifiers. https://arxiv.org/abs/1905.04899

Each global batch is mixed with itself in reverse order, all images in the same proportion. The method, the proportion and the box
are functions of (seed, step). Labels become rows of probabilities.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from datasets.pipeline.counters import derive

MIX = 6  # separates this use of the seed from others


@dataclass(frozen=True)
class Mixing:
    n_classes: int
    mixup: float  # alpha of the Beta distribution of the proportion; 0 turns it off
    cutmix: float
    switch_prob: float  # of CutMix, if both are on
    prob: float  # of mixing a batch
    seed: int
    rank: int = 0
    world_size: int = 1

    def __call__(self, step: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        random = np.random.default_rng(derive(self.seed, MIX, step))
        soft = (F.one_hot(labels, self.n_classes) if labels.ndim == 1 else labels).to(images.dtype)
        if random.random() >= self.prob:
            return images, soft
        use_cutmix = self.cutmix > 0 and (self.mixup == 0 or random.random() < self.switch_prob)
        alpha = self.cutmix if use_cutmix else self.mixup
        share = float(random.beta(alpha, alpha))  # of the image itself
        if use_cutmix:
            # a box of (1 - share) of the area around a uniform center; it is clipped at the image's edge as in the paper
            (height, width), side = images.shape[-2:], (1 - share) ** 0.5
            y, x = int(random.integers(height)), int(random.integers(width))
            half_height, half_width = int(height * side) // 2, int(width * side) // 2
            top, bottom = max(0, y - half_height), min(height, y + half_height)
            left, right = max(0, x - half_width), min(width, x + half_width)
            mixed = images.clone()
            mixed[..., top:bottom, left:right] = self._reversed(images[..., top:bottom, left:right])
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            mixed = torch.lerp(self._reversed(images), images, share)
        return mixed, torch.lerp(self._reversed(soft), soft, share)

    def _reversed(self, part: Tensor) -> Tensor:
        """Return this rank's part of the global batch in reverse order: the reversed part of the opposite rank."""
        other = self.world_size - 1 - self.rank
        if other == self.rank or part.numel() == 0:  # a box may be empty
            return part.flip(0)
        received = torch.empty_like(part, memory_format=torch.contiguous_format)
        operations = [dist.P2POp(dist.isend, part.contiguous(), other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return received.flip(0)
