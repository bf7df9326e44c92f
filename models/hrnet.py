"""HRNet, the high-resolution network.

Jingdong Wang, Ke Sun, Tianheng Cheng, Borui Jiang, Chaorui Deng, Yang Zhao, Dong Liu, Yadong Mu, Mingkui Tan, Xinggang Wang,
Wenyu Liu, Bin Xiao (2020): Deep High-Resolution Representation Learning for Visual Recognition. IEEE TPAMI.
https://arxiv.org/abs/1908.07919 (HRNetV2; the first one is Sun, Xiao, Liu, Wang (2019), CVPR, https://arxiv.org/abs/1902.09212)

Other networks reduce the image to a small map and, where a task needs a large one, enlarge it again. This one keeps its highest
resolution to the end and adds a lower one per stage, in parallel: up to four branches of C, 2C, 4C and 8C channels at strides 4,
8, 16 and 32, which exchange their maps at the end of every module. C names the network: w18, w32, w48. The branches consist of
ResNet's basic blocks; its bottlenecks form the first layer and the head.

Where copies differ, settled by the authors' classification code (https://github.com/HRNet/HRNet-Image-Classification) and timm:
- A map is enlarged by a 1x1 convolution, BatchNorm and nearest-neighbor repetition (the authors' segmentation code interpolates
  bilinearly), and reduced by one 3x3 convolution of stride 2 per halving; only the last changes the channels, and has no ReLU.
- ReLU comes once, after the sum of all maps that a branch receives.
- A new branch starts from the lowest resolution alone.
- For classification, four bottlenecks widen the branches to 128, 256, 512 and 1024 channels, and 3x3 convolutions of stride 2
  (with bias) lead from each to the next, whose map is added; a 1x1 (with bias) ends in 2048.
The feature maps are the four branches themselves, before that head, as in the paper's segmentation and detection.

`first_block: cifar10` sets the stride of both convolutions of the stem to 1. Any image size works. Module names are timm's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from models.resnet import BasicBlock, Bottleneck

STEM = 64  # channels
HEAD_WIDTHS = (32, 64, 128, 256)  # of the bottlenecks of the head, which output four times as many channels


def convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias)


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(convolution(in_channels, out_channels, kernel_size, stride), nn.BatchNorm2d(out_channels))


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        convolution(in_channels, out_channels, kernel_size, stride, bias), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


def bottleneck(in_channels: int, width: int) -> Bottleneck:
    out_channels = width * Bottleneck.expansion
    downsample = None if in_channels == out_channels else conv_bn(in_channels, out_channels, 1)
    return Bottleneck(in_channels, width, downsample=downsample)


class HighResolutionModule(nn.Module):
    """Blocks within each branch, then a fusion: every branch becomes the sum of the maps of all branches."""

    def __init__(self, widths: Sequence[int], n_blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(width, width) for _ in range(n_blocks))) for width in widths)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._route(widths, source, target) for source in range(len(widths))) for target in range(len(widths))
        )
        self.fuse_act = nn.ModuleList(nn.ReLU() for _ in widths)

    @staticmethod
    def _route(widths: Sequence[int], source: int, target: int) -> nn.Module:
        """Make the layers that bring the map of one branch to the channels of another, and down to its size."""
        if source == target:
            return nn.Identity()
        if source > target:
            return conv_bn(widths[source], widths[target], 1)
        halvings = [conv_bn_relu(widths[source], widths[source], 3, stride=2) for _ in range(target - source - 1)]
        return nn.Sequential(*halvings, conv_bn(widths[source], widths[target], 3, stride=2))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for target, (routes, activation) in enumerate(zip(self.fuse_layers, self.fuse_act, strict=True)):
            assert isinstance(routes, nn.ModuleList)
            received = [route(x) for route, x in zip(routes, maps, strict=True)]
            size = maps[target].shape[-2:]
            enlarged = [F.interpolate(x, size=size, mode="nearest") for x in received[target + 1 :]]
            fused.append(activation(sum([*received[1 : target + 1], *enlarged], start=received[0])))
        return fused


class HRNet(nn.Module):
    HEAD = ("incre_modules", "downsamp_modules", "final_layer", "classifier")
    CLASSIFIERS = ("classifier",)
    FIRST_CONV = "conv1"

    def __init__(
        self,
        *,
        width: int,
        first_width: int = 64,
        first_blocks: int = 4,
        n_modules: Sequence[int] = (1, 4, 3),
        n_blocks: int = 4,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Literal["imagenet", "cifar10"] = "imagenet",
        pdrop: float = 0.0,
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        stride = 2 if first_block == "imagenet" else 1
        self.conv1 = convolution(in_channels, STEM, 3, stride)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = convolution(STEM, STEM, 3, stride)
        self.bn2 = nn.BatchNorm2d(STEM)
        self.act2 = nn.ReLU(inplace=True)

        first_channels = first_width * Bottleneck.expansion
        self.layer1 = nn.Sequential(
            bottleneck(STEM, first_width), *(bottleneck(first_channels, first_width) for _ in range(first_blocks - 1))
        )
        widths = [width * 2**i for i in range(4)]
        self.transition1 = nn.ModuleList(
            [conv_bn_relu(first_channels, widths[0], 3), self._new_branch(first_channels, widths[1])]
        )
        self.stage2 = self._stage(widths[:2], n_modules[0], n_blocks)
        self.transition2 = nn.ModuleList([nn.Identity(), nn.Identity(), self._new_branch(widths[1], widths[2])])
        self.stage3 = self._stage(widths[:3], n_modules[1], n_blocks)
        self.transition3 = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), self._new_branch(widths[2], widths[3])])
        self.stage4 = self._stage(widths, n_modules[2], n_blocks)

        head_channels = [head_width * Bottleneck.expansion for head_width in HEAD_WIDTHS]
        self.incre_modules = nn.ModuleList(
            nn.Sequential(bottleneck(channels, head_width)) for channels, head_width in zip(widths, HEAD_WIDTHS, strict=True)
        )
        self.downsamp_modules = nn.ModuleList(
            conv_bn_relu(head_channels[i], head_channels[i + 1], 3, stride=2, bias=True) for i in range(3)
        )
        self.num_features = 2048
        self.final_layer = conv_bn_relu(head_channels[-1], self.num_features, 1, bias=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(pdrop)
        self.classifier = nn.Linear(self.num_features, n_classes)

        last = f"stage4.{n_modules[2] - 1}.fuse_act"
        self.feature_info = [{"num_chs": STEM, "reduction": stride, "module": "act1"}] + [
            {"num_chs": widths[i], "reduction": stride**2 * 2**i, "module": f"{last}.{i}"} for i in range(4)
        ]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _new_branch(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(conv_bn_relu(in_channels, out_channels, 3, stride=2))

    @staticmethod
    def _stage(widths: Sequence[int], n_modules: int, n_blocks: int) -> nn.Sequential:
        return nn.Sequential(*(HighResolutionModule(widths, n_blocks) for _ in range(n_modules)))

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Return the stem's first map, then the four branches from the highest resolution to the lowest."""
        stem = self.act1(self.bn1(self.conv1(x)))
        x = self.layer1(self.act2(self.bn2(self.conv2(stem))))
        maps = self.stage2([branch(x) for branch in self.transition1])
        for transition, stage in ((self.transition2, self.stage3), (self.transition3, self.stage4)):
            maps = stage([*maps, transition[-1](maps[-1])])
        return [stem, *maps]

    def forward_features(self, x: Tensor) -> Tensor:
        """Combine the four branches into one map of the lowest resolution."""
        widened = [widen(branch) for widen, branch in zip(self.incre_modules, self.forward_stages(x)[1:], strict=True)]
        x = widened[0]
        for halve, branch in zip(self.downsamp_modules, widened[1:], strict=True):
            x = branch + halve(x)
        return self.final_layer(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(self.avgpool(x).flatten(1))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


MODELS = {
    "hrnet_w18_small": partial(HRNet, width=16, first_width=32, first_blocks=1, n_modules=(1, 1, 1), n_blocks=2),
    "hrnet_w18": partial(HRNet, width=18),
    "hrnet_w32": partial(HRNet, width=32),
    "hrnet_w48": partial(HRNet, width=48),
}
