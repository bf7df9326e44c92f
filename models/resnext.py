"""ResNeXt.

Saining Xie, Ross Girshick, Piotr Dollár, Zhuowen Tu, Kaiming He (2017):
Aggregated Residual Transformations for Deep Neural Networks. CVPR. https://arxiv.org/abs/1611.05431

A bottleneck of ResNet whose 3x3 convolution falls into `cardinality` groups of `width` channels. "32x4d" says cardinality 32,
width 4 in the first stage; the width doubles with each further one. At the same cost, more groups are better than more channels.

Where copies differ: the stages put out 256, 512, 1024, 2048 channels whatever cardinality x width is (table 1, and the authors'
code, https://github.com/facebookresearch/ResNeXt); a common copy puts out twice cardinality x width, which is right for 32x4d and
2x64d only. The stride is on the 3x3 convolution. ResNeXt-29, the paper's network for CIFAR (section 5.3), has three stages, up to
1024 channels, and its stem there is a 3x3 convolution (a common copy has a 1x1).

`first_block` is the stem: "imagenet" the 7x7 of stride 2 with a pooling, "cifar10" a 3x3 of stride 1 without one; any name takes
both, and any image size works.

Module names are torchvision's (and timm's, for resnext101_32x4d), so their weights load unchanged; ResNeXt-29 continues them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1 to the groups' channels, 3x3 within each group, 1x1 to the block's output."""

    expansion = 4

    def __init__(
        self, *, in_channels: int, channels: int, cardinality: int, width: int, stride: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        inner = cardinality * (width * channels // 64)  # the width is given for the first stage, of 64 channels
        self.conv1 = nn.Conv2d(in_channels, inner, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, kernel_size=3, stride=stride, padding=1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(x + shortcut)


class ResNeXt(nn.Module):
    HEAD = ("fc",)
    CLASSIFIERS = ("fc",)
    FIRST_CONV = "conv1"

    def __init__(
        self,
        *,
        layers: Sequence[int],
        cardinality: int,
        width: int,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Literal["imagenet", "cifar10"] = "imagenet",
        pdrop: float = 0.0,
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        if first_block == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.cardinality = cardinality
        self.width = width
        self.channels = 64
        self.stages = [f"layer{i + 1}" for i in range(len(layers))]
        for i, n_blocks in enumerate(layers):
            self.add_module(self.stages[i], self._stage(64 * 2**i, n_blocks, stride=1 if i == 0 else 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(pdrop)
        self.num_features = self.channels
        self.fc = nn.Linear(self.num_features, n_classes)

        stem, first = (2, 4) if first_block == "imagenet" else (1, 1)
        self.feature_info = [{"num_chs": 64, "reduction": stem, "module": "relu"}] + [
            {"num_chs": 64 * 2**i * Bottleneck.expansion, "reduction": first * 2**i, "module": name}
            for i, name in enumerate(self.stages)
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, channels: int, n_blocks: int, stride: int) -> nn.Sequential:
        out_channels = channels * Bottleneck.expansion
        downsample = nn.Sequential(
            nn.Conv2d(self.channels, out_channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )
        block = partial(Bottleneck, channels=channels, cardinality=self.cardinality, width=self.width)
        blocks = [block(in_channels=self.channels, stride=stride, downsample=downsample)]
        blocks += [block(in_channels=out_channels, stride=1, downsample=None) for _ in range(n_blocks - 1)]
        self.channels = out_channels
        return nn.Sequential(*blocks)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        stem = self.relu(self.bn1(self.conv1(x)))
        maps = [stem]
        x = self.maxpool(stem)
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


MODELS = {
    "resnext29_32x4d": partial(ResNeXt, layers=(3, 3, 3), cardinality=32, width=4),
    "resnext29_2x64d": partial(ResNeXt, layers=(3, 3, 3), cardinality=2, width=64),
    "resnext50_32x4d": partial(ResNeXt, layers=(3, 4, 6, 3), cardinality=32, width=4),
    "resnext101_32x4d": partial(ResNeXt, layers=(3, 4, 23, 3), cardinality=32, width=4),
    "resnext101_64x4d": partial(ResNeXt, layers=(3, 4, 23, 3), cardinality=64, width=4),
}
