"""ResNet.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun (2016): Deep Residual Learning for Image Recognition.
CVPR. https://arxiv.org/abs/1512.03385

A block learns what to add to its input: y = relu(x + f(x)). Where the block changes the shape, a 1x1 convolution does so for x.

Where copies differ: the stride of a bottleneck is on its 3x3 convolution ("v1.5", as in torchvision and in NVIDIA's training
scripts, about half a point better on ImageNet), not on the first 1x1 as in the paper's Caffe model. The last BatchNorm of a
block starts at one, or at zero with `zero_init_residual`. `first_block` is the stem: "imagenet" is the paper's 7x7 of stride 2
with a pooling; "cifar10" is a 3x3 of stride 1 without one, which keeps the resolution of a 32x32 image. (The paper's own CIFAR
networks are thinner; the network that everybody calls ResNet-18 on CIFAR-10 is this one.)

`drop_path` is stochastic depth (Huang, Sun, Liu, Sedra, Weinberger, 2016: Deep Networks with Stochastic Depth.
https://arxiv.org/abs/1603.09382): in training, a block passes only its input on for some of the images. The last block does so
at the rate `drop_path`, earlier blocks at lower rates, and the first block never.

Module names are torchvision's, so its weights load unchanged. SE-ResNet, CBAM-ResNet and ResNeXt are this network with other
blocks: they derive from `ResidualNetwork`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

Stem = Literal["imagenet", "cifar10"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def make_stem(in_channels: int, first_block: Stem) -> tuple[nn.Conv2d, nn.Module]:
    """Make the first convolution and the pooling of the stem."""
    if first_block == "imagenet":
        conv = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        return conv, nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    if first_block == "cifar10":
        return conv3x3(in_channels, 64), nn.Identity()
    raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")


class ResidualBlock(nn.Module):
    """y = relu(x + f(x)); `residual` computes f, and `downsample` changes the shape of x where f does."""

    expansion: int  # the output has that many times `channels` channels
    relu: nn.Module
    downsample: nn.Module | None
    drop_path: StochasticDepth

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.drop_path(self.residual(x)) + shortcut)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample
        self.drop_path = StochasticDepth(0.0, "row")

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """1x1 to fewer channels, 3x3 there, 1x1 to four times as many.

    The 3x3 convolution has `inner` channels (by default `channels`) in `groups` groups.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        inner: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        inner = inner or channels
        self.conv1 = conv1x1(in_channels, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = StochasticDepth(0.0, "row")

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ResidualNetwork(nn.Module):
    """Stem, stages of residual blocks, and head. Each stage but the first halves the map and doubles the channels."""

    HEAD = ("fc",)
    CLASSIFIERS = ("fc",)
    FIRST_CONV = "conv1"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        n_classes: int,
        in_channels: int,
        first_block: Stem,
        pdrop: float,
        **block_options: Any,
    ) -> None:
        super().__init__()
        self.conv1, self.maxpool = make_stem(in_channels, first_block)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        reduction, stage_reduction = (2, 4) if first_block == "imagenet" else (1, 1)
        self.feature_info = [{"num_chs": 64, "reduction": reduction, "module": "relu"}]
        self.stages = [f"layer{i + 1}" for i in range(len(layers))]
        in_channels = 64
        for i, (name, n_blocks) in enumerate(zip(self.stages, layers, strict=True)):
            channels, stride = 64 * 2**i, 1 if i == 0 else 2
            out_channels = channels * block.expansion
            downsample = None
            if stride != 1 or in_channels != out_channels:
                downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
            stage = nn.Sequential(block(in_channels, channels, stride, downsample, **block_options))
            for _ in range(n_blocks - 1):
                stage.append(block(out_channels, channels, **block_options))
            self.add_module(name, stage)
            self.feature_info.append({"num_chs": out_channels, "reduction": stage_reduction * 2**i, "module": name})
            in_channels = out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(pdrop)
        self.num_features = in_channels
        self.fc = nn.Linear(self.num_features, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        maps = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(maps[0])
        for name in self.stages:
            x = getattr(self, name)(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(self.avgpool(x).flatten(1))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class ResNet(ResidualNetwork):
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
        drop_path: float = 0.0,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(Bottleneck if bottleneck else BasicBlock, layers, n_classes, in_channels, first_block, pdrop)
        blocks = [module for module in self.modules() if isinstance(module, (BasicBlock, Bottleneck))]
        for i, block in enumerate(blocks):
            block.drop_path.p = drop_path * i / (len(blocks) - 1)
            if zero_init_residual:
                nn.init.zeros_(block.bn3.weight if isinstance(block, Bottleneck) else block.bn2.weight)


DEPTHS: dict[int, dict[str, Any]] = {  # table 1
    18: {"layers": (2, 2, 2, 2), "bottleneck": False},
    34: {"layers": (3, 4, 6, 3), "bottleneck": False},
    50: {"layers": (3, 4, 6, 3), "bottleneck": True},
    101: {"layers": (3, 4, 23, 3), "bottleneck": True},
    152: {"layers": (3, 8, 36, 3), "bottleneck": True},
}
MODELS = {f"resnet{depth}": partial(ResNet, **blocks) for depth, blocks in DEPTHS.items()}
