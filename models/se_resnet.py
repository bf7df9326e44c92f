"""SE-ResNet.

Jie Hu, Li Shen, Gang Sun (2018): Squeeze-and-Excitation Networks.
CVPR. https://arxiv.org/abs/1709.01507

A ResNet whose blocks weigh the channels of what they add, by the image at hand: the mean of each channel (squeeze) goes through
two small layers (excitation), whose sigmoids scale the channels.

Where copies differ, settled after the authors' models (https://github.com/hujie-frank/SENet, models/SE-ResNet-50.prototxt):
- The two layers have biases, and the first has a sixteenth of the channels of the block's output: 4 for 64, not rounded up to 8.
- The scaling comes after the last BatchNorm, directly, and before the addition of the shortcut.

The ResNet around it is torchvision's: the stride of a bottleneck on its 3x3 convolution. The authors built on the older one of
Caffe, with the stride on the first 1x1 and a stem pooling that rounds up instead of padding. `legacy=True` gives that, as
timm's legacy_seresnet18 to 152 have it, and with it their ReLU between the last BatchNorm and the scaling in 18 and 34 layers
(depths that the authors didn't publish). Weights trained that way need that network; without the argument they are refused.

`first_block` is the stem: "imagenet" the 7x7 of stride 2 with a pooling, "cifar10" a 3x3 of stride 1 without one. Any image size
works.

Module names are timm's (seresnet50, 101, 152), so its weights load unchanged; those of legacy_seresnet* are renamed. timm's
seresnet18 and 34 round the first stage's 4 up to 8: they are other networks, of which no weights are published.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

REDUCTION = 16
LEGACY_NAMES = (("layer0.", ""), (".se_module.", ".se."), ("last_linear.", "fc."))  # timm's legacy_seresnet*, and here


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // REDUCTION, kernel_size=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // REDUCTION, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        # B C H W -> B C 1 1
        scale = x.mean(dim=(2, 3), keepdim=True)
        scale = self.fc2(self.relu(self.fc1(scale)))
        return x * scale.sigmoid()


class SEBasicBlock(nn.Module):
    """Two 3x3 convolutions, then the scaling."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None, legacy: bool) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels)
        self.downsample = downsample
        self.legacy = legacy

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = self.se(self.relu(x) if self.legacy else x)
        return self.relu(x + shortcut)


class SEBottleneck(nn.Module):
    """1x1 to fewer channels, 3x3 there, 1x1 to four times as many, then the scaling."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None, legacy: bool) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, channels, stride if legacy else 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, 1 if legacy else stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.se = SqueezeExcitation(channels * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.se(self.bn3(self.conv3(x)))
        return self.relu(x + shortcut)


class SEResNet(nn.Module):
    HEAD = ("fc",)
    CLASSIFIERS = ("fc",)
    FIRST_CONV = "conv1"
    TIMM_NAMES = {f"se_resnet{depth}": f"seresnet{depth}" for depth in (50, 101, 152)}
    LEGACY_TIMM_NAMES = {f"se_resnet{depth}": f"legacy_seresnet{depth}" for depth in (18, 34, 50, 101, 152)}

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
        legacy: bool = False,
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        block = SEBottleneck if bottleneck else SEBasicBlock
        if first_block == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=0 if legacy else 1, ceil_mode=legacy)
        else:
            self.conv1 = conv3x3(in_channels, 64)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.legacy = legacy
        if legacy:
            self.TIMM_NAMES = self.LEGACY_TIMM_NAMES
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, block: type[SEBasicBlock | SEBottleneck], channels: int, n_blocks: int, stride: int) -> nn.Sequential:
        out_channels = channels * block.expansion
        downsample = None
        if stride != 1 or self.channels != out_channels:
            downsample = nn.Sequential(conv1x1(self.channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        blocks = [block(self.channels, channels, stride, downsample, self.legacy)]
        blocks += [block(out_channels, channels, 1, None, self.legacy) for _ in range(n_blocks - 1)]
        self.channels = out_channels
        return nn.Sequential(*blocks)

    def convert_pretrained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our names for those of timm's legacy_seresnet*; others stay as they are."""
        if not any(".se_module." in key for key in weights):
            return weights
        if not self.legacy:
            raise ValueError("these are weights of a legacy_seresnet, whose strides are other ones: they need legacy=True")
        renamed = {}
        for key, value in weights.items():
            for theirs, ours in LEGACY_NAMES:
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
    "se_resnet18": partial(SEResNet, layers=(2, 2, 2, 2), bottleneck=False),
    "se_resnet34": partial(SEResNet, layers=(3, 4, 6, 3), bottleneck=False),
    "se_resnet50": partial(SEResNet, layers=(3, 4, 6, 3), bottleneck=True),
    "se_resnet101": partial(SEResNet, layers=(3, 4, 23, 3), bottleneck=True),
    "se_resnet152": partial(SEResNet, layers=(3, 8, 36, 3), bottleneck=True),
}
