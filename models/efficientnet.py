"""EfficientNet.

Mingxing Tan, Quoc V. Le (2019): EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks.
ICML. https://arxiv.org/abs/1905.11946

A small network of inverted residual blocks (MBConv: 1x1 to six times the channels, depthwise convolution, squeeze and excitation,
1x1 back), found by search, is scaled in width, depth and image size at once. b0 is that network, b1 to b7 are larger; each has
its own image size and dropout.

Where copies differ, settled as in the authors' code (tensorflow/tpu, models/official/efficientnet) and in torchvision:
- Scaled widths are rounded to the nearest multiple of 8, or to the next one where that would remove more than 10 %. Scaled
  depths are rounded up.
- The bottleneck of squeeze and excitation has a quarter of the block's input channels, not of the expanded ones.
- The rate of drop-connect (stochastic depth per image) grows linearly over all n blocks: block i has 0.2 i / n.
- BatchNorm has eps 1e-5 and momentum 0.1 in b0 to b4, 1e-3 and 0.01 in b5 to b7, as torchvision's published weights require.
  (The authors have the latter everywhere, timm's efficientnet_b5 and larger the former: `bn_eps`, `bn_momentum`.)
- Initial weights are torchvision's, whose depthwise convolutions start smaller than the authors' by the square root of the
  channels; with SGD at 0.1, short runs on digits learn far more from there. Both draw the classifier's weights from within
  1 / sqrt(classes), designed for 1000: with ten classes that is 0.3, the first loss is 5 instead of 2.3, and training suffers. So
  here the bound is the one for 1000 classes, whatever their number.
- b2 is for 260x260; torchvision evaluates its weights at 288.

The network is fully convolutional and accepts any image size; its last map is 1/32 of it, so that below 64x64 little is left
to convolve. For small images (`first_block: cifar10`) the stem has stride 1, and every map is twice as large.

The last feature map is the output of the last block (320 channels in b0). The 1x1 convolution to four times as many channels, the
end of torchvision's `features`, is part of the head here.

Module names are torchvision's, so its weights load unchanged; timm's are renamed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from models.mobilenet import round_channels

# expansion, kernel, stride of the first block, channels, blocks: table 1
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
BEFORE_STRIDE = (1, 2, 3, 5, 7)  # the stages of `features` after which the map is reduced, or that are the last

Norm = Callable[[int], nn.BatchNorm2d]


def conv_norm(
    in_channels: int, out_channels: int, kernel: int, norm: Norm, *, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    padding = (kernel - 1) // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=False)
    return nn.Sequential(conv, norm(out_channels), *([nn.SiLU(inplace=True)] if activation else []))


class SqueezeExcitation(nn.Module):
    """Scale each channel by a factor computed from the averages of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.SiLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))  # B C H W -> B squeezed 1 1
        return x * self.scale_activation(self.fc2(scale))


