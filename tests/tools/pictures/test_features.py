import pytest
import timm
import torch
from matplotlib.figure import Figure
from torch import nn

from engine.config.errors import ConfigError
from engine.inference.trained import load_trained
from models import create_model
from tools.pictures.activations import as_map, first_filters, layer_maps, stage_maps
from tools.pictures.features import draw_filters, draw_maps

SMALL = ("lenet", "resnet18", "googlenet", "vit")
OF_TIMM = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_the_maps_of_a_run_have_the_shapes_of_feature_info(small_runs, name):
    trained = load_trained(small_runs[name], {})
    images, _ = next(trained.loader("valid").batches())
    maps = stage_maps(trained.model, images[:2])
    info, side = trained.model.feature_info, images.shape[-1]
    assert list(maps) == [stage["module"] for stage in info]
    expected = [(2, stage["num_chs"], *(side // stage["reduction"],) * 2) for stage in info]
    if name == "lenet":  # its convolutions have no padding: 28 -> 14 -> 10 -> 5
        expected = [(2, 6, 14, 14), (2, 16, 5, 5)]
    assert [tuple(of_layer.shape) for of_layer in maps.values()] == expected


@pytest.mark.parametrize("name", OF_TIMM)
@torch.no_grad()
def test_the_maps_of_a_timm_model_have_the_shapes_of_its_feature_info(name):
    model = timm.create_model(name).eval()
    side = model.pretrained_cfg["input_size"][-1]
    maps = stage_maps(model, torch.randn(1, 3, side, side))
    expected = [(1, stage["num_chs"], *(side // stage["reduction"],) * 2) for stage in model.feature_info]
    assert [tuple(of_layer.shape) for of_layer in maps.values()] == expected


@torch.no_grad()
def test_the_map_of_a_layer_does_not_include_later_changes_in_place():
    model = create_model("resnet18", n_classes=10, img_size=32).eval()
    images = torch.randn(1, 3, 32, 32)
    maps = layer_maps(model, images, ["bn1", "layer1.0.conv1", "fc"])
    expected = model.bn1(model.conv1(images))
    assert expected.min() < 0  # the ReLU that follows works in place
    assert torch.equal(maps["bn1"], expected)
    assert torch.equal(maps["layer1.0.conv1"], model.layer1[0].conv1(model.maxpool(expected.relu())))
    assert torch.equal(maps["fc"].flatten()[:10], model(images)[0])


@torch.no_grad()
def test_tokens_and_channels_last_outputs_become_maps():
    tokens = torch.arange(2 + 9).float().view(1, 11, 1)
    assert as_map(tokens)[0, 0].tolist() == [[2, 3, 4], [5, 6, 7], [8, 9, 10]]
    last = torch.randn(2, 7, 7, 96)
    assert torch.equal(as_map(last), last.permute(0, 3, 1, 2))
    first = torch.randn(2, 96, 7, 7)
    assert as_map(first) is first
    assert as_map(torch.zeros(2, 10)).shape == (2, 10, 1, 1)


def test_an_unknown_layer_is_an_error_with_similar_names():
    model = create_model("resnet18", n_classes=10, img_size=32)
    with pytest.raises(ConfigError, match=r"ResNet has no layer 'layer5'; similar names: layer\d, layer\d, layer\d$"):
        layer_maps(model, torch.zeros(1, 3, 32, 32), ["layer5"])
    with pytest.raises(ConfigError, match=r"ResNet has no layer 'qqq'; similar names: conv1, maxpool, bn1"):
        layer_maps(model, torch.zeros(1, 3, 32, 32), ["qqq"])


def test_a_row_shows_the_channels_that_vary_most():
    flat, varied = torch.full((1, 4, 4), 7.0), torch.arange(16.0).view(1, 4, 4)
    maps = {"one": torch.cat([flat, varied, flat, 2 * varied]), "two": torch.arange(7.0).view(7, 1, 1)}
    draw_maps(figure := Figure(), torch.rand(3, 8, 8), maps, 2, "title")
    shown = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    assert list(shown) == ["", "channel 1", "channel 3", "all channels"]
    assert torch.equal(torch.from_numpy(shown["channel 3"].data), 2 * varied[0])
    assert shown["all channels"].filled(-1).tolist() == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert figure.axes[1].get_ylabel() == "one\n4 x 4x4"


@pytest.mark.parametrize(
    ("name", "layer"), [("lenet", "conv1"), ("resnet18", "conv1"), ("googlenet", "conv1.conv"), ("vit_tiny", "patch_embed.proj")]
)
def test_the_first_filters_are_those_of_the_first_convolution(name, layer):
    model = create_model(name, in_channels=3, img_size=32)
    assert layer == model.FIRST_CONV
    found, weights = first_filters(model)
    assert found == layer
    assert torch.equal(weights, model.get_submodule(layer).weight)
    assert first_filters(nn.Linear(3, 3)) is None


def test_a_filter_of_three_channels_is_in_color_and_zero_is_gray():
    weights = torch.zeros(70, 3, 3, 3)
    weights[6:, 0] = torch.linspace(1, 2, 64).view(64, 1, 1)
    draw_filters(figure := Figure(), "conv1", weights, "title")
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == [str(i) for i in range(6, 70)]  # the largest 64
    assert shown[0].images[0].get_array()[0, 0].tolist() == [1, 0.5, 0.5]
