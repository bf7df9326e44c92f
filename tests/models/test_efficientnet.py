import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import create_model, model_signature
from models.efficientnet import MBConv
from models.mobilenet import round_channels
from tests.models.reference import assert_loads_and_agrees, assert_same_output, randomize

NAMES = [f"efficientnet_b{i}" for i in range(8)]


def blocks_of(model: nn.Module) -> list[MBConv]:
    return [module for module in model.modules() if isinstance(module, MBConv)]


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_weights_load_and_give_the_same_logits(name):
    assert_loads_and_agrees(
        create_model(name), torchvision.models.get_model(name), img_size=64 if name < "efficientnet_b3" else 32
    )


def test_timm_weights_load_under_converted_names_and_give_the_same_logits():
    ours, theirs = create_model("efficientnet_b0"), randomize(timm.create_model("efficientnet_b0"), img_size=64)
    ours.load_state_dict(ours.convert_pretrained(theirs.state_dict()), strict=True)
    assert_same_output(ours, theirs, img_size=64)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_timm_is_converted(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
    converted = ours.convert_pretrained(theirs.state_dict())
    assert {key: value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }


def test_own_weights_are_not_converted():
    model = create_model("efficientnet_b0")
    weights = model.state_dict()
    assert model.convert_pretrained(weights) is weights


@pytest.mark.parametrize(
    ("name", "img_size", "million_parameters", "billion_macs"),
    [  # table 2 of the paper; the image sizes are in the authors' code
        ("efficientnet_b0", 224, 5.3, 0.39),
        ("efficientnet_b1", 240, 7.8, 0.70),
        ("efficientnet_b2", 260, 9.2, 1.0),
        ("efficientnet_b3", 300, 12, 1.8),
        ("efficientnet_b4", 380, 19, 4.2),
        ("efficientnet_b5", 456, 30, 9.9),
        ("efficientnet_b6", 528, 43, 19),
        ("efficientnet_b7", 600, 66, 37),
    ],
)
def test_parameters_and_macs_at_the_published_resolution_match_the_paper(name, img_size, million_parameters, billion_macs):
    assert model_signature(name).parameters["img_size"].default == img_size
    with torch.device("meta"):
        model = create_model(name).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, img_size, img_size, device="meta"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million_parameters, rel=0.03)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billion_macs, rel=0.05)


def test_each_variant_has_the_published_dropout_and_batchnorm_constants():
    for name, pdrop in zip(NAMES, (0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5), strict=True):
        with torch.device("meta"):
            ours, theirs = create_model(name), torchvision.models.get_model(name)
        assert ours.classifier[0].p == theirs.classifier[0].p == pdrop
        constants = (1e-5, 0.1) if name < "efficientnet_b5" else (1e-3, 0.01)
        for model in (ours, theirs):
            assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {constants}


def test_widths_are_rounded_to_8_and_never_below_90_percent():
    assert [round_channels(n) for n in (1, 16 * 1.1, 24 * 1.1, 24 * 1.4, 44)] == [8, 16, 24, 32, 48]
    assert round_channels(16 * 1.2) == 24  # 19.2 is nearer to 16, but that is only 83 % of it
    with torch.device("meta"):
        b3 = create_model("efficientnet_b3")
    assert b3.features[1][0].block[-1][0].out_channels == 24


def test_depths_are_rounded_up():
    with torch.device("meta"):
        b1 = create_model("efficientnet_b1")
    assert [len(b1.features[i]) for i in range(1, 8)] == [2, 3, 3, 4, 4, 5, 2]


def test_the_squeezed_width_is_a_quarter_of_the_input_channels_of_the_block():
    with torch.device("meta"):
        b0 = create_model("efficientnet_b0")
    first, second = b0.features[2]
    assert first.block[2].fc1.weight.shape == (4, 96, 1, 1)  # 16 input channels, 96 expanded
    assert second.block[2].fc1.weight.shape == (6, 144, 1, 1)  # 24 input channels


