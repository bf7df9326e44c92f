"""CBAM-ResNet.

Sanghyun Woo, Jongchan Park, Joon-Young Lee, In So Kweon (2018): CBAM: Convolutional Block Attention Module.
ECCV. https://arxiv.org/abs/1807.06521

A ResNet whose blocks weigh what they add twice: first which channels matter (as in SE-ResNet, but from the channels' means and
maxima), then which places matter (from the mean and the maximum over the channels at each place).

Where copies differ, settled after the authors' code (https://github.com/Jongchan/attention-module, cbam.py and model_resnet.py):
- Channel attention first, then spatial attention, on the output of the last BatchNorm and before the addition of the shortcut.
- Mean and maximum go through the same two layers, with biases and a sixteenth of the channels of the block's output between them;
  the two results are added before the sigmoid.
- The spatial attention stacks [maximum, mean] in this order (timm's CbamModule has the other) and convolves them by one 7x7
  kernel without bias, followed by a BatchNorm whose statistics move slowly (momentum 0.01).
- That BatchNorm's weight starts at zero: at the start every place is scaled by one half.

The ResNet around it is torchvision's, the stride of a bottleneck on its 3x3 convolution. `first_block` is the stem: "imagenet"
the 7x7 of stride 2 with a pooling, "cifar10" a 3x3 of stride 1 without one. Any image size works. (The authors' code goes up to
101 layers; 152 continue it.)

Module names outside the attention are torchvision's and the authors'. The authors' names within it (ChannelGate, SpatialGate) are
renamed, so that the weights they publish load.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

REDUCTION = 16
AUTHORS_NAMES = (  # and the names here
    (".ChannelGate.mlp.1.", ".channel.fc1."),
    (".ChannelGate.mlp.3.", ".channel.fc2."),
    (".SpatialGate.spatial.", ".spatial."),
)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


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


class CBAMBasicBlock(nn.Module):
    """Two 3x3 convolutions, then the attention."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.cbam = CBAM(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.cbam(self.bn2(self.conv2(x)))
        return self.relu(x + shortcut)


class CBAMBottleneck(nn.Module):
    """1x1 to fewer channels, 3x3 there, 1x1 to four times as many, then the attention."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.cbam = CBAM(channels * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.cbam(self.bn3(self.conv3(x)))
        return self.relu(x + shortcut)


class CBAMResNet(nn.Module):
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
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        block = CBAMBottleneck if bottleneck else CBAMBasicBlock
        if first_block == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = conv3x3(in_channels, 64)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.channels = 64
        self.layer1 = self._stage(block, 64, layers[0], stride=1)
        self.layer2 = self._stage(block, 128, layers[1], stride=2)
        self.layer3 = self._stage(block, 256, layers[2], stride=2)
        self.layer4 = self._stage(block, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(pdrop)
        self.num_features = self.channels
        self.fc = nn.Linear(self.num_features, n_classes)

        stem, first = (2, 4) if first_block == "imagenet" else (1, 1)
        self.feature_info = [{"num_chs": 64, "reduction": stem, "module": "relu"}] + [
            {"num_chs": 64 * 2**i * block.expansion, "reduction": first * 2**i, "module": f"layer{i + 1}"} for i in range(4)
        ]
        # As in the authors' code, except that there the projections keep PyTorch's own start: their names lack the word "conv".
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, SpatialAttention):
                nn.init.zeros_(module.bn.weight)
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")

    def _stage(self, block: type[CBAMBasicBlock | CBAMBottleneck], channels: int, n_blocks: int, stride: int) -> nn.Sequential:
        out_channels = channels * block.expansion
        downsample = None
        if stride != 1 or self.channels != out_channels:
            downsample = nn.Sequential(conv1x1(self.channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        blocks = [block(self.channels, channels, stride, downsample)]
        blocks += [block(out_channels, channels, 1, None) for _ in range(n_blocks - 1)]
        self.channels = out_channels
        return nn.Sequential(*blocks)

    def convert_pretrained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our names for the authors'; others stay as they are."""
        renamed = {}
        for key, value in weights.items():
            for theirs, ours in AUTHORS_NAMES:
                key = key.replace(theirs, ours)
            renamed[key] = value
        return renamed

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
    "cbam_resnet18": partial(CBAMResNet, layers=(2, 2, 2, 2), bottleneck=False),
    "cbam_resnet34": partial(CBAMResNet, layers=(3, 4, 6, 3), bottleneck=False),
    "cbam_resnet50": partial(CBAMResNet, layers=(3, 4, 6, 3), bottleneck=True),
    "cbam_resnet101": partial(CBAMResNet, layers=(3, 4, 23, 3), bottleneck=True),
    "cbam_resnet152": partial(CBAMResNet, layers=(3, 8, 36, 3), bottleneck=True),
}
