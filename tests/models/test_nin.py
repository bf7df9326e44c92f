import pytest
import torch
from torch import nn

from engine.run.macs import count
from models import create_model

LAYERS = [  # in the authors' cifar-10_def: maps in, maps out, kernel, side of the result
    (3, 192, 5, 32),
    (192, 160, 1, 32),
    (160, 96, 1, 32),
    (96, 192, 5, 16),
    (192, 192, 1, 16),
    (192, 192, 1, 16),
    (192, 192, 3, 8),
    (192, 192, 1, 8),
    (192, 10, 1, 8),
]


def small():
    torch.manual_seed(0)
    return create_model("nin", n_classes=10, img_size=32)


def inputs_of(model: nn.Module, names: list[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model(images)
    return seen


def test_parameters_and_macs_match_the_authors_definition():
    counted = count(small(), in_channels=3, img_size=32)
    assert counted.params == sum(c_in * c_out * kernel**2 + c_out for c_in, c_out, kernel, _ in LAYERS)
    assert counted.macs == sum(c_in * c_out * kernel**2 * side**2 for c_in, c_out, kernel, side in LAYERS)


def test_both_poolings_round_up_and_are_a_maximum_and_an_average():
    model = small().eval()
    seen = inputs_of(model, ["conv2", "conv3"], images := torch.randn(2, 3, 32, 32))
    first, second, _ = model.forward_stages(images)
    assert seen["conv2"].shape[-2:] == (16, 16)
    assert seen["conv3"].shape[-2:] == (8, 8)
    # A window in the middle, and the last one, which has only two rows and two columns because of the rounding.
    torch.testing.assert_close(seen["conv2"][:, :, 3, 5], first[:, :, 6:9, 10:13].amax(dim=(2, 3)))
    torch.testing.assert_close(seen["conv2"][:, :, 15, 15], first[:, :, 30:, 30:].amax(dim=(2, 3)))
    torch.testing.assert_close(seen["conv3"][:, :, 3, 5], second[:, :, 6:9, 10:13].mean(dim=(2, 3)))
    torch.testing.assert_close(seen["conv3"][:, :, 7, 7], second[:, :, 14:, 14:].mean(dim=(2, 3)))


def test_half_of_the_values_are_dropped_after_each_pooling_and_nowhere_else():
    model = small().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)  # so that only dropout yields zeros
    names = ["conv1", "cccp1", "cccp2", "conv2", "cccp3", "cccp4", "conv3", "cccp5", "cccp6"]
    for name, x in inputs_of(model, names, torch.ones(4, 3, 32, 32)).items():
        dropped = (x == 0).float().mean().item()
        assert dropped == pytest.approx(0.5 if name in ("conv2", "conv3") else 0.0, abs=0.02), name


def test_class_maps_pass_through_a_relu_before_they_are_averaged():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    maps = model.cccp6(model.forward_features(x))
    assert (maps < 0).any()
    torch.testing.assert_close(model(x), maps.clamp(min=0).mean(dim=(2, 3)))


def test_there_is_no_batch_normalization():
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small().modules())


def test_initial_weights_have_a_std_of_0_05():
    for layer in small().modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.05, rel=0.06)
            assert not layer.bias.any()


def test_the_smallest_image_works_and_a_smaller_one_is_refused():
    assert create_model("nin", n_classes=10, img_size=4)(torch.zeros(1, 3, 4, 4)).shape == (1, 10)
    with pytest.raises(ValueError, match="4x4 and more; img_size is 3"):
        create_model("nin", img_size=3)
