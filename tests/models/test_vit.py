import math

import pytest
import timm
import torch
from torch import nn

from engine.run.macs import count
from models import create_model
from models.vit import VisionTransformer
from tests.models.reference import assert_loads_and_agrees, randomize, relative_error

NAMES = ["vit_tiny", "vit_small", "vit_base", "vit_large"]


def uninitialized(build, *args, **kwargs) -> nn.Module:
    """Build a model without drawing its weights, which are set later: 300 million random numbers take longer than the test."""
    with torch.device("meta"):
        model = build(*args, **kwargs)
    return model.to_empty(device="cpu")


@pytest.mark.parametrize(("name", "depth"), [("vit_tiny", 12), ("vit_small", 12), ("vit_base", 12), ("vit_large", 8)])
def test_timms_weights_load_and_give_the_same_logits(name, depth):
    """The large model has 8 of its 24 blocks: two copies of all blocks in float64 take 5 GB. The next test builds all of them."""
    options = {"img_size": 32, "patch_size": 8, "depth": depth}
    ours, theirs = (
        uninitialized(create_model, name, **options),
        uninitialized(timm.create_model, f"{name}_patch16_224", **options),
    )
    assert_loads_and_agrees(ours, theirs, img_size=32)


@pytest.mark.parametrize("name", NAMES)
def test_default_names_and_shapes_match_timms_published_model(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(VisionTransformer.TIMM_NAMES[name])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert timm.is_model_pretrained(VisionTransformer.TIMM_NAMES[name])


def test_vit_tiny_with_patches_of_4_has_5_36_million_parameters():
    d, n, depth = 192, 8 * 8 + 1, 12
    attention = d * 3 * d + 3 * d + d * d + d
    mlp = d * 4 * d + 4 * d + 4 * d * d + d
    expected = depth * (attention + mlp + 4 * d) + (4 * 4 * 3 * d + d) + d + n * d + 2 * d + (d * 10 + 10)
    counted = count(create_model("vit_tiny", n_classes=10, img_size=32, patch_size=4), 3, 32)
    assert counted.params == expected
    assert round(expected / 1e6, 2) == 5.36
    # The counter includes LayerNorm in the multiply-adds, which is less than one percent of them.
    products = depth * (n * (d * 3 * d + d * d + 8 * d * d) + 2 * n * n * d) + 64 * 48 * d + d * 10
    assert products <= counted.macs < 1.01 * products


def test_forward_stages_arranges_the_patches_as_in_the_image():
    model = randomize(create_model("vit_tiny", img_size=32, patch_size=8), img_size=32)
    image = torch.randn(2, 3, 32, 32)
    (features,) = model.forward_stages(image)
    tokens = model.forward_features(image)
    assert features.shape == (2, 192, 4, 4)
    assert tokens.shape == (2, 17, 192)
    torch.testing.assert_close(features[:, :, 1, 2], tokens[:, 1 + 1 * 4 + 2])
    reference = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8).eval()
    reference.load_state_dict(model.state_dict())
    (theirs,) = reference.forward_intermediates(image, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(features, theirs)


def test_the_head_reads_the_class_token_after_the_last_norm():
    model = randomize(create_model("vit_tiny", img_size=32, patch_size=8), img_size=32)
    nn.init.ones_(model.norm.weight)
    nn.init.zeros_(model.norm.bias)
    embedding = model.forward_head(model.forward_features(torch.randn(2, 3, 32, 32)), pre_logits=True)
    torch.testing.assert_close(embedding.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(embedding.var(1, unbiased=False), torch.ones(2))


def test_norms_precede_attention_and_mlp_so_a_zeroed_block_is_the_identity():
    block = create_model("vit_tiny").blocks[0]
    for last in (block.attn.proj, block.mlp.fc2):
        nn.init.zeros_(last.weight)
    x = 5 + 3 * torch.randn(2, 7, 192)
    assert torch.equal(block(x), x)


def test_every_norm_has_the_epsilon_of_the_authors():
    norms = [module for module in create_model("vit_tiny").modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * 25


def test_gelu_is_exact():
    mlp = create_model("vit_tiny").blocks[0].mlp
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(mlp.act(x), x * (1 + torch.erf(x / math.sqrt(2))) / 2, rtol=1e-12, atol=1e-12)


def test_positions_matter():
    model = randomize(create_model("vit_tiny", img_size=32, patch_size=8), img_size=32)
    nn.init.normal_(model.pos_embed)
    image = torch.randn(4, 3, 32, 32)
    rolled = image.roll(8, dims=3)  # the same patches at other positions
    assert relative_error(model(rolled), model(image)) > 0.1
    nn.init.zeros_(model.pos_embed)
    assert relative_error(model(rolled), model(image)) < 1e-4


def test_initial_weights_have_the_same_statistics_as_in_timm():
    torch.manual_seed(0)
    ours, theirs = dict(create_model("vit_tiny").named_parameters()), timm.create_model("vit_tiny_patch16_224").named_parameters()
    for name, parameter in theirs:
        weight = ours[name].detach()
        if parameter.numel() > 10_000:
            assert weight.std().item() == pytest.approx(parameter.std().item(), rel=0.03), name
            assert abs(weight.mean().item()) < 0.001, name
        elif name == "cls_token":
            assert weight.std().item() == pytest.approx(1e-6, rel=0.3)
        elif name != "patch_embed.proj.bias":
            assert torch.equal(weight, parameter), name
    for name in ("pos_embed", "blocks.5.attn.qkv.weight", "blocks.5.mlp.fc2.weight", "head.weight"):
        assert ours[name].std().item() == pytest.approx(0.02, rel=0.03)


def test_dropout_follows_the_positions_and_every_dense_layer_except_qkv():
    model = create_model("vit_tiny", img_size=32, patch_size=8, pdrop=0.25).train()
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    model(torch.randn(1, 3, 32, 32))
    in_block = ["attn.dropout", "mlp.dropout", "mlp.dropout"]
    assert seen == ["dropout", *(f"blocks.{i}.{name}" for i in range(12) for name in in_block)]


def test_an_image_of_another_size_is_refused():
    model = create_model("vit_tiny", img_size=32, patch_size=8)
    with pytest.raises(ValueError, match=r"reads images of 32x32, as its position embedding does; got 64x32"):
        model(torch.zeros(1, 3, 64, 32))


def test_an_image_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="img_size 28 can't be cut into patches of 16; give a patch_size that divides it"):
        create_model("vit_tiny", img_size=28)


def test_drop_path_skips_the_same_branches_as_in_timm():
    options = {"img_size": 32, "patch_size": 8, "depth": 4}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, drop_path_rate=0.6, **options).double().train()
    ours = create_model("vit_tiny", n_classes=5, drop_path=0.6, **options).double().train()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)
    torch.manual_seed(4)
    assert not torch.allclose(ours(images), outputs[0])
