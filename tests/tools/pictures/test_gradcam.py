import math

import pytest
import timm
import torch
from torch.nn import functional as F

from datasets.pipeline.counters import derive
from datasets.shapes import SHAPES, TEST
from engine.config.errors import ConfigError
from engine.inference.trained import load_trained
from models import create_model, list_models
from models.loading.factory import MODELS
from tests.generated_shapes import generate
from tests.running import run_main
from tools.pictures.gradcam import default_layer, find_class, global_attention, gradcam, heat_of, rollout, rollout_maps

# the smallest member of each family of this project, with an image size it supports
FAMILIES = {
    "airbench94": 32,
    "lenet": 32, "alexnet": 128, "allconvnet": 32, "cbam_resnet18": 64, "efficientnet_b0": 64, "googlenet": 64, "nin": 64,
    "hrnet_w18_small": 64, "mobilenet_0_25x": 64, "preactresnet18": 64, "resnet18": 64, "resnext29_2x64d": 32, "se_resnet18": 64,
    "shufflenet_0_25x_g1": 64, "vgg11": 64, "vit_tiny": 64,
}  # fmt: skip


def images(side, n=2, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_it_equals_the_class_activation_map_for_mean_pooling_and_one_linear_layer():
    """Selvaraju et al. (2017), section 3.1: there Grad-CAM is CAM, the features weighted by the classifier (Zhou et al. 2016)."""
    torch.manual_seed(0)
    model = create_model("resnet18", n_classes=5, img_size=128).eval()
    inputs = images(128)
    maps, logits = gradcam(model, inputs, "layer4")
    with torch.no_grad():
        features = model.forward_features(inputs)
    assert torch.equal(logits, model(inputs))
    for i, target in enumerate(logits.argmax(1).tolist()):
        expected = torch.einsum("c,chw->hw", model.fc.weight[target], features[i]).relu() / features[i, 0].numel()
        torch.testing.assert_close(maps[i], expected.detach())


def test_the_map_of_another_class_differs():
    torch.manual_seed(0)
    model = create_model("resnet18", n_classes=5, img_size=128).eval()
    inputs = images(128)
    other, logits = gradcam(model, inputs, "layer4", torch.tensor([3, 3]))
    predicted, _ = gradcam(model, inputs, "layer4", logits.argmax(1))
    assert torch.equal(gradcam(model, inputs, "layer4")[0], predicted)
    assert not torch.equal(other, predicted)


def test_a_frozen_model_has_the_same_maps():
    torch.manual_seed(0)
    model = create_model("resnet18", n_classes=5, img_size=128).eval()
    expected, _ = gradcam(model, images(128), "layer4")
    model.requires_grad_(False)
    assert torch.equal(gradcam(model, images(128), "layer4")[0], expected)


def test_every_family_is_listed_above():
    def modules(names):
        constructors = (MODELS.entries[name] for name in names)
        return {getattr(constructor, "func", constructor).__module__ for constructor in constructors}

    assert modules(FAMILIES) == modules(list_models())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_stage_of_every_family_is_found(name):
    torch.manual_seed(0)
    side = FAMILIES[name]
    model = create_model(name, n_classes=5, in_channels=3, img_size=side).eval()
    layer = default_layer(model, images(side))
    maps, _ = gradcam(model, images(side), layer)
    assert maps.shape[1] == maps.shape[2] > 1
    assert maps.isfinite().all()
    assert (maps.flatten(1).std(1) > 0).any()


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [
        ("test_resnet", "layer3", 10),
        ("test_efficientnet", "blocks.3", 10),
        ("test_convnext", "stages.2", 10),
        ("test_vit", "blocks.5.norm1", 10),
        ("swin_tiny_patch4_window7_224", "layers.3", 7),
    ],
)
def test_the_last_stage_of_a_timm_model_is_found(name, layer, side):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    inputs = images(model.pretrained_cfg["input_size"][-1], n=1)
    assert default_layer(model, inputs) == layer
    assert gradcam(model, inputs, layer)[0].shape == (1, side, side)


@pytest.mark.parametrize(("side", "layer"), [(224, "layer4"), (128, "layer3"), (32, "layer1"), (8, "relu")])
def test_an_earlier_stage_is_used_if_the_last_is_too_coarse(side, layer):
    model = create_model("resnet18", n_classes=5, img_size=side).eval()
    assert default_layer(model, images(side)) == layer


# The rollout


