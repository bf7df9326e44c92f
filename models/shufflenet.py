"""ShuffleNet (v1).

Xiangyu Zhang, Xinyu Zhou, Mengxiao Lin, Jian Sun (2018): ShuffleNet: An Extremely Efficient Convolutional Neural Network for
Mobile Devices. CVPR. https://arxiv.org/abs/1707.01083

In a thin residual network nearly all the cost is in the 1x1 convolutions. Here they are grouped, and between the two of a unit
the channels are shuffled, so that every group of the second reads from all groups of the first. More groups allow more channels
at the same cost: the five variants of table 1 have about 140 million multiply-adds each.

Where copies differ:
- Of all 1x1 convolutions only the first of stage 2 is not grouped, because it reads few channels (caption of table 1).
- After the depthwise convolution comes a BatchNorm and no ReLU (section 3.2).
- A unit of stride 2 concatenates its input, averaged over 3x3 with stride 2, with the channels that it computes, and so computes
  only the missing ones. Its bottleneck nevertheless has a quarter of all the stage's channels, as in the other units.
- The shuffle reads the channels as (groups, n), transposes and flattens (section 3.1); some copies do the inverse.

"Scale s" multiplies the stages' channels by s. Numbers that the groups don't divide are rounded: a bottleneck to the nearest
multiple (2 and 4 groups, below 1x and at 1.5x), the stem to the next one (8 groups, below 1x). The stem itself is not scaled in
proportion: 12, 12, 24, 24 and 48 channels at 0.25x, 0.5x, 1x, 1.5x and 2x are those of the authors' code from 0.5x up
(megvii-model/ShuffleNet-Series, ShuffleNetV1/network.py), and yield the paper's 13, 38, 140, 292 and 524 million multiply-adds.

The network is fully convolutional and accepts any image size; its last map is 1/32 of it. For small images (`first_block:
cifar10`) the stem has stride 1 and no pooling, and the last map is 1/8.

Neither torchvision nor timm has ShuffleNet v1; the module names are ours.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGE2_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # by the number of groups: table 1
STEM_CHANNELS = {0.25: 12, 0.5: 12, 1.0: 24, 1.5: 24, 2.0: 48}  # by the scale
UNITS = (4, 8, 4)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    x = x.unflatten(1, (groups, -1))  # B C H W -> B groups C/groups H W
    return x.transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """Grouped 1x1 to a bottleneck, shuffle, depthwise 3x3, grouped 1x1 back; the input is added, or concatenated."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, first_groups: int, stride: int) -> None:
        super().__init__()
        bottleneck = int(out_channels / 4 / groups + 0.5) * groups
        computed = out_channels if stride == 1 else out_channels - in_channels
        self.groups = groups
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, bottleneck, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(bottleneck)
        self.conv2 = nn.Conv2d(bottleneck, bottleneck, 3, stride=stride, padding=1, groups=bottleneck, bias=False)
        self.bn2 = nn.BatchNorm2d(bottleneck)
        self.conv3 = nn.Conv2d(bottleneck, computed, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(computed)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)))
        residual = channel_shuffle(residual, self.groups)
        residual = self.bn2(self.conv2(residual))
        residual = self.bn3(self.conv3(residual))
        if self.stride == 1:
            return F.relu(x + residual)
        return torch.cat((F.avg_pool2d(x, 3, stride=2, padding=1), F.relu(residual)), dim=1)


class ShuffleNet(nn.Module):
    HEAD = ("fc",)
    CLASSIFIERS = ("fc",)
    FIRST_CONV = "conv1"

    def __init__(
        self,
        *,
        groups: int,
        width: float = 1.0,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Literal["imagenet", "cifar10"] = "imagenet",
        pdrop: float = 0.0,
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        if groups not in STAGE2_CHANNELS:
            raise ValueError(f"groups is {groups}; it can be {', '.join(map(str, STAGE2_CHANNELS))}")
        if width not in STEM_CHANNELS:
            raise ValueError(f"width is {width}; it can be {', '.join(map(str, STEM_CHANNELS))}")
        # The first unit of stage 2 computes the channels missing from the stem, in `groups` groups: round up to a multiple.
        stem = -(-STEM_CHANNELS[width] // groups) * groups
        if first_block == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, stem, 3, stride=2, padding=1, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        channels = int(STAGE2_CHANNELS[groups] * width)
        self.stage2 = self._stage(stem, channels, UNITS[0], groups, first_groups=1)
        self.stage3 = self._stage(channels, 2 * channels, UNITS[1], groups, first_groups=groups)
        self.stage4 = self._stage(2 * channels, 4 * channels, UNITS[2], groups, first_groups=groups)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(pdrop)
        self.num_features = 4 * channels
        self.fc = nn.Linear(self.num_features, n_classes)

        at_stem, at_pool = (2, 4) if first_block == "imagenet" else (1, 1)
        self.feature_info = [
            {"num_chs": stem, "reduction": at_stem, "module": "relu"},
            {"num_chs": stem, "reduction": at_pool, "module": "maxpool"},
        ] + [{"num_chs": channels * 2**i, "reduction": at_pool * 2 ** (i + 1), "module": f"stage{i + 2}"} for i in range(3)]
        # As in the authors' code: normal, with std 0.01 at both ends and 1 / (channels that a filter reads) between them.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=1 / module.weight.shape[1])
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 0.0001)
        nn.init.normal_(self.conv1.weight, std=0.01)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, n_units: int, groups: int, first_groups: int) -> nn.Sequential:
        units = [ShuffleUnit(in_channels, out_channels, groups=groups, first_groups=first_groups, stride=2)]
        units += [
            ShuffleUnit(out_channels, out_channels, groups=groups, first_groups=groups, stride=1) for _ in range(n_units - 1)
        ]
        return nn.Sequential(*units)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        stem = self.relu(self.bn1(self.conv1(x)))
        pooled = self.maxpool(stem)
        c3 = self.stage2(pooled)
        c4 = self.stage3(c3)
        c5 = self.stage4(c4)
        return [stem, pooled, c3, c4, c5]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(self.avgpool(x).flatten(1))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


MODELS = {
    f"shufflenet_{name}_g{groups}": partial(ShuffleNet, groups=groups, width=width)
    for name, width in {"0_25x": 0.25, "0_5x": 0.5, "1_0x": 1.0, "1_5x": 1.5, "2_0x": 2.0}.items()
    for groups in STAGE2_CHANNELS
}
