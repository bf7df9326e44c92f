import pytest
import torch
import torchvision
from torch import nn

from models import create_model
from tests.models.reference import assert_loads_and_agrees, assert_same_output, randomize

NAMES = ["vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]


def uninitialized(build, *args, **kwargs):
    """Build a model without drawing its weights, which are set later: 124 million random numbers take seconds."""
    with torch.device("meta"):
        model = build(*args, **kwargs)
    return model.to_empty(device="cpu")


def narrowed(model):
    """Replace the hidden layers by narrow ones of 64 units, to save time; the test above has VGG-16 BN at full width."""
    for i, shape in ((0, (512 * 7 * 7, 64)), (3, (64, 64)), (6, (64, 1000))):
        model.classifier[i] = nn.Linear(*shape)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_match_torchvision(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), torchvision.models.get_model(name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.slow
def test_torchvision_weights_of_the_whole_network_load_and_give_the_same_logits():
    theirs = uninitialized(torchvision.models.vgg16_bn)
    assert_loads_and_agrees(uninitialized(create_model, "vgg16_bn"), theirs, img_size=64)


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_weights_load_and_give_the_same_logits(name):
    theirs = randomize(narrowed(uninitialized(torchvision.models.get_model, name)), img_size=32)
    if not name.endswith("_bn"):  # without BatchNorm, activations would vanish over 19 layers of ReLU
        with torch.no_grad():
            for layer in theirs.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.weight *= 2**0.5
    ours = narrowed(uninitialized(create_model, name))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_output(ours, theirs, img_size=32)


@pytest.mark.parametrize(("img_size", "classifier"), [(224, "classifier.6"), (223, "classifier.1"), (32, "classifier.1")])
def test_large_images_get_the_three_layer_head_and_small_ones_a_linear_layer(img_size, classifier):
    model = uninitialized(create_model, "vgg11", n_classes=10, img_size=img_size)
    shapes = [tuple(layer.weight.shape) for layer in model.classifier if isinstance(layer, nn.Linear)]
    paper = [(4096, 512 * 7 * 7), (4096, 4096), (10, 4096)]
    assert shapes == (paper if img_size == 224 else [(10, 512)])
    assert classifier in model.CLASSIFIERS


@pytest.mark.parametrize(("img_size", "head", "features"), [(32, "paper", 4096), (224, "linear", 512)])
def test_either_head_can_be_selected_at_any_size(img_size, head, features):
    model = uninitialized(create_model, "vgg11", n_classes=10, img_size=img_size, head=head)
    assert model.num_features == features
    assert model.forward_head(torch.zeros(2, 512, 1, 1), pre_logits=True).shape == (2, features)


@pytest.mark.parametrize(("name", "params"), [("vgg11", 9_225_610), ("vgg19_bn", 20_040_522)])
def test_networks_for_small_images_have_the_known_number_of_parameters(name, params):
    model = create_model(name, n_classes=10, img_size=32)
    assert sum(parameter.numel() for parameter in model.parameters()) == params


def test_published_weights_load_into_the_convolutions_below_a_linear_head(tmp_path):
    theirs = create_model("vgg11", img_size=32).state_dict()
    features = {key: value for key, value in theirs.items() if key.startswith("features.")}
    head = {f"classifier.{i}.{kind}": torch.zeros(2) for i in (0, 3, 6) for kind in ("weight", "bias")}
    torch.save({**features, **head}, tmp_path / "vgg11.pth")
    model = create_model("vgg11", n_classes=10, img_size=32, pretrained=tmp_path / "vgg11.pth")
    torch.testing.assert_close(model.features.state_dict(), {k.removeprefix("features."): v for k, v in features.items()})
    assert model.classifier[1].weight.std() > 0


def test_initial_weights_match_torchvision():
    torch.manual_seed(0)
    model = create_model("vgg11_bn", n_classes=1000, img_size=32)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert convolutions[-1].weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    assert convolutions[1].weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert model.classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert all(not layer.bias.any() for layer in (*convolutions, model.classifier[1]))


@pytest.mark.parametrize(("given", "small", "large"), [(None, 0.0, 0.5), (0.2, 0.2, 0.2)])
def test_default_dropout_is_0_5_in_the_papers_head_and_0_in_the_linear_one(given, small, large):
    for img_size, expected in ((32, small), (224, large)):
        model = uninitialized(create_model, "vgg11", img_size=img_size, pdrop=given)
        assert {layer.p for layer in model.classifier if isinstance(layer, nn.Dropout)} == {expected}


def test_feature_maps_come_from_before_each_pooling_and_after_the_last():
    model = create_model("vgg16_bn", n_classes=10, img_size=32)
    stages = model.forward_stages(torch.zeros(1, 3, 32, 32))
    assert [tuple(stage.shape[1:]) for stage in stages] == [
        (info["num_chs"], 32 // info["reduction"], 32 // info["reduction"]) for info in model.feature_info
    ]
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 8, 16, 32]


def test_an_image_below_32x32_is_refused():
    with pytest.raises(ValueError, match="32x32 and more; img_size is 28"):
        create_model("vgg11", img_size=28)


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="head is 'mlp'"):
        create_model("vgg11", head="mlp")
