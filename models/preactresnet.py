"""PreActResNet, also called ResNet v2.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun (2016): Identity Mappings in Deep Residual Networks.
ECCV. https://arxiv.org/abs/1603.05027

BatchNorm and ReLU precede each convolution instead of following it, and nothing follows the sum: y = x + f(x). The input of a
stage passes through it unchanged, and so do the gradients.

Where copies differ:
- Where a block changes the shape, its shortcut reads the activated input and is a bare 1x1 convolution without a BatchNorm, as in
  the authors' code (https://github.com/KaimingHe/resnet-1k-layers: "common BN, ReLU", then both branches).
- Nothing has normalized the last sum, so a BatchNorm and a ReLU precede the pooling (section 4: an extra activation after the
  last unit). The stem has neither: the first block begins with them.
- The stride of a bottleneck is on its 3x3 convolution, as in timm; the authors' CIFAR code has it on the first 1x1.
- With the basic blocks of 18 and 34 layers the first shortcut is the identity, of the stem's output before BatchNorm and ReLU, as
  in timm. (The paper activates before this first split; where its shortcut is a projection, as with bottlenecks, they agree.)

The feature map of a stage is the bare sum, which the next stage's first BatchNorm reads; the last map is after BatchNorm and
ReLU. `first_block` selects the stem as in models/resnet.py, here without BatchNorm and ReLU. Any image size works. (The paper's
own CIFAR networks are thinner, with three stages and 110 to 1001 layers.)

Module names are timm's (resnetv2_18 to resnetv2_152), so its weights load unchanged; hence the 1x1 convolution as classifier.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.resnet import DEPTHS, Stem, conv1x1, conv3x3, make_stem


class PreActBasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
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

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
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
        assert self.fc.bias is not None
        nn.init.zeros_(self.fc.bias)

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
        first_block: Stem = "imagenet",
        pdrop: float = 0.0,
    ) -> None:
        super().__init__()
        block = PreActBottleneck if bottleneck else PreActBasicBlock
        conv, pool = make_stem(in_channels, first_block)
        self.stem = nn.Sequential(OrderedDict(conv=conv, pool=pool))
        self.stages = nn.Sequential()
        reduction, stage_reduction = (2, 4) if first_block == "imagenet" else (1, 1)
        self.feature_info = [{"num_chs": 64, "reduction": reduction, "module": "stem.conv"}]
        in_channels = 64
        for i, n_blocks in enumerate(layers):
            channels, stride = 64 * 2**i, 1 if i == 0 else 2
            out_channels = channels * block.expansion
            downsample = None
            if stride != 1 or in_channels != out_channels:
                downsample = nn.Sequential(OrderedDict(conv=conv1x1(in_channels, out_channels, stride)))
            blocks = nn.Sequential(block(in_channels, channels, stride, downsample))
            for _ in range(n_blocks - 1):
                blocks.append(block(out_channels, channels))
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))
            module = f"stages.{i}" if i < len(layers) - 1 else "relu"
            self.feature_info.append({"num_chs": out_channels, "reduction": stage_reduction * 2**i, "module": module})
            in_channels = out_channels
        self.num_features = in_channels
        self.norm = nn.BatchNorm2d(self.num_features)
        self.relu = nn.ReLU(inplace=True)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        # PyTorch's own initialization for the classifier, with a bias of zero, as in the authors' code
        self.head = Head(self.num_features, n_classes, pdrop)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        conv, pool = self.stem
        maps = [conv(x)]
        x = pool(maps[0])
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


MODELS = {f"preactresnet{depth}": partial(PreActResNet, **blocks) for depth, blocks in DEPTHS.items()}
