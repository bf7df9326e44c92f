from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, FCOS_ResNet50_FPN_Weights

from engine.run.macs import count
from models.heads.detection import create_detector
from tests.models.reference import randomize

SIZES = {"img_size": 64, "max_size": 100}
HEADS = ["fcos", "fasterrcnn"]


def theirs(head, n_classes):
    build = getattr(torchvision.models.detection, f"{head}_resnet50_fpn")
    return build(weights=None, weights_backbone=None, num_classes=n_classes, min_size=64, max_size=100)


def with_all_boxes(network):
    """Make the detector return every box, however low its score."""
    if hasattr(network, "roi_heads"):
        network.roi_heads.score_thresh = 0.0
    else:
        network.score_thresh = 0.0
    return network


def scene():
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 70, 50, generator=generator), torch.rand(3, 40, 90, generator=generator)]
    there = {"boxes": torch.tensor([[1.0, 2, 40, 60], [10, 10, 30, 30]]), "labels": torch.tensor([3, 1])}
    return images, [there, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]


@pytest.mark.parametrize("head", HEADS)
def test_same_weights_give_the_same_output_as_in_torchvision(head):
    torch.manual_seed(0)
    reference, network = theirs(head, 6), create_detector("resnet50", head=head, n_classes=6, **SIZES)
    network.load_state_dict(reference.state_dict(), strict=True)
    images, targets = scene()
    with torch.no_grad():
        for found, expected in zip(with_all_boxes(network).eval()(images), with_all_boxes(reference).eval()(images), strict=True):
            assert len(found["boxes"]) > 10
            assert torch.equal(found["labels"], expected["labels"])
            torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
        torch.manual_seed(2)  # for the proposals that Faster R-CNN draws
        losses = network.train()(images, targets)
        torch.manual_seed(2)
        torch.testing.assert_close(losses, reference.train()(images, targets), rtol=1e-4, atol=1e-5)


def test_output_does_not_depend_on_previous_images():
    torch.manual_seed(0)
    fresh = with_all_boxes(create_detector("resnet18", head="fasterrcnn", n_classes=3, img_size=28, max_size=60)).eval()
    used = with_all_boxes(create_detector("resnet18", head="fasterrcnn", n_classes=3, img_size=28, max_size=60)).eval()
    used.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        used([torch.rand(3, 45, 28)])  # padded to 64 x 32 pixels: at a stride of 32, two rows for 45 pixels
        image = torch.rand(3, 56, 28)
        (after_another,), (at_first,) = used([image]), fresh([image])
    assert len(at_first["boxes"]) > 10
    for name, value in at_first.items():
        assert torch.equal(after_another[name], value)


@pytest.mark.parametrize(
    ("head", "published"), [("fcos", FCOS_ResNet50_FPN_Weights), ("fasterrcnn", FasterRCNN_ResNet50_FPN_Weights)]
)
def test_the_coco_network_has_the_published_number_of_parameters(head, published):
    with torch.device("meta"):
        network = create_detector("resnet50", head=head, n_classes=91)
    norms = sum(p.numel() for norm in network.modules() if isinstance(norm, nn.BatchNorm2d) for p in norm.parameters())
    assert (
        sum(p.numel() for p in network.parameters()) - norms == published.DEFAULT.meta["num_params"]
    )  # torchvision's norms are frozen


@pytest.mark.parametrize(
    ("name", "options", "strides"),
    [
        ("resnet18", {}, [8, 16, 32, 64, 128]),
        ("resnet18", {"first_block": "cifar10"}, [2, 4, 8, 16, 32]),
        ("resnet18", {"n_maps": 4}, [4, 8, 16, 32, 64, 128]),
        ("timm/resnet18", {"n_maps": 2}, [16, 32, 64, 128]),
        ("hrnet_w18_small", {}, [8, 16, 32, 64, 128]),
    ],
)
def test_anchors_follow_the_strides_of_the_maps(name, options, strides):
    network = create_detector(name, n_classes=4, width=64, img_size=128, **options)
    assert network.anchor_generator.sizes == tuple((stride,) for stride in strides)
    with torch.no_grad():
        maps = network.backbone(torch.zeros(1, 3, 128, 128))
    assert [128 // one.shape[-1] for one in maps.values()] == strides


def test_faster_rcnn_anchors_have_eight_strides_and_three_shapes():
    network = create_detector("resnet18", head="fasterrcnn", n_classes=4, width=64, img_size=64)
    assert network.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert set(network.rpn.anchor_generator.aspect_ratios) == {(0.5, 1.0, 2.0)}


@pytest.mark.parametrize("head", HEADS)
def test_a_gradient_reaches_every_parameter(head):
    network = create_detector("resnet18", head=head, n_classes=4, width=64, **SIZES).train()
    images, targets = scene()
    sum(network(images, targets).values()).backward()
    missing = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert missing == []


def test_a_backbone_without_enough_feature_maps_is_refused():
    with pytest.raises(ValueError, match="the pyramid is built on 3 feature maps; LeNet5 has 2"):
        create_detector("lenet", n_classes=3, img_size=32)


def test_score_threshold_is_passed_to_both_detectors():
    build = partial(create_detector, "resnet18", n_classes=3, width=64, img_size=64, score_threshold=0.3)
    assert build().score_thresh == build(head="fasterrcnn").roi_heads.score_thresh == 0.3
    assert create_detector("resnet18", n_classes=3, width=64).transform.max_size == 1333


@pytest.mark.parametrize("head", HEADS)
def test_weights_of_a_classification_network_and_of_a_whole_detector_load(head, tmp_path, caplog):
    reference = randomize(torchvision.models.resnet18(), img_size=64)
    torch.save(reference.state_dict(), tmp_path / "resnet18.pth")
    build = partial(create_detector, "resnet18", head=head, width=64, img_size=64)
    network = build(n_classes=5, pretrained=tmp_path / "resnet18.pth")
    assert torch.equal(network.backbone.body.layer4[1].conv2.weight, reference.layer4[1].conv2.weight)
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    same = build(n_classes=5, pretrained=tmp_path / "whole.pth")
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in same.state_dict().items())
    caplog.clear()
    other = build(n_classes=3, pretrained=tmp_path / "whole.pth")
    assert torch.equal(other.backbone.fpn.inner_blocks[0][0].weight, network.backbone.fpn.inner_blocks[0][0].weight)
    assert "skipped: " + ("head.classification_head.cls_logits" if head == "fcos" else "roi_heads.box_predictor") in caplog.text


def test_macs_are_counted_with_the_number_of_proposals_that_the_detector_processes():
    torch.manual_seed(0)
    network = create_detector("resnet18", head="fasterrcnn", n_classes=5, width=64, img_size=64)
    counted = count(network, 3, 64)
    n_anchors = 3 * sum((64 // stride) ** 2 for stride in (4, 8, 16, 32, 64))
    assert n_anchors > 1000  # of which a thousand are processed
    per_proposal = 49 * 64 * 1024 + 1024 * 1024 + 1024 * 5 * (1 + 4)
    assert counted.stages["roi_heads"][1] == pytest.approx(1000 * per_proposal, rel=0.001)
    assert counted.params == sum(p.numel() for p in network.parameters())
    assert network.rpn.nms_thresh == 0.7
