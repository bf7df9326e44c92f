"""Semantic segmentation: a backbone of this project or of timm, and a head that classifies every pixel.

FCN: Jonathan Long, Evan Shelhamer, Trevor Darrell (2015): Fully Convolutional Networks for Semantic Segmentation. CVPR.
https://arxiv.org/abs/1411.4038
DeepLabV3: Liang-Chieh Chen, George Papandreou, Florian Schroff, Hartwig Adam (2017): Rethinking Atrous Convolution for Semantic
Image Segmentation. https://arxiv.org/abs/1706.05587
HRNetV2: Jingdong Wang et al. (2020): Deep High-Resolution Representation Learning for Visual Recognition. IEEE TPAMI.
https://arxiv.org/abs/1908.07919

The heads of the first two are torchvision's, and so are the module names: its weights load unchanged. What torchvision calls FCN
is a head on the last map of a dilated network, not the paper's sum over three maps.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from models.heads.dilation import replace_strides
from models.loading.factory import create_model
from models.loading.features import feature_maps, layer_names, require_feature_maps, trim
from models.loading.pretrained import load_pretrained, read_weights

Head = Literal["fcn", "deeplabv3", "hrnet"]
N_MAPS = {"fcn": 1, "deeplabv3": 1, "hrnet": 4}  # the number of maps that a head reads, counted from the last


class MultiResolutionHead(nn.Sequential):
    """HRNetV2's head: all maps enlarged to the size of the largest, mixed by a 1x1 convolution, and classified."""

    def __init__(self, in_channels: int, n_classes: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, in_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, n_classes, kernel_size=1),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        largest = maps[0].shape[-2:]
        return super().forward(torch.cat([maps[0], *(_resize(smaller, largest) for smaller in maps[1:])], dim=1))


class Segmenter(nn.Module):
    """A backbone and a head that return the logits of every pixel, B C H W.

    With an auxiliary head the output in training mode is (logits, auxiliary logits).
    """

    HEAD = ("classifier", "aux_classifier")

    def __init__(self, backbone: nn.Module, head: Head, n_classes: int, *, output_stride: int | None, aux_head: bool) -> None:
        super().__init__()
        if head != "hrnet" and output_stride is not None:
            replace_strides(backbone, output_stride)
        n_maps = max(N_MAPS[head], 2 if aux_head else 1)
        require_feature_maps(backbone, n_maps, f"the head {head}{' with an auxiliary head' if aux_head else ''} reads")
        self.feature_info = trim(backbone, range(-n_maps, 0))
        self.backbone = backbone
        self.FIRST_CONV = f"backbone.{layer_names(backbone, 'FIRST_CONV', 'first_conv')[0]}"
        self.n_maps = N_MAPS[head]
        channels = self.feature_info.channels()
        self.classifier: nn.Module
        if head == "hrnet":
            self.classifier = MultiResolutionHead(sum(channels), n_classes)
        elif head == "fcn":
            self.classifier = FCNHead(channels[-1], n_classes)
        else:
            self.classifier = DeepLabHead(channels[-1], n_classes, atrous_rates(self.feature_info.reduction()[-1]))
        self.aux_classifier = FCNHead(channels[-2], n_classes) if aux_head else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps, size = feature_maps(self.backbone, self.feature_info, x), x.shape[-2:]
        logits = _resize(self.classifier(maps if self.n_maps > 1 else maps[-1]), size)
        if self.aux_classifier is None or not self.training:
            return logits
        return logits, _resize(self.aux_classifier(maps[-2]), size)


def atrous_rates(reduction: int) -> tuple[int, ...]:
    """Scale the paper's rates, 6, 12 and 18 for an output stride of 16, so that they cover the same area of the image."""
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
    **kwargs: Any,
) -> Segmenter:
    """Build the backbone `name` with a head.

    `pretrained` holds the weights of a classification network, for the backbone, or those of a whole segmentation network, whose
    head is skipped if it has other classes. `output_stride` None keeps the backbone's strides.
    """
    whole = holds_whole_network(pretrained)
    weights = False if whole else pretrained
    backbone = create_model(name, n_classes=n_classes, in_channels=in_channels, img_size=img_size, pretrained=weights, **kwargs)
    network = Segmenter(backbone, head, n_classes, output_stride=output_stride, aux_head=aux_head)
    if whole:
        load_pretrained(network, name, pretrained)
    return network


def holds_whole_network(pretrained: str | Path | bool) -> bool:
    """Return whether `pretrained` is a file with the weights of a backbone and a head, not of a classification network."""
    return not isinstance(pretrained, bool) and any(key.startswith("backbone.") for key in read_weights(Path(pretrained)))


def _resize(maps: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
