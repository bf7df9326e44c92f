"""GoogLeNet (Inception v1).

Christian Szegedy, Wei Liu, Yangqing Jia, Pierre Sermanet, Scott Reed, Dragomir Anguelov, Dumitru Erhan, Vincent Vanhoucke, Andrew
Rabinovich (2015): Going Deeper with Convolutions. CVPR. https://arxiv.org/abs/1409.4842

An inception block processes its input at four scales at once - 1x1, 3x3, 5x5 and a pooling - and concatenates the results; 1x1
convolutions make the larger ones cheap. Two auxiliary heads, after 4a and 4d, bring gradient to the lower layers in training.

In training mode the network returns (logits, aux1, aux2), the auxiliary heads in the order of the network (torchvision reverses
them); the paper adds their losses with a weight of 0.3. In evaluation mode it returns the logits and skips those heads.

Differences from the paper, as in torchvision, whose network and weights came from TensorFlow's slim models:
- The third branch has a 3x3 convolution where the paper has a 5x5 (https://github.com/pytorch/vision/issues/906).
  `branch3_kernel=5` is the paper's; those weights don't fit it.
- BatchNorm (eps 0.001) after every convolution, which has no bias, in place of the local response normalization of the stem.
- The last pooling between the groups is 2x2, not 3x3. The pooling before the auxiliary heads divides the map into 4x4 fields for
  any image, where the paper's 5x5 of stride 3 yields 4x4 only from 14x14.
- Initial weights, of convolutions and of linear layers, are normal with std 0.01 (torchvision truncates the distribution at 200
  standard deviations, that is, not at all). The paper doesn't specify them.
Dropout is the paper's: 0.4 before the classifier (torchvision has 0.2) and 0.7 in the auxiliary heads.

torchvision's published weights expect colors from -1 to 1, as slim's did, not the mean and standard deviation of ImageNet:
`transform_input=True` converts the latter to the former; `pretrained=True` sets it, as torchvision does. Their auxiliary heads
were never trained.

`first_block` is the stem: "imagenet" is the paper's, which divides the resolution by 8, for images from 15x15 on; "cifar10" makes
the 7x7 of stride 2 a 3x3 of stride 1 and omits both poolings, so that the maps of a 32x32 image are 32, 16 and 8 where those of a
large one are 28, 14 and 7.

Module names are torchvision's, so its weights load unchanged.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConvBNReLU(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four parallel branches; the arguments are a row of the paper's table 1."""

    def __init__(
        self,
        in_channels: int,
        out_1x1: int,
        reduce_3x3: int,
        out_3x3: int,
        reduce_5x5: int,
        out_5x5: int,
        pool_proj: int,
        branch3_kernel: int,
    ) -> None:
        super().__init__()
        self.branch1 = ConvBNReLU(in_channels, out_1x1, 1)
        self.branch2 = nn.Sequential(ConvBNReLU(in_channels, reduce_3x3, 1), ConvBNReLU(reduce_3x3, out_3x3, 3))
        self.branch3 = nn.Sequential(ConvBNReLU(in_channels, reduce_5x5, 1), ConvBNReLU(reduce_5x5, out_5x5, branch3_kernel))
        self.branch4 = nn.Sequential(nn.MaxPool2d(kernel_size=3, stride=1, padding=1), ConvBNReLU(in_channels, pool_proj, 1))
        self.out_channels = out_1x1 + out_3x3 + out_5x5 + pool_proj

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class AuxiliaryHead(nn.Module):
    def __init__(self, in_channels: int, n_classes: int, pdrop: float) -> None:
        super().__init__()
        self.conv = ConvBNReLU(in_channels, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(pdrop)
        self.fc2 = nn.Linear(1024, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, 4)).flatten(1)  # B C H W -> B 2048
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class GoogLeNet(nn.Module):
    HEAD = ("aux1", "aux2", "fc")
    CLASSIFIERS = ("fc", "aux1.fc2", "aux2.fc2")
    FIRST_CONV = "conv1.conv"
    PUBLISHED_WITH = {"transform_input": True}

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Literal["imagenet", "cifar10"] = "imagenet",
        branch3_kernel: Literal[3, 5] = 3,
        pdrop: float = 0.4,
        pdrop_aux: float = 0.7,
        transform_input: bool = False,
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        if branch3_kernel not in (3, 5):
            raise ValueError(f"branch3_kernel is {branch3_kernel}; it can be 3 (torchvision's) or 5 (the paper's)")
        if transform_input and in_channels != 3:
            raise ValueError(f"transform_input is for the three colors of ImageNet; in_channels is {in_channels}")
        smallest = 15 if first_block == "imagenet" else 2  # smaller images leave no map for the pooling after 3b
        if img_size < smallest:
            readable = f"images of {smallest}x{smallest} and more"
            raise ValueError(f"GoogLeNet with first_block {first_block} reads {readable}; img_size is {img_size}")
        self.transform_input = transform_input
        if first_block == "imagenet":
            self.conv1 = ConvBNReLU(in_channels, 64, 7, stride=2)
            self.maxpool1: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
            self.maxpool2: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        else:
            self.conv1 = ConvBNReLU(in_channels, 64, 3)
            self.maxpool1, self.maxpool2 = nn.Identity(), nn.Identity()
        self.conv2 = ConvBNReLU(64, 64, 1)
        self.conv3 = ConvBNReLU(64, 192, 3)

        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32, branch3_kernel)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64, branch3_kernel)
        self.maxpool3 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64, branch3_kernel)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64, branch3_kernel)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64, branch3_kernel)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64, branch3_kernel)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128, branch3_kernel)
        self.maxpool4 = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128, branch3_kernel)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128, branch3_kernel)

        self.aux1 = AuxiliaryHead(self.inception4a.out_channels, n_classes, pdrop_aux)
        self.aux2 = AuxiliaryHead(self.inception4d.out_channels, n_classes, pdrop_aux)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(pdrop)
        self.num_features = self.inception5b.out_channels
        self.fc = nn.Linear(self.num_features, n_classes)

        reductions = (2, 4, 8, 16, 32) if first_block == "imagenet" else (1, 1, 1, 2, 4)
        widths = {"conv1": 64, "conv3": 192, "inception3b": 480, "inception4e": 832, "inception5b": 1024}
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": module}
            for (module, width), reduction in zip(widths.items(), reductions, strict=True)
        ]
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(module.weight, std=0.01)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        return self._forward_body(x)[0]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.dropout(self.avgpool(x).flatten(1))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        stages, after_4a, after_4d = self._forward_body(x)
        logits = self.forward_head(stages[-1])
        return (logits, self.aux1(after_4a), self.aux2(after_4d)) if self.training else logits

    def _forward_body(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the feature maps, and the two maps that the auxiliary heads read."""
        if self.transform_input:  # from colors normalized by ImageNet's mean and standard deviation to colors from -1 to 1
            statistics = enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
            x = torch.cat([x[:, i : i + 1] * (std / 0.5) + (mean - 0.5) / 0.5 for i, (mean, std) in statistics], dim=1)
        stem = self.conv1(x)
        c2 = self.conv3(self.conv2(self.maxpool1(stem)))
        c3 = self.inception3b(self.inception3a(self.maxpool2(c2)))
        after_4a = self.inception4a(self.maxpool3(c3))
        after_4d = self.inception4d(self.inception4c(self.inception4b(after_4a)))
        c4 = self.inception4e(after_4d)
        c5 = self.inception5b(self.inception5a(self.maxpool4(c4)))
        return [stem, c2, c3, c4, c5], after_4a, after_4d


MODELS = {"googlenet": GoogLeNet}
