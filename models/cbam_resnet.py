"""CBAM-ResNet.

Sanghyun Woo, Jongchan Park, Joon-Young Lee, In So Kweon (2018): CBAM: Convolutional Block Attention Module.
ECCV. https://arxiv.org/abs/1807.06521

A ResNet whose blocks scale what they add twice: first each channel (as in SE-ResNet, but from the mean and the maximum of each
channel), then each position (from the mean and the maximum over the channels at that position).

Where copies differ, settled by the authors' code (https://github.com/Jongchan/attention-module, cbam.py and model_resnet.py):
- Channel attention first, then spatial attention, on the output of the last BatchNorm and before the addition of the shortcut.
- Mean and maximum go through the same two layers, with biases and a sixteenth of the channels of the block's output between them;
  the two results are added before the sigmoid.
- The spatial attention stacks [maximum, mean] in this order (timm's CbamModule has the opposite one) and convolves them by one
  7x7 kernel without bias, followed by a BatchNorm whose statistics move slowly (momentum 0.01).
- That BatchNorm's weight starts at zero: at the start every position is scaled by one half.

The ResNet around it is torchvision's, with the stride of a bottleneck on its 3x3 convolution. `first_block` selects the stem as
in models/resnet.py. Any image size works. (The authors' code ends at 101 layers; 152 continue it.)

Module names outside the attention are torchvision's and the authors'. The authors' names inside it (ChannelGate, SpatialGate) are
renamed, so that their published weights load.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models.resnet import DEPTHS, BasicBlock, Bottleneck, ResidualBlock, ResidualNetwork, Stem

REDUCTION = 16
AUTHORS_NAMES = (  # and the names here
    (".ChannelGate.mlp.1.", ".channel.fc1."),
    (".ChannelGate.mlp.3.", ".channel.fc2."),
    (".SpatialGate.spatial.", ".spatial."),
)


class ChannelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // REDUCTION)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(channels // REDUCTION, channels)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        # B C H W -> B C
        scale = self._mlp(x.mean(dim=(2, 3))) + self._mlp(x.amax(dim=(2, 3)))
        return x * scale.sigmoid()[:, :, None, None]


class SpatialAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        # B C H W -> B 2 H W
        scale = torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)
        scale = self.bn(self.conv(scale))
        return x * scale.sigmoid()


class CBAM(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels)
        self.spatial = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(self.channel(x))


class CBAMBlock(ResidualBlock):
    """The attention scales what a block of ResNet adds. It is a base class before that of the block."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__(in_channels, channels, stride)
        self.cbam = CBAM(channels * self.expansion)
        self.downsample = downsample  # assigned last, so that the order of the weights is the authors'

    def residual(self, x: Tensor) -> Tensor:
        return self.cbam(super().residual(x))


class CBAMBasicBlock(CBAMBlock, BasicBlock):
    """Two 3x3 convolutions, then the attention."""


class CBAMBottleneck(CBAMBlock, Bottleneck):
    """1x1 to fewer channels, 3x3 there, 1x1 to four times as many, then the attention."""


class CBAMResNet(ResidualNetwork):
    def __init__(
        self,
        *,
        layers: Sequence[int],
        bottleneck: bool,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Stem = "imagenet",
        pdrop: float = 0.0,
    ) -> None:
        super().__init__(CBAMBottleneck if bottleneck else CBAMBasicBlock, layers, n_classes, in_channels, first_block, pdrop)
        # As in the authors' code, except that there the projections keep PyTorch's initialization: their names lack "conv".
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, SpatialAttention):
                nn.init.zeros_(module.bn.weight)
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")

    def convert_pretrained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the authors' weights; return others unchanged."""
        for theirs, ours in AUTHORS_NAMES:
            weights = {key.replace(theirs, ours): value for key, value in weights.items()}
        return weights


MODELS = {f"cbam_resnet{depth}": partial(CBAMResNet, **blocks) for depth, blocks in DEPTHS.items()}
