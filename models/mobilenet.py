"""MobileNet (v1).

Andrew G. Howard, Menglong Zhu, Bo Chen, Dmitry Kalenichenko, Weijun Wang, Tobias Weyand, Marco Andreetto, Hartwig Adam (2017):
MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications. https://arxiv.org/abs/1704.04861

A 3x3 convolution is split in two: a depthwise one that filters each channel separately, and a pointwise (1x1) one that mixes the
channels. That costs 8 to 9 times less. A width multiplier makes all layers thinner; the paper's are 1, 0.75, 0.5 and 0.25. With
others, channels are rounded to multiples of 8, as in timm and in the authors' code for the later MobileNets.

Where copies differ:
- No pooling follows the stem: only its stride halves the image. For small images (`first_block: cifar10`) that stride is 1.
- In table 1 the last depthwise convolution has stride 2, yet its map stays 7x7: the stride is 1, as in the authors' code
  (tensorflow/models, research/slim/nets/mobilenet_v1.py).
- Both halves of a block have a BatchNorm and an activation. In the paper's text that is a ReLU; in the authors' code and in timm,
  whose weights are trained with it, a ReLU6. `activation` selects "relu6" (the default) or "relu".
- Convolutions are padded on all sides, and BatchNorm's eps is 1e-5, as in timm; the authors' code pads strided ones only at the
  right and bottom, and uses 1e-3.

The network is fully convolutional and accepts any image size; its last map is 1/32 of it ("cifar10": 1/16).

Module names are those of timm's mobilenetv1_100, so its weights load unchanged (they expect colors from -1 to 1).
"""

from functools import partial
from typing import Literal

from torch import Tensor, nn

# channels, blocks, and the stride of the first block: table 1
STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
ACTIVATIONS = {"relu6": nn.ReLU6, "relu": nn.ReLU}


def round_channels(channels: float) -> int:
    """Round to the nearest multiple of 8 that is at least 90 % of the number."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class DepthwiseSeparable(nn.Module):
    """A 3x3 convolution of each channel separately, then a 1x1 over the channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.activation = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv_dw(x)))
        return self.activation(self.bn2(self.conv_pw(x)))


class MobileNet(nn.Module):
    HEAD = ("classifier",)
    CLASSIFIERS = ("classifier",)
    FIRST_CONV = "conv_stem"
    TIMM_NAMES = {"mobilenet": "mobilenetv1_100"}

    def __init__(
        self,
        *,
        width: float = 1.0,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Literal["imagenet", "cifar10"] = "imagenet",
        activation: Literal["relu6", "relu"] = "relu6",
        pdrop: float = 0.0,
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it can be relu6 or relu")
        if width <= 0:
            raise ValueError(f"width is {width}; it must be above 0")
        stem_stride = 2 if first_block == "imagenet" else 1
        channels = round_channels(32 * width)
        self.conv_stem = nn.Conv2d(in_channels, channels, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.activation = ACTIVATIONS[activation](inplace=True)
        self.blocks = nn.Sequential()
        self.feature_info = []
        reduction = stem_stride
        for i, (stage_channels, n_blocks, stride) in enumerate(STAGES):
            stage = nn.Sequential()
            for j in range(n_blocks):
                out_channels = round_channels(stage_channels * width)
                stage.append(DepthwiseSeparable(channels, out_channels, stride if j == 0 else 1, ACTIVATIONS[activation]))
                channels = out_channels
            self.blocks.append(stage)
            reduction *= stride
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"blocks.{i}"})
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(pdrop)
        self.num_features = channels
        self.classifier = nn.Linear(channels, n_classes)

        # The paper doesn't specify the initial weights; these are from the authors' code, the same for all layers.
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.09, a=-0.18, b=0.18)
        nn.init.zeros_(self.classifier.bias)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        x = self.activation(self.bn1(self.conv_stem(x)))
        maps = []
        for stage in self.blocks:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(self.global_pool(x).flatten(1))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


MODELS = {
    "mobilenet": partial(MobileNet, width=1.0),
    "mobilenet_0_75x": partial(MobileNet, width=0.75),
    "mobilenet_0_5x": partial(MobileNet, width=0.5),
    "mobilenet_0_25x": partial(MobileNet, width=0.25),
}
