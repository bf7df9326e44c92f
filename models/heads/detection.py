"""Object detection: a backbone of this project or of timm with a feature pyramid, under torchvision's detectors.

FPN: Tsung-Yi Lin, Piotr Dollar, Ross Girshick, Kaiming He, Bharath Hariharan, Serge Belongie (2017): Feature Pyramid Networks for
Object Detection. CVPR. https://arxiv.org/abs/1612.03144
FCOS: Zhi Tian, Chunhua Shen, Hao Chen, Tong He (2019): FCOS: Fully Convolutional One-Stage Object Detection. ICCV.
https://arxiv.org/abs/1904.01355
Faster R-CNN: Shaoqing Ren, Kaiming He, Ross Girshick, Jian Sun (2015): Faster R-CNN: Towards Real-Time Object Detection with
Region Proposal Networks. NIPS. https://arxiv.org/abs/1506.01497

Anchor sizes follow the strides of the maps, as in torchvision's networks with ResNet-50: one stride for FCOS, eight for Faster
R-CNN. Module names are torchvision's, so its weights load unchanged (its published ones have 91 classes: COCO's numbers).
The input is a list of images, from 0 to 1 and each with its own size; the network normalizes and scales them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from models.heads.segmentation import holds_whole_network
from models.loading.factory import create_model
from models.loading.features import feature_maps, layer_names, require_feature_maps, trim
from models.loading.pretrained import load_pretrained

Head = Literal["fcos", "fasterrcnn"]
N_MAPS = {"fcos": 3, "fasterrcnn": 4}  # the number of maps under torchvision's pyramid, counted from the last
GROUPS = 32  # of the norms in the head of FCOS
CLASSIFIER = {"fcos": "head.classification_head.cls_logits", "fasterrcnn": "roi_heads.box_predictor"}


class Pyramid(nn.Module):
    """A backbone with a feature pyramid: maps of equal width, each half the size of the previous one."""

    def __init__(self, backbone: nn.Module, n_maps: int, width: int, *, two_more: bool) -> None:
        super().__init__()
        require_feature_maps(backbone, n_maps, "the pyramid is built on")
        self.feature_info = trim(backbone, range(-n_maps, 0))
        self.body = backbone
        extra = LastLevelP6P7(width, width) if two_more else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(self.feature_info.channels(), width, extra)
        self.out_channels = width
        last = self.feature_info.reduction()[-1]
        self.strides = self.feature_info.reduction() + [last * 2, last * 4][: 2 if two_more else 1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = feature_maps(self.body, self.feature_info, x)
        return self.fpn(OrderedDict((str(i), one) for i, one in enumerate(maps)))


def create_detector(
    name: str,
    *,
    head: Head = "fcos",
    n_maps: int | None = None,
    width: int = 256,
    n_classes: int,
    in_channels: int = 3,
    img_size: int = 800,
    max_size: int | None = None,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    score_threshold: float | None = None,
    pretrained: str | Path | bool = False,
    **kwargs: Any,
) -> FCOS | FasterRCNN:
    """Build the backbone `name` under a detector. `n_classes` counts class 0, the background.

    The shorter side of an image is scaled to `img_size`, but the longer one to at most `max_size` (None: 5/3 of img_size).
    `pretrained` holds the weights of a classification network, for the backbone, or those of a whole detector.
    """
    if head == "fcos" and (width % GROUPS or width == GROUPS):
        raise ValueError(f"width {width}: FCOS normalizes its channels in {GROUPS} groups; use 64, 96, 128, ...")
    whole = holds_whole_network(pretrained)
    weights = False if whole else pretrained
    backbone = create_model(name, n_classes=n_classes, in_channels=in_channels, img_size=img_size, pretrained=weights, **kwargs)
    first_conv = layer_names(backbone, "FIRST_CONV", "first_conv")[0]
    n_maps = n_maps or N_MAPS[head]
    pyramid = Pyramid(backbone, n_maps, width, two_more=head == "fcos")
    options: dict[str, Any] = {"min_size": img_size, "max_size": max_size or round(img_size * 1333 / 800)}
    options |= {"image_mean": list(mean), "image_std": list(std)}
    if score_threshold is not None:
        options["score_thresh" if head == "fcos" else "box_score_thresh"] = score_threshold
    if head == "fcos":
        anchors = AnchorGenerator(tuple((stride,) for stride in pyramid.strides), ((1.0,),) * len(pyramid.strides))
        network = FCOS(pyramid, n_classes, anchor_generator=anchors, **options)
    else:
        sizes = tuple((8 * stride,) for stride in pyramid.strides)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        pool = MultiScaleRoIAlign([str(i) for i in range(n_maps)], output_size=7, sampling_ratio=2)
        # Otherwise torchvision guesses the scales from the first images, and wrongly from small ones.
        strides = pyramid.strides[:n_maps]
        pool.scales = [1 / stride for stride in strides]
        pool.map_levels = initLevelMapper(int(log2(strides[0])), int(log2(strides[-1])))
        network = FasterRCNN(pyramid, n_classes, rpn_anchor_generator=anchors, box_roi_pool=pool, **options)
    network.HEAD, network.FIRST_CONV = (CLASSIFIER[head],), f"backbone.body.{first_conv}"
    if whole:
        load_pretrained(network, name, pretrained)
    return network
