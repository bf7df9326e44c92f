import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from models.resnext import ResNeXt
from tests.models.reference import assert_loads_and_agrees


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnext101_64x4d"])
def test_torchvision_weights_load_and_give_the_same_logits(name):
    assert_loads_and_agrees(create_model(name), torchvision.models.get_model(name), img_size=48)


def test_timm_weights_load_and_give_the_same_logits_where_torchvision_has_none():
    assert_loads_and_agrees(create_model("resnext101_32x4d"), timm.create_model("resnext101_32x4d"), img_size=48)


@pytest.mark.parametrize(("cardinality", "width"), [(32, 4), (2, 64)])
def test_29_layers_are_the_first_three_stages_of_torchvisions_blocks(cardinality, width):
    theirs = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 3, 3, 1], num_classes=10, groups=cardinality, width_per_group=width
    )
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.layer4 = nn.Identity()
    theirs.fc = nn.Linear(1024, 10)
    ours = create_model(f"resnext29_{cardinality}x{width}d", n_classes=10, first_block="cifar10")
    assert_loads_and_agrees(ours, theirs, img_size=16)


def resnext29(cardinality: int, width: int) -> tuple[int, int]:
    """Count parameters and multiply-adds by hand, for 32x32 images and ten classes: stem, three stages of three blocks, head."""
    parameters, macs, before, side = 3 * 64 * 9 + 2 * 64, 3 * 64 * 9 * 32**2, 64, 32
    for stage in range(3):
        inner, after = cardinality * width * 2**stage, 256 * 2**stage
        for block in range(3):
            side_before, side = side, side // 2 if stage > 0 and block == 0 else side
            reduce, transform, expand = before * inner, inner * inner // cardinality * 9, inner * after
            parameters += reduce + transform + expand + 2 * (inner + inner + after)
            macs += reduce * side_before**2 + (transform + expand) * side**2
            if block == 0:
                parameters += before * after + 2 * after
                macs += before * after * side**2
            before = after
    return parameters + before * 10 + 10, macs + before * 10


@pytest.mark.parametrize(("cardinality", "width"), [(32, 4), (2, 64)])
def test_29_layers_have_the_parameters_and_macs_of_the_papers_table(cardinality, width):
    parameters, macs = resnext29(cardinality, width)
    model = create_model(f"resnext29_{cardinality}x{width}d", n_classes=10, first_block="cifar10").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert counter.get_total_flops() == 2 * macs


def test_29_layers_have_the_published_numbers_of_parameters():
    assert round(resnext29(32, 4)[0] / 1e6, 2) == 4.78
    # the paper's table 7
    assert resnext29(8, 64)[0] / 1e6 == pytest.approx(34.4, abs=0.06)
    assert resnext29(16, 64)[0] / 1e6 == pytest.approx(68.1, abs=0.06)


@pytest.mark.parametrize(("cardinality", "width"), [(1, 64), (2, 40), (8, 14), (64, 4)])
def test_the_stages_output_the_same_channels_whatever_the_groups(cardinality, width):
    model = ResNeXt(layers=(1, 1, 1, 1), cardinality=cardinality, width=width).eval()
    assert [info["num_chs"] for info in model.feature_info] == [64, 256, 512, 1024, 2048]
    assert [stage.shape[1] for stage in model.forward_stages(torch.zeros(1, 3, 32, 32))] == [64, 256, 512, 1024, 2048]
    assert model.layer3[0].conv2.weight.shape == (4 * cardinality * width, 4 * width, 3, 3)


def test_the_stride_is_on_the_3x3():
    block = create_model("resnext29_32x4d").layer2[0]
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)


def test_the_cifar_stem_is_a_3x3_that_keeps_the_resolution():
    model = create_model("resnext29_32x4d", first_block="cifar10")
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    stages = model.forward_stages(torch.zeros(1, 3, 32, 32))
    assert [tuple(stage.shape[1:]) for stage in stages] == [(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8)]


def test_convolutions_are_initialized_by_fan_out():
    model = create_model("resnext50_32x4d")
    assert model.layer3[1].conv1.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert model.layer4[1].conv2.weight.std().item() == pytest.approx((2 / (1024 * 9)) ** 0.5, rel=0.02)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="first_block is 'mnist'"):
        create_model("resnext29_32x4d", first_block="mnist")