class MBConv(nn.Module):
    """Expand, convolve each channel, squeeze and excite, project; add the input where the shape allows."""

    def __init__(
        self, in_channels: int, out_channels: int, *, expansion: int, kernel: int, stride: int, drop_connect: float, norm: Norm
    ) -> None:
        super().__init__()
        channels = in_channels * expansion
        layers: list[nn.Module] = [conv_norm(in_channels, channels, 1, norm)] if expansion != 1 else []
        layers += [
            conv_norm(channels, channels, kernel, norm, stride=stride, groups=channels),
            SqueezeExcitation(channels, in_channels // 4),
            conv_norm(channels, out_channels, 1, norm, activation=False),
        ]
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.stochastic_depth = StochasticDepth(drop_connect, "row")

    def forward(self, x: Tensor) -> Tensor:
        if self.has_shortcut:
            return x + self.stochastic_depth(self.block(x))
        return self.block(x)


class EfficientNet(nn.Module):
    HEAD = ("features.8", "classifier")
    CLASSIFIERS = ("classifier.1",)
    FIRST_CONV = "features.0.0"

    def __init__(
        self,
        *,
        width: float = 1.0,
        depth: float = 1.0,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Literal["imagenet", "cifar10"] = "imagenet",
        pdrop: float = 0.2,
        drop_connect: float = 0.2,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        if not 0 <= drop_connect < 1:
            raise ValueError(f"drop_connect is {drop_connect}; it must be from 0 to below 1")
        norm = partial(nn.BatchNorm2d, eps=bn_eps, momentum=bn_momentum)
        reduction = 2 if first_block == "imagenet" else 1
        channels = round_channels(32 * width)
        self.features = nn.Sequential(conv_norm(in_channels, channels, 3, norm, stride=reduction))
        self.feature_info = []
        all_blocks = sum(math.ceil(blocks * depth) for *_, blocks in STAGES)
        block = 0
        for i, (expansion, kernel, stride, stage_channels, blocks) in enumerate(STAGES, start=1):
            stage = nn.Sequential()
            mbconv = partial(MBConv, expansion=expansion, kernel=kernel, norm=norm)
            for j in range(math.ceil(blocks * depth)):
                out_channels = round_channels(stage_channels * width)
                rate = drop_connect * block / all_blocks
                stage.append(mbconv(channels, out_channels, stride=stride if j == 0 else 1, drop_connect=rate))
                channels = out_channels
                block += 1
            self.features.append(stage)
            reduction *= stride
            if i in BEFORE_STRIDE:
                self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"features.{i}"})
        self.num_features = 4 * channels
        self.features.append(conv_norm(channels, self.num_features, 1, norm))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(pdrop), nn.Linear(self.num_features, n_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                limit = 1 / math.sqrt(1000)
                nn.init.uniform_(module.weight, -limit, limit)
                nn.init.zeros_(module.bias)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        x = self.features[0](x)
        maps = []
        for i in range(1, len(STAGES) + 1):
            x = self.features[i](x)
            if i in BEFORE_STRIDE:
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        dropout, linear = self.classifier
        x = dropout(self.avgpool(self.features[-1](x)).flatten(1))
        return x if pre_logits else linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def convert_pretrained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename timm's weights; return torchvision's unchanged."""
        if "conv_stem.weight" not in weights:
            return weights
        return {_torchvision_name(key): value for key, value in weights.items()}


# timm's names of layers, and torchvision's
OUTSIDE_BLOCKS = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.8.0",
    "bn2": "features.8.1",
    "classifier": "classifier.1",
}
IN_BLOCKS = {
    "conv_pw": "0.0",
    "bn1": "0.1",
    "conv_dw": "1.0",
    "bn2": "1.1",
    "se.conv_reduce": "2.fc1",
    "se.conv_expand": "2.fc2",
    "conv_pwl": "3.0",
    "bn3": "3.1",
}
IN_BLOCKS_WITHOUT_EXPANSION = {
    "conv_dw": "0.0",
    "bn1": "0.1",
    "se.conv_reduce": "1.fc1",
    "se.conv_expand": "1.fc2",
    "conv_pw": "2.0",
    "bn2": "2.1",
}


def _torchvision_name(key: str) -> str:
    """Return torchvision's name of the tensor that timm calls `key`; a name unknown to timm is returned unchanged."""
    layer, _, tensor = key.rpartition(".")
    if layer in OUTSIDE_BLOCKS:
        return f"{OUTSIDE_BLOCKS[layer]}.{tensor}"
    if not layer.startswith("blocks."):
        return key
    _, stage, block, layer = layer.split(".", 3)
    names = IN_BLOCKS_WITHOUT_EXPANSION if stage == "0" else IN_BLOCKS
    return f"features.{int(stage) + 1}.{block}.block.{names[layer]}.{tensor}" if layer in names else key


MODELS = {
    "efficientnet_b0": partial(EfficientNet, width=1.0, depth=1.0, img_size=224, pdrop=0.2),
    "efficientnet_b1": partial(EfficientNet, width=1.0, depth=1.1, img_size=240, pdrop=0.2),
    "efficientnet_b2": partial(EfficientNet, width=1.1, depth=1.2, img_size=260, pdrop=0.3),
    "efficientnet_b3": partial(EfficientNet, width=1.2, depth=1.4, img_size=300, pdrop=0.3),
    "efficientnet_b4": partial(EfficientNet, width=1.4, depth=1.8, img_size=380, pdrop=0.4),
    "efficientnet_b5": partial(EfficientNet, width=1.6, depth=2.2, img_size=456, pdrop=0.4, bn_eps=1e-3, bn_momentum=0.01),
    "efficientnet_b6": partial(EfficientNet, width=1.8, depth=2.6, img_size=528, pdrop=0.5, bn_eps=1e-3, bn_momentum=0.01),
    "efficientnet_b7": partial(EfficientNet, width=2.0, depth=3.1, img_size=600, pdrop=0.5, bn_eps=1e-3, bn_momentum=0.01),
}
