"""PreActResNet, also called ResNet v2.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun (2016): Identity Mappings in Deep Residual Networks.
ECCV. https://arxiv.org/abs/1603.05027

BatchNorm and ReLU stand before each convolution instead of behind it, and nothing stands on the sum: y = x + f(x). What enters a
stage runs through it unchanged, and so do the gradients.

Where copies differ:
- Where a block changes the shape, its shortcut takes the activated input and is a bare 1x1 convolution without a BatchNorm, as in
  the authors' code (https://github.com/KaimingHe/resnet-1k-layers: "common BN, ReLU", then both branches).
- Nothing has normalized the last sum, so a BatchNorm and a ReLU stand before the pooling (section 4: an extra activation after
  the last unit). The stem has neither: the first block begins with them.
- The stride of a bottleneck is on its 3x3 convolution, as in timm; the authors' CIFAR code has it on the first 1x1.
- With the basic blocks of 18 and 34 layers the first shortcut is the identity, of the stem's output before BatchNorm and ReLU, as
  in timm. (The paper activates before this first split; where its shortcut is a projection, as with bottlenecks, they agree.)

The feature map of a stage is the bare sum, which the next stage's first BatchNorm reads; the last map is after BatchNorm and
ReLU. `first_block` is the stem: "imagenet" a 7x7 of stride 2 with a pooling, "cifar10" a 3x3 of stride 1 without one. Any image
size works. (The paper's own CIFAR networks are other ones: thinner, with three stages and 110 to 1001 layers.)

Module names are timm's (resnetv2_18 to resnetv2_152), so its weights load unchanged; hence the 1x1 convolution as classifier.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


class PreActBasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        x = self.conv1(activated)
        x = self.conv2(self.relu(self.norm2(x)))
        return x + shortcut


class PreActBottleneck(nn.Module):
    """1x1 to fewer channels, 3x3 there, 1x1 to four times as many."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.norm3 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        x = self.conv1(activated)
        x = self.conv2(self.relu(self.norm2(x)))
        x = self.conv3(self.relu(self.norm3(x)))
        return x + shortcut


class Head(nn.Module):
    """The mean over the image, then the classifier."""

    def __init__(self, in_channels: int, n_classes: int, pdrop: float) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(pdrop)
        self.fc = nn.Conv2d(in_channels, n_classes, kernel_size=1)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(self.pool(x))
        # B C 1 1 -> B C
        return x.flatten(1) if pre_logits else self.fc(x).flatten(1)


class PreActResNet(nn.Module):
    HEAD = ("head",)
    CLASSIFIERS = ("head.fc",)
    FIRST_CONV = "stem.conv"
    TIMM_NAMES = {f"preactresnet{depth}": f"resnetv2_{depth}" for depth in (18, 34, 50, 101, 152)}

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
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        block = PreActBottleneck if bottleneck else PreActBasicBlock
        if first_block == "imagenet":
            conv = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            conv = conv3x3(in_channels, 64)
            pool = nn.Identity()
        self.stem = nn.Sequential(OrderedDict(conv=conv, pool=pool))
        self.channels = 64
        self.stages = nn.Sequential(
            self._stage(block, 64, layers[0], stride=1),
            self._stage(block, 128, layers[1], stride=2),
            self._stage(block, 256, layers[2], stride=2),
            self._stage(block, 512, layers[3], stride=2),
        )
        self.num_features = self.channels
        self.norm = nn.BatchNorm2d(self.num_features)
        self.relu = nn.ReLU(inplace=True)

        stem, first = (2, 4) if first_block == "imagenet" else (1, 1)
        self.feature_info = [{"num_chs": 64, "reduction": stem, "module": "stem.conv"}] + [
            {"num_chs": 64 * 2**i * block.expansion, "reduction": first * 2**i, "module": f"stages.{i}" if i < 3 else "relu"}
            for i in range(4)
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # PyTorch's own start for the classifier, with a bias of zero, as in the authors' code
        self.head = Head(self.num_features, n_classes, pdrop)
        nn.init.zeros_(self.head.fc.bias)

    def _stage(
        self, block: type[PreActBasicBlock | PreActBottleneck], channels: int, n_blocks: int, stride: int
    ) -> nn.Sequential:
        out_channels = channels * block.expansion
        downsample = None
        if stride != 1 or self.channels != out_channels:
            downsample = nn.Sequential(OrderedDict(conv=conv1x1(self.channels, out_channels, stride)))
        blocks = [block(self.channels, channels, stride, downsample)]
        blocks += [block(out_channels, channels, 1, None) for _ in range(n_blocks - 1)]
        self.channels = out_channels
        return nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks)))

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        stem = self.stem.conv(x)
        maps = [stem]
        x = self.stem.pool(stem)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps[-1] = self.relu(self.norm(x))
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


MODELS = {
    "preactresnet18": partial(PreActResNet, layers=(2, 2, 2, 2), bottleneck=False),
    "preactresnet34": partial(PreActResNet, layers=(3, 4, 6, 3), bottleneck=False),
    "preactresnet50": partial(PreActResNet, layers=(3, 4, 6, 3), bottleneck=True),
    "preactresnet101": partial(PreActResNet, layers=(3, 4, 23, 3), bottleneck=True),
    "preactresnet152": partial(PreActResNet, layers=(3, 8, 36, 3), bottleneck=True),
}
