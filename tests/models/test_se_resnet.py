from functools import partial

import pytest
import timm
import torch
from timm.layers import SEModule
from timm.models.resnet import BasicBlock
from timm.models.resnet import ResNet as TimmResNet
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from tests.models.reference import assert_loads_and_agrees, assert_same_output, randomize

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@pytest.mark.parametrize("name", ["se_resnet50", "se_resnet101", "se_resnet152"])
def test_timm_weights_load_and_give_the_same_logits(name):
    ours = create_model(name)
    assert_loads_and_agrees(ours, timm.create_model(ours.TIMM_NAMES[name]), img_size=48)


@pytest.mark.parametrize("depth", [18, 34])
def test_timm_without_its_rounding_to_8_gives_the_same_logits(depth):
    theirs = TimmResNet(BasicBlock, DEPTHS[depth], block_args={"attn_layer": partial(SEModule, rd_divisor=1)})
    assert_loads_and_agrees(create_model(f"se_resnet{depth}"), theirs, img_size=48)


@pytest.mark.parametrize("name", [f"se_resnet{depth}" for depth in DEPTHS])
def test_legacy_weights_of_timm_load_under_our_names_and_give_the_same_logits(name):
    ours = create_model(name, legacy=True)
    assert timm.is_model_pretrained(ours.TIMM_NAMES[name])
    theirs = randomize(timm.create_model(ours.TIMM_NAMES[name]), img_size=48)
    ours.load_state_dict(ours.convert_pretrained(theirs.state_dict()), strict=True)
    assert_same_output(ours, theirs, img_size=48)


def test_legacy_weights_are_refused_without_legacy():
    with pytest.raises(ValueError, match="legacy=True"):
        create_model("se_resnet18").convert_pretrained(timm.create_model("legacy_seresnet18").state_dict())


@pytest.mark.parametrize("legacy", [False, True])
def test_own_weights_are_not_converted(legacy):
    model = create_model("se_resnet18", legacy=legacy)
    assert model.convert_pretrained(model.state_dict()).keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["se_resnet18", "se_resnet50"])
def test_the_excitation_has_biases_and_a_sixteenth_of_the_output_channels(name):
    model = create_model(name)
    for info in model.feature_info[1:]:
        channels = info["num_chs"]
        for block in model.get_submodule(info["module"]):
            assert block.se.fc1.weight.shape == (channels // 16, channels, 1, 1)
            assert block.se.fc2.weight.shape == (channels, channels // 16, 1, 1)
            assert block.se.fc1.bias.shape == (channels // 16,)
            assert block.se.fc2.bias.shape == (channels,)


@pytest.mark.parametrize(("name", "last"), [("se_resnet18", "bn2"), ("se_resnet50", "bn3")])
def test_the_scaling_is_between_the_last_batchnorm_and_the_addition(name, last):
    block = randomize(create_model(name, n_classes=10), img_size=48).layer1[1]
    seen = {}
    block.get_submodule(last).register_forward_hook(lambda _, inputs, output: seen.update(normalized=output.clone()))
    block.se.register_forward_hook(lambda _, inputs, output: seen.update(entered=inputs[0].clone(), scaled=output.clone()))
    x = torch.randn(2, block.se.fc2.out_channels, 8, 8)
    with torch.no_grad():
        y = block(x)
    assert torch.equal(seen["entered"], seen["normalized"])
    torch.testing.assert_close(y, (seen["scaled"] + x).relu())


def test_the_scale_is_the_sigmoid_of_two_layers_over_the_channel_means():
    excitation = create_model("se_resnet18").layer1[0].se
    x = torch.randn(2, 64, 5, 5)
    hidden = (x.mean(dim=(2, 3)) @ excitation.fc1.weight[:, :, 0, 0].T + excitation.fc1.bias).relu()
    scale = (hidden @ excitation.fc2.weight[:, :, 0, 0].T + excitation.fc2.bias).sigmoid()
    torch.testing.assert_close(excitation(x), x * scale[:, :, None, None])


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_excitations_add_the_parameters_and_macs_implied_by_the_reduction(depth):
    expansion = 1 if depth < 50 else 4
    parameters = macs = 0
    for channels, n_blocks in zip((64, 128, 256, 512), DEPTHS[depth], strict=True):
        wide = channels * expansion
        narrow = wide // 16
        parameters += n_blocks * (2 * wide * narrow + wide + narrow)
        macs += n_blocks * 2 * wide * narrow
    counted = [_count(f"{family}{depth}") for family in ("resnet", "se_resnet")]
    assert counted[1][0] - counted[0][0] == parameters
    assert counted[1][1] - counted[0][1] == macs


def _count(name: str) -> tuple[int, int]:
    model = create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def test_18_layers_for_cifar_have_the_published_number_of_parameters():
    model = create_model("se_resnet18", n_classes=10, first_block="cifar10")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 11.3


def test_the_stride_of_a_bottleneck_is_on_its_3x3_and_on_the_first_1x1_in_legacy():
    blocks = [create_model("se_resnet50", legacy=legacy).layer2[0] for legacy in (False, True)]
    assert [(block.conv1.stride[0], block.conv2.stride[0]) for block in blocks] == [(1, 2), (2, 1)]


def test_the_cifar_stem_keeps_the_resolution():
    stages = create_model("se_resnet18", first_block="cifar10").forward_stages(torch.zeros(1, 3, 32, 32))
    assert [tuple(stage.shape[1:]) for stage in stages] == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_convolutions_are_initialized_by_fan_out():
    model = create_model("se_resnet50")
    assert model.layer3[1].conv2.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert model.layer4[1].se.fc1.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.02)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="first_block is 'mnist'"):
        create_model("se_resnet18", first_block="mnist")
