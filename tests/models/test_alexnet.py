import pytest
import torch
import torchvision
from torch import nn

from engine.run.macs import count
from models import create_model
from tests.models.reference import assert_loads_and_agrees

CONVOLUTIONS_OF_2012 = [  # the paper's section 3.5: maps read by one filter, filters, kernel, side of the result
    (3, 96, 11, 55),
    (48, 256, 5, 27),
    (256, 384, 3, 13),
    (192, 384, 3, 13),
    (192, 256, 3, 13),
]
LINEAR_OF_2012 = [(256 * 6 * 6, 4096), (4096, 4096), (4096, 1000)]


@pytest.fixture(scope="module")
def two_towers():
    torch.manual_seed(0)
    return create_model("alexnet", two_towers=True)


def test_torchvision_weights_load_and_give_the_same_logits():
    assert_loads_and_agrees(create_model("alexnet"), torchvision.models.alexnet(), img_size=96)


def test_two_towers_have_the_parameters_and_macs_of_the_paper(two_towers):
    params = sum(read * filters * kernel**2 + filters for read, filters, kernel, _ in CONVOLUTIONS_OF_2012)
    params += sum(inputs * outputs + outputs for inputs, outputs in LINEAR_OF_2012)
    macs = sum(read * filters * kernel**2 * side**2 for read, filters, kernel, side in CONVOLUTIONS_OF_2012)
    macs += sum(inputs * outputs for inputs, outputs in LINEAR_OF_2012)
    macs += 256 * 6 * 6  # the counter counts the averaging to 6x6 as one operation per value
    counted = count(two_towers, in_channels=3, img_size=224)
    assert params == 60_965_224
    assert (counted.params, counted.macs) == (params, macs)


def test_the_second_fourth_and_fifth_convolution_of_two_towers_read_half_of_the_maps(two_towers):
    assert [layer.groups for layer in two_towers.features if isinstance(layer, nn.Conv2d)] == [1, 2, 1, 2, 2]


def test_the_normalization_applies_alpha_to_the_sum_with_k_2(two_towers):
    norm = two_towers.features[2]
    maps = 100 * torch.rand(2, 8, 3, 3, dtype=torch.float64)
    sums = torch.stack([maps[:, max(0, i - 2) : i + 3].square().sum(dim=1) for i in range(8)], dim=1)
    torch.testing.assert_close(norm(maps), maps / (2 + 1e-4 * sums) ** 0.75)
    torch.testing.assert_close(norm(maps), nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)(maps))


def test_the_normalization_is_between_relu_and_pooling(two_towers):
    kinds = [type(layer).__name__ for layer in two_towers.features]
    assert kinds[:8] == ["Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d"] * 2
    assert "LocalResponseNorm" not in kinds[8:]


def test_two_towers_drop_outputs_of_hidden_layers_and_one_tower_their_inputs(two_towers):
    def dropout_indices(model):
        return [i for i, layer in enumerate(model.classifier) if isinstance(layer, nn.Dropout)]

    assert dropout_indices(two_towers) == [2, 5]
    assert dropout_indices(create_model("alexnet")) == [0, 3]


def test_initial_weights_of_two_towers_are_those_of_the_paper(two_towers):
    layers = [module for module in two_towers.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert abs(layer.weight.mean().item()) < 3e-4
    assert [layer.bias.unique().tolist() for layer in layers] == [[0], [1], [0], [1], [1], [1], [1], [0]]


def test_one_tower_keeps_the_initialization_of_pytorch():
    torch.manual_seed(0)
    weight = create_model("alexnet").features[3].weight
    bound = (64 * 25) ** -0.5
    assert weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("two_towers", [False, True])
def test_the_cifar_stem_keeps_the_resolution_until_the_second_pooling(two_towers):
    model = create_model("alexnet", n_classes=10, img_size=32, first_block="cifar10", two_towers=two_towers)
    stages = model.forward_stages(torch.zeros(1, 3, 32, 32))
    assert [stage.shape[2] for stage in stages] == [32, 32, 15, 7]
    assert [stage.shape[1] for stage in stages] == [info["num_chs"] for info in model.feature_info]


@pytest.mark.parametrize(("first_block", "smallest"), [("imagenet", 63), ("cifar10", 7)])
def test_the_smallest_image_works_and_a_smaller_one_is_refused(first_block, smallest):
    model = create_model("alexnet", img_size=smallest, first_block=first_block)
    assert model(torch.zeros(1, 3, smallest, smallest)).shape == (1, 1000)
    with pytest.raises(ValueError, match=f"images of {smallest}x{smallest} and more; img_size is {smallest - 1}"):
        create_model("alexnet", img_size=smallest - 1, first_block=first_block)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="first_block is 'mnist'"):
        create_model("alexnet", first_block="mnist")
