import pytest
import timm
import torch
from torch import nn

from models import create_model
from models.preactresnet import PreActBasicBlock, PreActBottleneck
from tests.models.reference import assert_loads_and_agrees, randomize

BLOCKS = {
    PreActBasicBlock: lambda: create_model("preactresnet18").stages[1].blocks[0],
    PreActBottleneck: lambda: create_model("preactresnet50").stages[1].blocks[0],
}


@pytest.mark.parametrize("name", [f"preactresnet{depth}" for depth in (18, 34, 50, 101, 152)])
def test_timm_weights_load_and_give_the_same_logits(name):
    ours = create_model(name)
    assert_loads_and_agrees(ours, timm.create_model(ours.TIMM_NAMES[name]), img_size=48)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_projection_shortcut_is_a_bare_convolution_of_the_activated_input(block):
    changing = BLOCKS[block]()
    assert [type(module) for module in changing.downsample] == [nn.Conv2d]
    last = changing.conv2 if block is PreActBasicBlock else changing.conv3
    nn.init.zeros_(last.weight)  # so that only the shortcut remains
    nn.init.normal_(changing.norm1.bias)
    x = torch.randn(2, changing.norm1.num_features, 6, 6)
    torch.testing.assert_close(changing.eval()(x), changing.downsample(changing.norm1(x).relu()))


def test_an_identity_shortcut_passes_the_sum_unchanged():
    block = create_model("preactresnet18").stages[1].blocks[1].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 128, 6, 6)
    torch.testing.assert_close(block(x), x)


def test_a_last_batchnorm_and_relu_precede_the_pooling():
    model = randomize(create_model("preactresnet18", n_classes=10, first_block="cifar10"), img_size=32)
    images = torch.randn(2, 3, 32, 32)
    sums = model.stages(model.stem(images))
    features = model.forward_features(images)
    torch.testing.assert_close(features, model.norm(sums).relu())
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean(dim=(2, 3)))


def test_the_stem_has_no_batchnorm_and_no_relu():
    model = create_model("preactresnet18").eval()
    assert [type(module) for module in model.stem] == [nn.Conv2d, nn.MaxPool2d]
    assert (model.forward_stages(torch.randn(1, 3, 32, 32))[0] < 0).any()


def test_the_stride_of_a_bottleneck_is_on_its_3x3():
    block = BLOCKS[PreActBottleneck]()
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)


def test_18_layers_for_cifar_have_the_parameters_implied_by_the_widths():
    parameters = 3 * 64 * 9  # the stem, without a BatchNorm
    before = 64
    for channels in (64, 128, 256, 512):
        parameters += 2 * before + before * channels * 9 + 2 * channels + channels * channels * 9
        parameters += before * channels if before != channels else 0  # the projection, without a BatchNorm
        parameters += 2 * (2 * channels + channels * channels * 9)
        before = channels
    parameters += 2 * 512 + 512 * 10 + 10  # the last BatchNorm, the classifier
    model = create_model("preactresnet18", n_classes=10, first_block="cifar10")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert round(parameters / 1e6, 1) == 11.2


def test_the_cifar_stem_keeps_the_resolution():
    stages = create_model("preactresnet18", first_block="cifar10").forward_stages(torch.zeros(1, 3, 32, 32))
    assert [tuple(stage.shape[1:]) for stage in stages] == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_convolutions_are_initialized_by_fan_out_and_the_classifier_by_pytorchs_default():
    model = create_model("preactresnet50")
    weight = model.stages[2].blocks[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert model.head.fc.weight.std().item() == pytest.approx((3 * 2048) ** -0.5, rel=0.02)  # uniform to 2048 ** -0.5
    assert not model.head.fc.bias.any()


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="first_block is 'mnist'"):
        create_model("preactresnet18", first_block="mnist")