def test_drop_connect_grows_linearly_over_the_blocks():
    for name, n in (("efficientnet_b0", 16), ("efficientnet_b4", 32)):
        with torch.device("meta"):
            blocks = blocks_of(create_model(name))
        assert [block.stochastic_depth.p for block in blocks] == pytest.approx([0.2 * i / n for i in range(n)])
    with torch.device("meta"):
        assert {block.stochastic_depth.p for block in blocks_of(create_model("efficientnet_b0", drop_connect=0.0))} == {0}


def test_drop_connect_skips_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = blocks_of(create_model("efficientnet_b0"))[-1].stochastic_depth
    drop.p = 0.2
    images = torch.rand(4000, 2, 3, 3) + 0.1
    out = drop(images)
    skipped = (out == 0).flatten(1).all(dim=1)
    torch.testing.assert_close(out[~skipped], images[~skipped] / 0.8)
    assert skipped.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert drop.eval()(images) is images


def test_drop_connect_skips_the_block_and_not_its_input():
    block = blocks_of(create_model("efficientnet_b0"))[2].train()
    block.stochastic_depth.p = 0.999999
    x = torch.randn(4, 24, 8, 8)
    torch.testing.assert_close(block(x), x)


def test_a_seed_makes_a_training_step_reproducible():
    model = create_model("efficientnet_b0", n_classes=5).train()
    images, logits = torch.randn(8, 3, 32, 32), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        logits.append(model(images))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_feature_maps_are_at_strides_2_to_32():
    model = create_model("efficientnet_b0").eval()
    stages = model.forward_stages(torch.zeros(1, 3, 64, 64))
    shapes = [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert [tuple(stage.shape[1:]) for stage in stages] == shapes
    assert [(info["num_chs"], 64 // info["reduction"]) for info in model.feature_info] == [shape[:2] for shape in shapes]


def test_the_embedding_comes_after_the_last_1x1_convolution():
    model = create_model("efficientnet_b0").eval()
    x = torch.randn(2, 3, 32, 32)
    embedding = model.forward_head(model.forward_features(x), pre_logits=True)
    assert embedding.shape == (2, model.num_features) == (2, 1280)
    torch.testing.assert_close(model.classifier(embedding), model(x))


def test_a_feature_extractor_has_no_head():
    extractor = create_model("efficientnet_b0", features_only=True)
    assert not [
        name for name, _ in extractor.named_parameters() if name.startswith(("backbone.features.8", "backbone.classifier"))
    ]
    assert [m.shape[1] for m in extractor.eval()(torch.zeros(1, 3, 32, 32))] == [16, 24, 40, 112, 320]


def test_the_cifar_stem_keeps_the_resolution():
    model = create_model("efficientnet_b0", first_block="cifar10").eval()
    stages = model.forward_stages(torch.zeros(1, 3, 32, 32))
    assert [stage.shape[-1] for stage in stages] == [32, 16, 8, 4, 2]
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 8, 16]


def test_initial_weights_have_the_variance_of_torchvision():
    torch.manual_seed(0)
    theirs = torchvision.models.efficientnet_b0().state_dict()
    for name, parameter in create_model("efficientnet_b0").named_parameters():
        if parameter.ndim >= 2:
            samples = parameter.numel()
            assert parameter.std().item() == pytest.approx(theirs[name].std().item(), rel=4 / samples**0.5), name
        else:
            assert (parameter == (1 if name.endswith("1.weight") else 0)).all(), name


def test_few_classes_do_not_make_the_first_logits_large():
    torch.manual_seed(0)
    model = create_model("efficientnet_b0", n_classes=10)
    assert model.classifier[1].weight.abs().max().item() == pytest.approx(1000**-0.5, rel=0.01)


@pytest.mark.parametrize("argument", [{"first_block": "mnist"}, {"drop_connect": 1.0}])
def test_an_invalid_argument_is_refused(argument):
    (name, value), *_ = argument.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it"):
        create_model("efficientnet_b0", **argument)
