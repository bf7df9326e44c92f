import pytest
import timm
import torch
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from tests.models.reference import assert_loads_and_agrees

WIDTHS = {"mobilenet": 1.0, "mobilenet_0_75x": 0.75, "mobilenet_0_5x": 0.5, "mobilenet_0_25x": 0.25}

# Table 1: channels of each depthwise separable block, and its stride. The last is printed as 2 although the map stays 7x7.
TABLE1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))


def parameters_and_macs(width: float, n_classes: int, img_size: int, stem_stride: int) -> tuple[int, int]:
    """Count by hand from table 1: weights of each layer, times the positions of its output; two per BatchNorm channel."""
    channels, side = int(32 * width), img_size // stem_stride
    weights = 3 * 3 * 3 * channels
    parameters, macs = weights + 2 * channels, weights * side**2
    for out_channels, stride in TABLE1:
        out_channels, side = int(out_channels * width), side // stride
        weights = 3 * 3 * channels + channels * out_channels
        parameters += weights + 2 * channels + 2 * out_channels
        macs += weights * side**2
        channels = out_channels
    return parameters + channels * n_classes + n_classes, macs + channels * n_classes


def macs_of(model: nn.Module, img_size: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, img_size, img_size, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_timm_weights_load_and_give_the_same_logits(name, width):
    assert_loads_and_agrees(create_model(name), _gen_mobilenet_v1("mobilenetv1_100", width), img_size=64)


def test_the_published_weights_are_timms_mobilenetv1_100():
    assert timm.is_model_pretrained(create_model("mobilenet").TIMM_NAMES["mobilenet"])


def test_other_widths_are_rounded_as_in_timm():
    assert_loads_and_agrees(create_model("mobilenet", width=1.25), timm.create_model("mobilenetv1_125"), img_size=32)


@pytest.mark.parametrize(
    ("name", "million_macs", "million_parameters"),
    [("mobilenet", 569, 4.2), ("mobilenet_0_75x", 325, 2.6), ("mobilenet_0_5x", 149, 1.3), ("mobilenet_0_25x", 41, 0.5)],
)
def test_parameters_and_macs_match_the_papers_tables(name, million_macs, million_parameters):
    with torch.device("meta"):
        model = create_model(name)
    found = sum(p.numel() for p in model.parameters()), macs_of(model, 224)
    assert found == parameters_and_macs(WIDTHS[name], n_classes=1000, img_size=224, stem_stride=2)
    assert round(found[0] / 1e6, 1) == million_parameters  # table 6
    assert round(found[1] / 1e6) == million_macs


@pytest.mark.parametrize("name", WIDTHS)
def test_the_cifar_network_has_the_same_parameters_and_a_stem_of_stride_1(name):
    with torch.device("meta"):
        model = create_model(name, n_classes=10, first_block="cifar10")
    found = sum(p.numel() for p in model.parameters()), macs_of(model, 32)
    assert found == parameters_and_macs(WIDTHS[name], n_classes=10, img_size=32, stem_stride=1)


def test_with_ten_classes_there_are_3_22_million_parameters():
    assert sum(p.numel() for p in create_model("mobilenet", n_classes=10).parameters()) == 3_217_226


def test_no_pooling_follows_the_stem():
    stages = create_model("mobilenet").forward_stages(torch.zeros(1, 3, 64, 64))
    assert [tuple(stage.shape[1:]) for stage in stages] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (1024, 2, 2)]


def test_the_cifar_stem_keeps_the_resolution():
    model = create_model("mobilenet", first_block="cifar10")
    stages = model.forward_stages(torch.zeros(1, 3, 32, 32))
    assert [stage.shape[-1] for stage in stages] == [32, 16, 8, 4, 2]
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 8, 16]


def test_the_last_depthwise_convolution_has_stride_1():
    last = create_model("mobilenet_0_25x").blocks[-1][-1].conv_dw
    assert (last.in_channels, last.groups, last.stride) == (256, 256, (1, 1))


def test_both_halves_of_a_block_end_in_the_selected_activation():
    for activation, cut in (("relu6", True), ("relu", False)):
        block = create_model("mobilenet_0_25x", activation=activation).blocks[1][0].train()
        block.bn1.weight.data.fill_(100)
        block.bn2.weight.data.fill_(100)
        between = []
        block.conv_pw.register_forward_pre_hook(lambda module, inputs, between=between: between.append(inputs[0]))
        out = block(torch.randn(4, 16, 8, 8))
        for x in (*between, out):
            assert x.min() == 0
            assert (x.max() == 6) == cut


def test_initial_weights_are_those_of_the_authors_code():
    torch.manual_seed(0)
    for name, parameter in create_model("mobilenet").named_parameters():
        if parameter.ndim >= 2:  # a normal distribution truncated at two std has 0.8796 of its std
            assert parameter.std().item() == pytest.approx(0.0792, rel=0.1), name
            assert parameter.abs().max() <= 0.18, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("argument", [{"first_block": "mnist"}, {"activation": "gelu"}, {"width": 0}])
def test_an_invalid_argument_is_refused(argument):
    (name, value), *_ = argument.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        create_model("mobilenet", **argument)
