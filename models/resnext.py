"""ResNeXt.

Saining Xie, Ross Girshick, Piotr Dollár, Zhuowen Tu, Kaiming He (2017):
Aggregated Residual Transformations for Deep Neural Networks. CVPR. https://arxiv.org/abs/1611.05431

A ResNet whose bottleneck has a 3x3 convolution of `cardinality` groups of `width` channels. "32x4d" means cardinality 32 and
width 4 in the first stage; the width doubles with each stage. At the same cost, more groups are better than more channels.

Where copies differ: the stages output 256, 512, 1024 and 2048 channels whatever cardinality x width is (table 1, and the authors'
code, https://github.com/facebookresearch/ResNeXt); a common copy outputs twice cardinality x width, which is right for 32x4d and
2x64d only. The stride is on the 3x3 convolution. ResNeXt-29, the paper's network for CIFAR (section 5.3), has three stages, up to
1024 channels, and its stem is a 3x3 convolution (a common copy has a 1x1).

`first_block` selects the stem as in models/resnet.py; every name accepts both, and any image size works.

Module names are torchvision's (and timm's, for resnext101_32x4d), so their weights load unchanged; ResNeXt-29 continues them.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from models.resnet import Bottleneck, ResidualNetwork, Stem


class ResNeXtBlock(Bottleneck):
    """1x1 to the channels of all groups, 3x3 within each group, 1x1 to the block's output."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        cardinality: int,
        width: int,
    ) -> None:
        inner = cardinality * (width * channels // 64)  # `width` is that of the first stage, which has 64 channels
        super().__init__(in_channels, channels, stride, downsample, inner=inner, groups=cardinality)


class ResNeXt(ResidualNetwork):
    def __init__(
        self,
        *,
        layers: Sequence[int],
        cardinality: int,
        width: int,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Stem = "imagenet",
        pdrop: float = 0.0,
    ) -> None:
        super().__init__(ResNeXtBlock, layers, n_classes, in_channels, first_block, pdrop, cardinality=cardinality, width=width)


MODELS = {
    "resnext29_32x4d": partial(ResNeXt, layers=(3, 3, 3), cardinality=32, width=4),
    "resnext29_2x64d": partial(ResNeXt, layers=(3, 3, 3), cardinality=2, width=64),
    "resnext50_32x4d": partial(ResNeXt, layers=(3, 4, 6, 3), cardinality=32, width=4),
    "resnext101_32x4d": partial(ResNeXt, layers=(3, 4, 23, 3), cardinality=32, width=4),
    "resnext101_64x4d": partial(ResNeXt, layers=(3, 4, 23, 3), cardinality=64, width=4),
}
