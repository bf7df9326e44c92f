"""ResNet.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun (2016): Deep Residual Learning for Image Recognition.
CVPR. https://arxiv.org/abs/1512.03385

A block learns what to add to its input: y = relu(x + f(x)). Where the block changes the shape, a 1x1 convolution does so for x.

Where copies differ: the stride of a bottleneck is on its 3x3 convolution ("v1.5", as in torchvision and in NVIDIA's training
scripts, about half a point better on ImageNet), not on the first 1x1 as the paper's Caffe model has it. The last BatchNorm of a
block starts at one, not zero, unless `zero_init_residual`. `first_block` is the stem: "imagenet" the paper's 7x7 of stride 2 with
a pooling, "cifar10" a 3x3 of stride 1 without one, which keeps a 32x32 image's resolution. (The paper's own CIFAR networks are
other, thinner ones; what everybody calls ResNet-18 on CIFAR-10 is this.)

`drop_path` is stochastic depth (Huang, Sun, Liu, Sedra, Weinberger, 2016: Deep Networks with Stochastic Depth.
https://arxiv.org/abs/1603.09382): in training a block gives only its input to some of the images, the last one to that part of
them, those before it to fewer, down to none for the first.

Module names are torchvision's, so its weights load unchanged.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import StochasticDepth


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None, drop_path: float) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(self.drop_path(x) + shortcut)


class Bottleneck(nn.Module):
    """1x1 to fewer channels, 3x3 there, 1x1 to four times as many."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None, drop_path: float) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(self.drop_path(x) + shortcut)


class ResNet(nn.Module):
    HEAD = ("fc",)
    CLASSIFIERS = ("fc",)
    FIRST_CONV = "conv1"

    def __init__(
        self,
        *,
        layers: Sequence[int],
        bottleneck: bool,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Literal["imagenet", "cifar10"] = "imagenet",
        pdrop: float = 0.0,
        drop_path: float = 0.0,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        block = Bottleneck if bottleneck else BasicBlock
        if first_block == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = conv3x3(in_channels, 64)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.channels = 64
        rates = (drop_path * i / (sum(layers) - 1) for i in range(sum(layers)))
        self.layer1 = self._stage(block, 64, layers[0], stride=1, rates=rates)
        self.layer2 = self._stage(block, 128, layers[1], stride=2, rates=rates)
        self.layer3 = self._stage(block, 256, layers[2], stride=2, rates=rates)
        self.layer4 = self._stage(block, 512, layers[3], stride=2, rates=rates)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(pdrop)
        self.num_features = self.channels
        self.fc = nn.Linear(self.num_features, n_classes)

        stem, first = (2, 4) if first_block == "imagenet" else (1, 1)
        self.feature_info = [{"num_chs": 64, "reduction": stem, "module": "relu"}] + [
            {"num_chs": 64 * 2**i * block.expansion, "reduction": first * 2**i, "module": f"layer{i + 1}"} for i in range(4)
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def _stage(
        self, block: type[BasicBlock | Bottleneck], channels: int, n_blocks: int, stride: int, rates: Iterator[float]
    ) -> nn.Sequential:
        out_channels = channels * block.expansion
        downsample = None
        if stride != 1 or self.channels != out_channels:
            downsample = nn.Sequential(conv1x1(self.channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        blocks = [block(self.channels, channels, stride, downsample, next(rates))]
        blocks += [block(out_channels, channels, 1, None, next(rates)) for _ in range(n_blocks - 1)]
        self.channels = out_channels
        return nn.Sequential(*blocks)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        stem = self.relu(self.bn1(self.conv1(x)))
        c2 = self.layer1(self.maxpool(stem))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        c5 = self.layer4(c4)
        return [stem, c2, c3, c4, c5]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(self.avgpool(x).flatten(1))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


MODELS = {
    "resnet18": partial(ResNet, layers=(2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(ResNet, layers=(3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(ResNet, layers=(3, 4, 6, 3), bottleneck=True),
    "resnet101": partial(ResNet, layers=(3, 4, 23, 3), bottleneck=True),
    "resnet152": partial(ResNet, layers=(3, 8, 36, 3), bottleneck=True),
}
