import pytest
import torch
from torch import nn

from engine.run.macs import count
from models import create_model

LAYERS = [  # in the paper's tables 1 and 2: maps in, maps out, kernel, side of the result
    (3, 96, 3, 32),
    (96, 96, 3, 32),
    (96, 96, 3, 16),
    (96, 192, 3, 16),
    (192, 192, 3, 16),
    (192, 192, 3, 8),
    (192, 192, 3, 6),
    (192, 192, 1, 6),
    (192, 10, 1, 6),
]


def small():
    torch.manual_seed(0)
    return create_model("allconvnet", n_classes=10, img_size=32)


def test_parameters_and_macs_match_the_papers_table():
    counted = count(small(), in_channels=3, img_size=32)
    assert counted.params == sum(c_in * c_out * kernel**2 + c_out for c_in, c_out, kernel, _ in LAYERS)
    assert counted.macs == sum(c_in * c_out * kernel**2 * side**2 for c_in, c_out, kernel, side in LAYERS)


def test_the_seventh_convolution_is_not_padded_so_that_6x6_positions_are_averaged():
    model = small()
    assert [model.get_submodule(f"conv{i}").padding for i in range(1, 8)] == [(1, 1)] * 6 + [(0, 0)]
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 192, 6, 6)


def test_dropout_is_0_2_on_the_image_and_0_5_after_each_strided_convolution():
    model, seen = small().train(), {}
    names = [f"conv{i}" for i in range(1, 10)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)  # so that only dropout yields zeros
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model(torch.ones(8, 3, 32, 32))
    expected = {"conv1": 0.2, "conv4": 0.5, "conv7": 0.5}
    for name in names:
        zero = (seen[name] == 0).float()
        assert zero.mean().item() == pytest.approx(expected.get(name, 0.0), abs=0.02), name
        if name in expected:
            assert zero.mean(dim=(2, 3)).max() < 0.75, "whole maps were dropped, not single values"


def test_class_maps_pass_through_a_relu_before_they_are_averaged():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    maps = model.conv9(model.forward_features(x))
    assert (maps < 0).any()
    torch.testing.assert_close(model(x), maps.clamp(min=0).mean(dim=(2, 3)))


def test_there_is_no_batch_normalization():
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small().modules())


def test_initial_weights_are_uniform_with_the_variance_of_their_fan_in():
    for layer in small().modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.06)
            assert layer.weight.abs().max().item() <= (3 / fan_in) ** 0.5
            assert not layer.bias.any()


def test_the_smallest_image_works_and_a_smaller_one_is_refused():
    assert create_model("allconvnet", n_classes=10, img_size=9)(torch.zeros(1, 3, 9, 9)).shape == (1, 10)
    with pytest.raises(ValueError, match="9x9 and more, its seventh layer isn't padded; img_size is 8"):
        create_model("allconvnet", img_size=8)


@torch.no_grad()
def test_without_the_last_relu_the_class_maps_are_averaged_unchanged():
    model = create_model("allconvnet", n_classes=10, in_channels=3, img_size=32, last_relu=False).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = model.conv9(model.forward_features(images))
    torch.testing.assert_close(model(images), maps.mean((2, 3)))
    assert model(images).min() < 0
