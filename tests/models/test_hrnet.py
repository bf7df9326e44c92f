import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from models import create_model
from models.hrnet import HighResolutionModule
from tests.models.reference import assert_loads_and_agrees, randomize


@pytest.mark.parametrize("name", ["hrnet_w18_small", "hrnet_w18", "hrnet_w32", "hrnet_w48"])
def test_timms_weights_load_and_give_the_same_logits(name):
    assert_loads_and_agrees(create_model(name), timm.create_model(name), img_size=64)


@pytest.mark.parametrize(
    ("name", "millions"), [("hrnet_w18_small", 13.2), ("hrnet_w18", 21.3), ("hrnet_w32", 41.2), ("hrnet_w48", 77.5)]
)
def test_the_number_of_parameters_matches_the_authors(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_feature_maps_are_the_four_branches_before_the_head():
    model = create_model("hrnet_w18", features_only=True)
    maps = model(torch.zeros(1, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 32, 32), (18, 16, 16), (36, 8, 8), (72, 4, 4), (144, 2, 2)]
    assert model.feature_info.channels() == [64, 18, 36, 72, 144]
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    theirs = timm.create_model("hrnet_w18", features_only=True, feature_location="")
    assert model.feature_info.channels() == theirs.feature_info.channels()


def test_feature_info_names_the_source_modules_of_the_maps():
    model = create_model("hrnet_w18_small").eval()
    seen = {}
    for entry in model.feature_info:
        name = entry["module"]
        model.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    stages = model.forward_stages(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(seen[entry["module"]], stage) for entry, stage in zip(model.feature_info, stages, strict=True))


def test_maps_are_enlarged_by_repetition_and_relu_follows_the_sum():
    module = HighResolutionModule((3, 6, 12), n_blocks=1).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    maps = [torch.randn(2, 3 * 2**i, 8 // 2**i, 8 // 2**i) for i in range(3)]
    branches = [branch(x) for branch, x in zip(module.branches, maps, strict=True)]

    def received(source: int, target: int) -> torch.Tensor:
        x = branches[source]
        for layer in () if source == target else module.fuse_layers[target][source]:
            x = layer(x)
        factor = 2 ** max(source - target, 0)
        return x.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)

    for target, fused in enumerate(module(maps)):
        total = sum(received(source, target) for source in range(3))
        assert (total < 0).any()  # so that the ReLU has an effect
        torch.testing.assert_close(fused, F.relu(total))


def test_only_the_last_convolution_of_a_reduction_changes_the_channels_and_has_no_relu():
    reduction = create_model("hrnet_w18_small").stage4[0].fuse_layers[3][0]
    assert [[type(layer) for layer in step] for step in reduction] == [
        [nn.Conv2d, nn.BatchNorm2d, nn.ReLU],
        [nn.Conv2d, nn.BatchNorm2d, nn.ReLU],
        [nn.Conv2d, nn.BatchNorm2d],
    ]
    assert [(step[0].in_channels, step[0].out_channels, step[0].stride) for step in reduction] == [
        (16, 16, (2, 2)),
        (16, 16, (2, 2)),
        (16, 128, (2, 2)),
    ]


def test_a_new_branch_starts_from_the_lowest_resolution_alone():
    model = create_model("hrnet_w18_small")
    assert model.transition3[3][0][0].in_channels == 64  # the channels of the third branch, not of all
    assert all(isinstance(model.transition3[i], nn.Identity) for i in range(3))


def test_the_cifar_stem_keeps_the_resolution():
    stages = create_model("hrnet_w18_small", first_block="cifar10").forward_stages(torch.zeros(1, 3, 32, 32))
    assert [x.shape[-1] for x in stages] == [32, 32, 16, 8, 4]


@pytest.mark.parametrize("img_size", [28, 33, 50])
def test_image_sizes_that_are_not_multiples_of_32_work(img_size):
    model = randomize(create_model("hrnet_w18_small", img_size=img_size, n_classes=10), img_size=64)
    stages = model.forward_stages(torch.randn(2, 3, img_size, img_size))
    assert [x.shape[-1] for x in stages] == [-(-img_size // 2**i) for i in range(1, 6)]
    assert model(torch.randn(2, 3, img_size, img_size)).isfinite().all()


def test_convolutions_are_initialized_by_fan_out():
    model = create_model("hrnet_w18")
    for layer in (model.layer1[1].conv2, model.stage4[2].branches[3][3].conv2, model.downsamp_modules[2][0]):
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="first_block is 'mnist'; it can be imagenet or cifar10"):
        create_model("hrnet_w18_small", first_block="mnist")
