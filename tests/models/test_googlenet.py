import pytest
import torch
import torchvision
from torch import nn

from models import create_model
from tests.models.reference import assert_loads_and_agrees, assert_same_output, randomize, relative_error

INCEPTIONS = [  # the paper's table 1: maps in; 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool proj
    (192, 64, 96, 128, 16, 32, 32),
    (256, 128, 128, 192, 32, 96, 64),
    (480, 192, 96, 208, 16, 48, 64),
    (512, 160, 112, 224, 24, 64, 64),
    (512, 128, 128, 256, 24, 64, 64),
    (512, 112, 144, 288, 32, 64, 64),
    (528, 256, 160, 320, 32, 128, 128),
    (832, 256, 160, 320, 32, 128, 128),
    (832, 384, 192, 384, 48, 128, 128),
]


def reference(**kwargs):
    return torchvision.models.GoogLeNet(aux_logits=True, init_weights=False, **kwargs)


def test_torchvision_weights_load_and_give_the_same_logits():
    assert_loads_and_agrees(create_model("googlenet"), reference(), img_size=64)


def test_transform_input_matches_torchvision():
    theirs = randomize(reference(transform_input=True), img_size=64)
    ours = create_model("googlenet", transform_input=True)
    ours.load_state_dict(theirs.state_dict())
    assert_same_output(ours, theirs, img_size=64)


def test_training_returns_the_logits_and_those_of_the_heads_after_4a_and_4d_in_this_order():
    theirs = randomize(reference(dropout=0.0, dropout_aux=0.0), img_size=64).double().train()
    ours = create_model("googlenet", pdrop=0.0, pdrop_aux=0.0).double().train()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    logits, aux1, aux2 = ours(images)
    expected = theirs(images)
    assert relative_error(logits, expected.logits) < 1e-7
    assert relative_error(aux1, expected.aux_logits1) < 1e-7
    assert relative_error(aux2, expected.aux_logits2) < 1e-7


def test_evaluation_does_not_run_the_auxiliary_heads():
    model = create_model("googlenet", n_classes=10).eval()
    model.aux1 = model.aux2 = None
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_head_lists_all_modules_that_features_do_not_use():
    model = create_model("googlenet", n_classes=10, img_size=32, first_block="cifar10")
    sum(stage.sum() for stage in model.forward_stages(torch.randn(2, 3, 32, 32))).backward()
    unused = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == set(model.HEAD)


def test_only_the_classifiers_depend_on_the_number_of_classes(tmp_path):
    theirs = reference().state_dict()
    torch.save(theirs, tmp_path / "googlenet.pth")
    model = create_model("googlenet", n_classes=10, pretrained=tmp_path / "googlenet.pth")
    for name in model.CLASSIFIERS:
        assert model.get_submodule(name).out_features == 10
    own = model.state_dict()
    differing = {key.rpartition(".")[0] for key in theirs if not torch.equal(own[key], theirs[key])}
    assert differing == set(model.CLASSIFIERS)


def test_branch3_kernel_5_is_the_papers_5x5():
    model = create_model("googlenet", branch3_kernel=5)
    bodies = [(3, 64, 7), (64, 64, 1), (64, 192, 3)]
    for c_in, out_1x1, reduce_3x3, out_3x3, reduce_5x5, out_5x5, pool_proj in INCEPTIONS:
        bodies += [(c_in, out_1x1, 1), (c_in, reduce_3x3, 1), (reduce_3x3, out_3x3, 3)]
        bodies += [(c_in, reduce_5x5, 1), (reduce_5x5, out_5x5, 5), (c_in, pool_proj, 1)]
    heads = [(512, 128, 1), (528, 128, 1)]
    params = sum(c_in * c_out * kernel**2 + 2 * c_out for c_in, c_out, kernel in bodies + heads)
    params += 2 * (2048 * 1024 + 1024 + 1024 * 1000 + 1000) + 1024 * 1000 + 1000
    assert sum(parameter.numel() for parameter in model.parameters()) == params
    assert model.forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 1024, 2, 2)


def test_dropout_rates_are_those_of_the_paper():
    model = create_model("googlenet")
    assert (model.dropout.p, model.aux1.dropout.p, model.aux2.dropout.p) == (0.4, 0.7, 0.7)


def test_initial_weights_have_a_std_of_0_01():
    torch.manual_seed(0)
    model = create_model("googlenet")
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.06)
    assert sum(layer.weight.abs().max().item() > 0.03 for layer in layers) > len(layers) // 2, "torchvision cuts nothing off"


@pytest.mark.parametrize(
    ("first_block", "img_size", "sides"), [("imagenet", 224, (112, 56, 28, 14, 7)), ("cifar10", 32, (32, 32, 32, 16, 8))]
)
def test_maps_have_the_sizes_of_the_paper_and_the_cifar_stem_keeps_the_resolution(first_block, img_size, sides):
    model = create_model("googlenet", n_classes=10, img_size=img_size, first_block=first_block)
    stages = model.forward_stages(torch.zeros(1, 3, img_size, img_size))
    assert tuple(stage.shape[2] for stage in stages) == sides
    assert tuple(img_size // info["reduction"] for info in model.feature_info) == sides
    assert [stage.shape[1] for stage in stages] == [info["num_chs"] for info in model.feature_info]


@pytest.mark.parametrize(("first_block", "smallest"), [("imagenet", 15), ("cifar10", 2)])
def test_the_smallest_image_works_and_a_smaller_one_is_refused(first_block, smallest):
    model = create_model("googlenet", n_classes=10, img_size=smallest, first_block=first_block).eval()
    assert model(torch.zeros(1, 3, smallest, smallest)).shape == (1, 10)
    with pytest.raises(ValueError, match=f"images of {smallest}x{smallest} and more; img_size is {smallest - 1}"):
        create_model("googlenet", img_size=smallest - 1, first_block=first_block)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"first_block": "mnist"}, "first_block is 'mnist'"),
        ({"branch3_kernel": 7}, "branch3_kernel is 7"),
        ({"transform_input": True, "in_channels": 1}, "three colors of ImageNet; in_channels is 1"),
    ],
)
def test_an_invalid_argument_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        create_model("googlenet", **wrong)