def plain_attention(attn, x, heads):
    """The attention weights, B heads N N, and the output of the layer."""
    n, width = x.shape[1:]
    queries, keys, values = (
        (x @ attn.qkv.weight.T + attn.qkv.bias).view(len(x), n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    )
    weights = torch.softmax(queries @ keys.transpose(2, 3) / math.sqrt(width // heads), dim=-1)
    return weights, attn.proj((weights @ values).transpose(1, 2).reshape(len(x), n, width))


@torch.no_grad()
def test_the_rollout_equals_a_plain_computation_and_its_rows_sum_to_one():
    torch.manual_seed(0)
    model = create_model("vit_tiny", n_classes=5, img_size=32, patch_size=8, depth=3).eval()
    for block in model.blocks:
        block.attn.qkv.weight.mul_(10)  # so that some patches matter more
    inputs = images(32)
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(inputs)], dim=1) + model.pos_embed
    expected = torch.eye(17).expand(2, -1, -1)
    for block in model.blocks:
        weights, attended = plain_attention(block.attn, block.norm1(x), heads=3)
        expected = (weights.mean(1) + torch.eye(17)) / 2 @ expected
        x = x + attended
        x = x + block.mlp(block.norm2(x))
    rolled = rollout(model, inputs)
    torch.testing.assert_close(rolled, expected)
    torch.testing.assert_close(rolled.sum(2), torch.ones(2, 17))
    assert rolled[:, 0].std() > 1e-3
    torch.testing.assert_close(rollout_maps(model, inputs), expected[:, 0, 1:].view(2, 4, 4))


@torch.no_grad()
def test_the_rollout_of_a_timm_vit_uses_its_attention_weights():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    inputs = images(224, n=1)
    rolled = rollout(model, inputs)
    seen = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda layer, given, output: seen.append(output.mean(1)))
    model(inputs)
    first, second = ((weights + torch.eye(197)) / 2 for weights in seen)
    torch.testing.assert_close(rolled, second @ first)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "timm/swin_tiny_patch4_window7_224"])
def test_rollout_refuses_a_model_without_attention_between_all_tokens(name):
    model = create_model(name, n_classes=5, img_size=224).eval()
    assert global_attention(model, images(224, n=1)) is None
    with pytest.raises(ConfigError, match="has no attention between all tokens"):
        rollout(model, images(224, n=1))


# From the command line


def test_a_class_is_found_by_its_name_or_number():
    classes = ("tabby", "tiger cat", "7", "disc")
    assert [find_class(text, classes) for text in ("Tiger Cat", "3", "7", "0")] == [1, 3, 2, 0]
    with pytest.raises(ConfigError, match=r"--target disk: no such class; did you mean disc\?"):
        find_class("disk", classes)
    with pytest.raises(ConfigError, match="--target 4: no such class; there are 4"):
        find_class("4", classes)


def test_the_heat_has_the_range_from_zero_to_one_in_each_image():
    heat = heat_of(torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)), 32)
    assert heat.shape == (3, 32, 32)
    assert heat.amin((1, 2)).tolist() == [0, 0, 0]
    assert heat.amax((1, 2)).tolist() == [1, 1, 1]
    assert not heat_of(torch.zeros(1, 4, 4), 32).any()


@pytest.mark.slow  # two minutes on one core
@pytest.mark.timeout(1200)
def test_the_maps_of_a_model_trained_on_shapes_cover_the_object(tmp_path):
    size, difficulty = 64, 0
    data = ("--data.name", "shapes", "--data.img_size", size, "--data.difficulty", difficulty)
    model = ("--model.name", "resnet18", "--model.layers", "[1,1,1,1]")
    optim = ("--train.optim.type", "AdamW", "--train.optim.lr", 0.002, "--train.sched.type", "OneCycleLR")
    length = ("--data.n_train", 4000, "--data.n_test", 200, "--train.batch_size", 32, "--train.n_epochs", 4)
    assert run_main("-e", tmp_path / "run", *data, *model, *optim, *length) == 0
    trained = load_trained(tmp_path / "run", {})

    shapes = generate(derive(trained.config.seed, SHAPES, TEST), torch.arange(200), size=size, difficulty=difficulty)
    assert torch.equal(shapes.images, trained.data.splits["valid"].images)
    inputs = trained.normalize(shapes.images)
    maps, logits = gradcam(trained.model, inputs, default_layer(trained.model, inputs))
    right = logits.argmax(1) == shapes.labels[:, 0]
    assert right.float().mean() > 0.9
    inside = torch.zeros(200, size, size)
    for box, (left, top, right_edge, bottom) in zip(inside, shapes.boxes[:, 0].tolist(), strict=True):
        box[top:bottom, left:right_edge] = 1
    mass = F.interpolate(maps.unsqueeze(1), (size, size), mode="bilinear")[:, 0]
    seen = right & (mass.sum((1, 2)) > 0)
    share = (mass * inside).sum((1, 2))[seen] / mass.sum((1, 2))[seen]
    assert seen.float().mean() > 0.75
    assert share.mean() > 0.5  # more than half of the heat
    assert share.mean() > inside[seen].mean() + 0.1  # more than a uniform map
