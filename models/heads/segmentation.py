"""Networks that give every pixel a class: a backbone of this project or of timm, and a head on its feature maps.

FCN: Jonathan Long, Evan Shelhamer, Trevor Darrell (2015): Fully Convolutional Networks for Semantic Segmentation. CVPR.
https://arxiv.org/abs/1411.4038
DeepLabV3: Liang-Chieh Chen, George Papandreou, Florian Schroff, Hartwig Adam (2017): Rethinking Atrous Convolution for Semantic
Image Segmentation. https://arxiv.org/abs/1706.05587
HRNetV2: Jingdong Wang et al. (2020): Deep High-Resolution Representation Learning for Visual Recognition. IEEE TPAMI.
https://arxiv.org/abs/1908.07919

The heads of the first two are torchvision's, and so are the names of modules: its weights load unchanged. What it calls FCN is a
head on the last map of a dilated network, not the paper's sum over three maps.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from models.heads.dilation import replace_strides
from models.loading.factory import create_model
from models.loading.features import FeatureExtractor
from models.loading.pretrained import load_pretrained, read_weights

Head = Literal["fcn", "deeplabv3", "hrnet"]
N_MAPS = {"fcn": 1, "deeplabv3": 1, "hrnet": 4}  # that a head reads, counted from the last


class MultiResolutionHead(nn.Sequential):
    """HRNetV2's: all maps at the size of the largest, mixed by a 1x1 convolution, and classified."""

    def __init__(self, in_channels: int, n_classes: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, in_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, n_classes, kernel_size=1),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        largest = maps[0].shape[-2:]
        return super().forward(torch.cat([maps[0], *(_resized(smaller, largest) for smaller in maps[1:])], dim=1))


class Segmenter(FeatureExtractor):
    """The image in, logits of every pixel out: B C H W. With an auxiliary head, in training mode, (logits, auxiliary logits)."""

    HEAD = ("classifier", "aux_classifier")

    def __init__(self, backbone: nn.Module, head: Head, n_classes: int, *, output_stride: int | None, aux_head: bool) -> None:
        if head != "hrnet" and output_stride is not None:
            replace_strides(backbone, output_stride)
        n_maps = max(N_MAPS[head], 2 if aux_head else 1)
        if len(backbone.feature_info) < n_maps:
            raise ValueError(
                f"the head {head}{' with an auxiliary head' if aux_head else ''} reads {n_maps} feature maps; "
                f"{type(backbone).__name__} has {len(backbone.feature_info)}"
            )
        super().__init__(backbone, range(-n_maps, 0))
        self.n_maps = N_MAPS[head]
        channels = self.feature_info.channels()
        if head == "hrnet":
            self.classifier = MultiResolutionHead(sum(channels), n_classes)
        elif head == "fcn":
            self.classifier = FCNHead(channels[-1], n_classes)
        else:
            self.classifier = DeepLabHead(channels[-1], n_classes, atrous_rates(self.feature_info.reduction()[-1]))
        self.aux_classifier = FCNHead(channels[-2], n_classes) if aux_head else None

    @property
    def FIRST_CONV(self) -> str:  # noqa: N802 - as the families call it
        first = getattr(self.backbone, "FIRST_CONV", None) or self.backbone.pretrained_cfg["first_conv"]
        return f"backbone.{first}"

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps, size = super().forward(x), x.shape[-2:]
        logits = _resized(self.classifier(maps if self.n_maps > 1 else maps[-1]), size)
        if self.aux_classifier is None or not self.training:
            return logits
        return logits, _resized(self.aux_classifier(maps[-2]), size)


def atrous_rates(reduction: int) -> tuple[int, int, int]:
    """The paper's, 6, 12 and 18 at an output stride of 16: the same places of the image at any other."""
    return tuple(max(1, round(rate * 16 / reduction)) for rate in (6, 12, 18))


def create_segmenter(
    name: str,
    *,
    head: Head = "fcn",
    output_stride: int | None = 8,
    aux_head: bool = False,
    n_classes: int,
    in_channels: int = 3,
    img_size: int | None = None,
    pretrained: str | Path | bool = False,
    **kwargs,
) -> Segmenter:
    """The backbone `name` with a head.

    `pretrained` is the weights of a classification network for the backbone, or those of a whole network like this one, whose
    head is left out where it has other classes. `output_stride` None keeps the backbone's strides.
    """
    of_whole = isinstance(pretrained, (str, Path)) and holds_a_network_around_a_backbone(Path(pretrained))
    of_backbone = False if of_whole else pretrained
    backbone = create_model(
        name, n_classes=n_classes, in_channels=in_channels, img_size=img_size, pretrained=of_backbone, **kwargs
    )
    network = Segmenter(backbone, head, n_classes, output_stride=output_stride, aux_head=aux_head)
    if of_whole:
        load_pretrained(network, name, pretrained)
    return network


def holds_a_network_around_a_backbone(path: Path) -> bool:
    return any(key.startswith("backbone.") for key in read_weights(path))


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
