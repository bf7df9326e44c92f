import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import create_model, list_models
from models.shufflenet import channel_shuffle

# Table 1: channels of stage 2 by the number of groups; the next two stages have twice and four times as many.
STAGE2 = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
SCALES = {"0_25x": 0.25, "0_5x": 0.5, "1_0x": 1.0, "1_5x": 1.5, "2_0x": 2.0}
STEM = {"0_25x": 12, "0_5x": 12, "1_0x": 24, "1_5x": 24, "2_0x": 48}
VARIANTS = [(scale, groups) for scale in SCALES for groups in STAGE2]


def layers(scale: str, groups: int, img_size: int, small: bool = False) -> list[tuple[int, int, int]]:
    """Return (weights, filters, side of the output) of each convolution, from table 1 by hand.

    If the groups don't divide the channels, the stem has the next multiple of the groups, a bottleneck the nearest.
    """
    stem = 16 if groups == 8 and STEM[scale] == 12 else STEM[scale]
    side = img_size if small else img_size // 2
    convolutions = [(3 * 3 * 3 * stem, stem, side)]
    side, channels = side if small else side // 2, stem
    for stage, units in enumerate((4, 8, 4)):
        out_channels = int(STAGE2[groups] * SCALES[scale]) * 2**stage
        bottleneck = groups * math.floor(out_channels / 4 / groups + 0.5)
        for unit in range(units):
            in_side, side = side, side // 2 if unit == 0 else side
            computed = out_channels - channels if unit == 0 else out_channels
            convolutions += [
                (channels * bottleneck // (1 if stage == unit == 0 else groups), bottleneck, in_side),
                (3 * 3 * bottleneck, bottleneck, side),
                (bottleneck * computed // groups, computed, side),
            ]
            channels = out_channels
    return convolutions


def parameters_and_macs(scale: str, groups: int, n_classes: int, img_size: int, small: bool = False) -> tuple[int, int]:
    features = int(STAGE2[groups] * SCALES[scale]) * 4
    convolutions = layers(scale, groups, img_size, small)
    parameters = sum(weights + 2 * filters for weights, filters, _ in convolutions) + (features + 1) * n_classes  # 2: BatchNorm
    return parameters, sum(weights * side**2 for weights, _, side in convolutions) + features * n_classes


def counted(model: nn.Module, img_size: int) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, img_size, img_size, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def test_all_scales_and_groups_of_the_paper_exist():
    assert [name for name in list_models() if name.startswith("shufflenet")] == sorted(
        f"shufflenet_{scale}_g{groups}" for scale, groups in VARIANTS
    )


@pytest.mark.parametrize(("scale", "groups"), VARIANTS)
def test_parameters_and_macs_follow_from_the_papers_table(scale, groups):
    name = f"shufflenet_{scale}_g{groups}"
    with torch.device("meta"):
        model, small = create_model(name), create_model(name, n_classes=10, first_block="cifar10")
    assert counted(model, 224) == parameters_and_macs(scale, groups, n_classes=1000, img_size=224)
    assert counted(small, 32) == parameters_and_macs(scale, groups, n_classes=10, img_size=32, small=True)


@pytest.mark.parametrize(("groups", "complexity"), [(1, 143), (2, 140), (3, 137), (4, 133), (8, 137)])
def test_macs_of_the_convolutions_match_table_1(groups, complexity):
    with torch.device("meta"):
        model = create_model(f"shufflenet_1_0x_g{groups}")
    macs = counted(model, 224)[1] - model.fc.weight.numel()
    assert round(macs / 1e6) == complexity


@pytest.mark.parametrize(
    ("name", "million_macs", "million_parameters"),
    [
        ("shufflenet_0_25x_g3", 13, None),  # the paper's tables 2 and 5
        ("shufflenet_0_5x_g3", 38, 0.7),  # and the table of the authors' code
        ("shufflenet_0_5x_g8", 40, 1.0),
        ("shufflenet_1_0x_g3", 137, 1.9),
        ("shufflenet_1_0x_g8", 138, 2.4),
        ("shufflenet_1_5x_g3", 292, 3.4),
        ("shufflenet_1_5x_g8", 290, 4.3),
        ("shufflenet_2_0x_g3", 524, 5.4),
        ("shufflenet_2_0x_g8", 522, 6.5),
    ],
)
def test_macs_and_parameters_of_scales_match_the_authors(name, million_macs, million_parameters):
    with torch.device("meta"):
        parameters, macs = counted(create_model(name), 224)
    assert round(macs / 1e6) == million_macs
    if million_parameters is not None:
        assert (parameters - 1000) / 1e6 == pytest.approx(million_parameters, abs=0.05)  # their classifier has no bias


def test_with_ten_classes_there_are_0_91_million_parameters():
    assert sum(p.numel() for p in create_model("shufflenet_1_0x_g8", n_classes=10).parameters()) == 913_138


@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_only_the_first_1x1_of_stage_2_is_not_grouped(groups):
    model = create_model(f"shufflenet_1_0x_g{groups}")
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    pointwise = {name: module.groups for name, module in convolutions.items() if module.kernel_size == (1, 1)}
    assert len(pointwise) == 32
    assert pointwise.pop("stage2.0.conv1") == 1
    assert set(pointwise.values()) == {groups}


def test_no_relu_follows_the_depthwise_convolution():
    unit = create_model("shufflenet_0_25x_g3").stage3[1]
    seen = []
    unit.conv3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    unit(torch.randn(2, 120, 8, 8))
    assert (seen[0] < 0).float().mean() > 0.3


def test_the_shuffle_distributes_the_channels_of_each_group_over_all_groups():
    x = torch.arange(12.0).view(1, 12, 1, 1)
    assert channel_shuffle(x, 3).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_the_channels_are_shuffled_between_the_first_1x1_and_the_depthwise_convolution():
    unit = create_model("shufflenet_0_25x_g3").stage3[1].eval()
    seen = []
    unit.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 120, 4, 4)
    unit(x)
    torch.testing.assert_close(seen[0], channel_shuffle(F.relu(unit.bn1(unit.conv1(x))), 3))


def test_a_unit_of_stride_2_starts_with_its_averaged_input():
    unit = create_model("shufflenet_0_25x_g3").stage3[0]
    x = torch.rand(2, 60, 8, 8)
    out = unit(x)
    assert out.shape == (2, 120, 4, 4)
    torch.testing.assert_close(out[:, :60], F.avg_pool2d(x, 3, stride=2, padding=1))


def test_feature_maps_are_at_strides_2_to_32():
    model = create_model("shufflenet_1_0x_g8")
    stages = model.forward_stages(torch.zeros(1, 3, 64, 64))
    shapes = [(24, 32, 32), (24, 16, 16), (384, 8, 8), (768, 4, 4), (1536, 2, 2)]
    assert [tuple(stage.shape[1:]) for stage in stages] == shapes
    assert [(info["num_chs"], 64 // info["reduction"]) for info in model.feature_info] == [shape[:2] for shape in shapes]


def test_the_cifar_stem_keeps_the_resolution():
    model = create_model("shufflenet_1_0x_g3", first_block="cifar10")
    stages = model.forward_stages(torch.zeros(1, 3, 32, 32))
    assert [stage.shape[-1] for stage in stages] == [32, 32, 16, 8, 4]
    assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4, 8]


def test_initial_weights_are_those_of_the_authors_code():
    torch.manual_seed(0)
    model = create_model("shufflenet_1_0x_g3")
    assert model.conv1.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.fc.bias.any()
    assert model.stage2[0].conv1.weight.std().item() == pytest.approx(1 / 24, rel=0.1)
    unit = model.stage4[1]  # 960 channels and 240 in the bottleneck, in three groups
    assert unit.conv1.weight.std().item() == pytest.approx(1 / 320, rel=0.02)
    assert unit.conv2.weight.std().item() == pytest.approx(1, rel=0.05)
    assert unit.conv3.weight.std().item() == pytest.approx(1 / 80, rel=0.02)
    assert (unit.bn1.bias == 0.0001).all()


@pytest.mark.parametrize("argument", [{"first_block": "mnist"}, {"groups": 5}, {"width": 0.75}])
def test_an_invalid_argument_is_refused(argument):
    (name, value), *_ = argument.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it can be"):
        create_model("shufflenet_1_0x_g8", **argument)
