"""SE-ResNet.

Jie Hu, Li Shen, Gang Sun (2018): Squeeze-and-Excitation Networks.
CVPR. https://arxiv.org/abs/1709.01507

A ResNet whose blocks scale the channels of what they add, depending on the image: the mean of each channel (squeeze) goes through
two small layers and a sigmoid (excitation), which yield one factor per channel.

Where copies differ, settled by the authors' models (https://github.com/hujie-frank/SENet, models/SE-ResNet-50.prototxt):
- The two layers have biases, and the first has a sixteenth of the channels of the block's output: 4 for 64, not rounded up to 8.
- The scaling directly follows the last BatchNorm and precedes the addition of the shortcut.

The ResNet around it is torchvision's, with the stride of a bottleneck on its 3x3 convolution. The authors built on the older one
of Caffe, with the stride on the first 1x1 and a stem pooling that rounds up instead of padding. `legacy=True` builds that network
as timm's legacy_seresnet18 to 152 do, including their ReLU between the last BatchNorm and the scaling in 18 and 34 layers (depths
that the authors didn't publish). Weights trained that way need that network; without the argument they are refused.

`first_block` selects the stem as in models/resnet.py. Any image size works.

Module names are timm's (seresnet50, 101, 152), so its weights load unchanged; those of legacy_seresnet* are renamed. timm's
seresnet18 and 34 round the first stage's 4 up to 8: they are different networks, without published weights.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.resnet import DEPTHS, BasicBlock, Bottleneck, ResidualBlock, ResidualNetwork, Stem

REDUCTION = 16
LEGACY_NAMES = (("layer0.", ""), (".se_module.", ".se."), ("last_linear.", "fc."))  # in timm's legacy_seresnet*, and here


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


class SEBlock(ResidualBlock):
    """Scale the channels of what a block of ResNet adds. It is a base class before that of the block."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__(in_channels, channels, stride)
        self.se = SqueezeExcitation(channels * self.expansion)
        self.downsample = downsample  # assigned last, so that the order of the weights is timm's
        self.legacy = False

    def residual(self, x: Tensor) -> Tensor:
        x = super().residual(x)
        return self.se(self.relu(x) if self.legacy else x)


class SEBasicBlock(SEBlock, BasicBlock):
    """Two 3x3 convolutions, then the scaling."""


class SEBottleneck(SEBlock, Bottleneck):
    """1x1 to fewer channels, 3x3 there, 1x1 to four times as many, then the scaling."""


class SEResNet(ResidualNetwork):
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
        first_block: Stem = "imagenet",
        pdrop: float = 0.0,
        legacy: bool = False,
    ) -> None:
        super().__init__(SEBottleneck if bottleneck else SEBasicBlock, layers, n_classes, in_channels, first_block, pdrop)
        self.legacy = legacy
        if legacy:
            self.TIMM_NAMES = self.LEGACY_TIMM_NAMES
            if first_block == "imagenet":
                self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
            for module in self.modules():
                if isinstance(module, SEBasicBlock):
                    module.legacy = True
                elif isinstance(module, SEBottleneck):
                    module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride

    def convert_pretrained(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of timm's legacy_seresnet*; return others unchanged."""
        if not any(".se_module." in key for key in weights):
            return weights
        if not self.legacy:
            raise ValueError("these are weights of a legacy_seresnet, whose strides differ: they need legacy=True")
        for theirs, ours in LEGACY_NAMES:
            weights = {key.replace(theirs, ours): value for key, value in weights.items()}
        return weights


MODELS = {f"se_resnet{depth}": partial(SEResNet, **blocks) for depth, blocks in DEPTHS.items()}
