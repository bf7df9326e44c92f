"""airbench94, a network for speed runs on CIFAR-10.

Keller Jordan (2024): 94% on CIFAR-10 in 3.29 Seconds on a Single GPU. https://arxiv.org/abs/2404.00498
Its variant for the optimizer Muon (https://github.com/KellerJordan/cifar10-airbench, airbench94_muon.py) has a published time of
2.6 s. The record for 94 % is 1.99 to 2.02 s on an A100, since October 2025: https://github.com/hiverge/cifar10-speedrun

Three groups of two 3x3 convolutions, each group halving the resolution after its first one. Three details speed up the first
epochs:
- The first layer whitens 2x2 patches and isn't trained: its filters are the principal directions of the training images' patches,
  each divided by its standard deviation, and their negatives, so that GELU loses neither sign (Page 2018, How to train your
  ResNet. https://myrtle.ai/learn/how-to-train-your-resnet/). `initialize_from` sets them; until then they are random.
- Every other convolution starts by passing its input on: as many of its filters as there are input channels are the identity.
- BatchNorm has a bias but no scale, and its statistics move fast (a momentum of 0.4 in PyTorch's terms). The logits are divided
  by nine.

`normalise_filters` rescales the weights of each convolution, before every training step, to a norm of the square root of its
number of filters. The output stays the same because a BatchNorm follows. But an optimizer whose steps have a fixed length, such
as Muon, keeps changing the direction of weights that would otherwise only grow. airbench does this inside its optimizer.

Where it differs from the published code: it accepts images from 9x9 on, since the last pooling covers the whole map (3x3 for a
32x32 image); tensors that aren't trained are buffers, not frozen parameters.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Whitening(nn.Conv2d):
    """A convolution that whitens patches: uncorrelated outputs of variance one, and their negatives. Only the bias is trained."""

    def __init__(self, in_channels: int, patch_size: int) -> None:
        super().__init__(in_channels, 2 * in_channels * patch_size**2, kernel_size=patch_size)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], epsilon: float = 5e-4) -> None:
        """Set the filters from normalized images. `epsilon` limits the scale of directions with little variance."""
        size, n_patches = self.weight[0].numel(), 0
        products = torch.zeros(size, size, dtype=torch.float64)
        for images in batches:
            patches = F.unfold(images.float(), self.kernel_size).transpose(0, 1).flatten(1)  # B P N -> P BN
            products += (patches @ patches.T).double().cpu()
            n_patches += patches.shape[1]
        variances, directions = torch.linalg.eigh(products / n_patches)  # not centered, as in the paper
        filters = (directions / (variances + epsilon).sqrt()).T.flip(0)
        self.weight.copy_(torch.cat([filters, -filters]).view_as(self.weight))


class Convolution(nn.Conv2d):
    """A 3x3 convolution whose first filters start as the identity."""

    def __init__(self, in_channels: int, out_channels: int, normalized: bool) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.normalized = normalized
        nn.init.dirac_(self.weight[:in_channels])

    def forward(self, x: Tensor) -> Tensor:
        if self.normalized and self.training:
            with torch.no_grad():
                self.weight.mul_(self.out_channels**0.5 / self.weight.norm())
        return super().forward(x)


class Norm(nn.BatchNorm2d):
    """BatchNorm without a trained scale."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        del self.weight
        self.register_buffer("weight", torch.ones(channels))


class Group(nn.Module):
    """Two convolutions; the resolution is halved after the first."""

    def __init__(self, in_channels: int, out_channels: int, normalized: bool) -> None:
        super().__init__()
        self.conv1 = Convolution(in_channels, out_channels, normalized)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = Norm(out_channels)
        self.conv2 = Convolution(out_channels, out_channels, normalized)
        self.norm2 = Norm(out_channels)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.pool(self.conv1(x))))
        return self.activation(self.norm2(self.conv2(x)))


class Airbench(nn.Module):
    HEAD = ("head",)
    CLASSIFIERS = ("head",)
    FIRST_CONV = "whiten"

    def __init__(
        self,
        *,
        widths: Sequence[int] = (64, 256, 256),
        n_classes: int = 10,
        in_channels: int = 3,
        img_size: int = 32,
        logit_scale: float = 1 / 9,
        normalise_filters: bool = False,  # spelled as in existing configs
    ) -> None:
        super().__init__()
        if img_size < 9:
            raise ValueError(f"airbench reads images of 9x9 and more; img_size is {img_size}")
        self.logit_scale = logit_scale
        self.whiten = Whitening(in_channels, patch_size=2)
        self.activation = nn.GELU()
        channels = [self.whiten.out_channels, *widths]
        self.groups = nn.Sequential(*map(partial(Group, normalized=normalise_filters), channels, widths))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.num_features = widths[-1]
        self.head = nn.Linear(self.num_features, n_classes, bias=False)
        self.feature_info = [{"num_chs": channels[0], "reduction": 1, "module": "whiten"}] + [
            {"num_chs": width, "reduction": 2 ** (i + 1), "module": f"groups.{i}"} for i, width in enumerate(widths)
        ]

    def initialize_from(self, batches: Iterable[Tensor]) -> None:
        """Compute the whitening from normalized training images."""
        self.whiten.fit(batches)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        maps = [self.activation(self.whiten(x))]
        for group in self.groups:
            maps.append(group(maps[-1]))
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pool(x).flatten(1)
        return x if pre_logits else self.head(x) * self.logit_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


MODELS = {"airbench94": Airbench}
