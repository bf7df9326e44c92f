from functools import partial

import pytest
import torch
from timm.layers.cbam import CbamModule
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from models.cbam_resnet import CBAM, SpatialAttention
from tests.models.reference import assert_same_output, randomize

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
AUTHORS_NAMES = {
    "cbam.channel.fc1": "cbam.ChannelGate.mlp.1",
    "cbam.channel.fc2": "cbam.ChannelGate.mlp.3",
    "cbam.spatial.conv": "cbam.SpatialGate.spatial.conv",
    "cbam.spatial.bn": "cbam.SpatialGate.spatial.bn",
}


def from_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of a ResNet with timm's CbamModule to our names, and to our order of maximum and mean."""
    ours = {}
    for key, value in weights.items():
        key = key.replace(".se.", ".cbam.").replace("spatial.conv.conv", "spatial.conv").replace("spatial.conv.bn", "spatial.bn")
        if "channel.fc" in key and value.ndim == 4:
            value = value.flatten(1)
        elif "spatial.conv" in key:
            value = value.flip(1)
        ours[key] = value
    return ours


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_resnet_with_the_attention_of_timm_gives_the_same_logits(depth):
    attention = {"attn_layer": partial(CbamModule, mlp_bias=True)}
    theirs = randomize(TimmResNet(BasicBlock if depth < 50 else Bottleneck, DEPTHS[depth], block_args=attention), img_size=48)
    # Halve the output of every residual branch. The two networks sum in different orders, and with full outputs the rounding
    # errors of float32 exceed the tolerance over 152 layers: each network then differs that much from itself in float64.
    for name, parameter in theirs.named_parameters():
        if name.endswith("bn2.weight" if depth < 50 else "bn3.weight"):
            parameter.data /= 2
    ours = create_model(f"cbam_resnet{depth}")
    ours.load_state_dict(from_timm(theirs.state_dict()), strict=True)
    assert_same_output(ours, theirs, img_size=48)


def test_weights_with_the_authors_names_load():
    model = randomize(create_model("cbam_resnet18", n_classes=10), img_size=48)
    authors = {}
    for key, value in model.state_dict().items():
        for ours, theirs in AUTHORS_NAMES.items():
            key = key.replace(ours, theirs)
        authors[key] = value
    again = create_model("cbam_resnet18", n_classes=10)
    assert authors.keys() != again.state_dict().keys()
    again.load_state_dict(again.convert_pretrained(authors), strict=True)
    assert_same_output(again, model, img_size=48)


def test_own_weights_are_not_converted():
    model = create_model("cbam_resnet18")
    assert model.convert_pretrained(model.state_dict()).keys() == model.state_dict().keys()


def test_channel_attention_comes_before_spatial_attention():
    attention = randomize_attention(CBAM(64))
    x = torch.randn(2, 64, 9, 9)
    torch.testing.assert_close(attention(x), attention.spatial(attention.channel(x)))
    assert not torch.allclose(attention(x), attention.channel(attention.spatial(x)), atol=1e-2)


def test_mean_and_maximum_go_through_the_same_layers_and_are_added_before_the_sigmoid():
    channel = randomize_attention(CBAM(64)).channel
    assert [tuple(parameter.shape) for parameter in channel.parameters()] == [(4, 64), (4,), (64, 4), (64,)]
    x = torch.randn(2, 64, 5, 5)
    mean, maximum = (channel.fc2(channel.fc1(pooled).relu()) for pooled in (x.flatten(2).mean(-1), x.flatten(2).max(-1).values))
    torch.testing.assert_close(channel(x), x * (mean + maximum).sigmoid()[:, :, None, None])


@pytest.mark.parametrize(("first", "pooled"), [(0, lambda x: x.max(dim=1).values), (1, lambda x: x.mean(dim=1))])
def test_spatial_attention_stacks_the_maximum_before_the_mean(first, pooled):
    spatial = SpatialAttention().eval()
    nn.init.zeros_(spatial.conv.weight)
    nn.init.ones_(spatial.bn.weight)
    spatial.conv.weight.data[0, first, 3, 3] = 1  # the center of the kernel
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(spatial(x), x * pooled(x)[:, None].sigmoid(), rtol=1e-4, atol=1e-4)


def test_the_spatial_kernel_is_7x7_without_bias_and_with_a_slow_batchnorm():
    spatial = SpatialAttention()
    assert spatial.conv.weight.shape == (1, 2, 7, 7)
    assert spatial.conv.bias is None
    assert (spatial.bn.num_features, spatial.bn.momentum) == (1, 0.01)


@pytest.mark.parametrize(("name", "last"), [("cbam_resnet18", "bn2"), ("cbam_resnet50", "bn3")])
def test_the_attention_is_between_the_last_batchnorm_and_the_addition(name, last):
    block = randomize(create_model(name, n_classes=10), img_size=48).layer1[1]
    seen = {}
    block.get_submodule(last).register_forward_hook(lambda _, inputs, output: seen.update(normalized=output.clone()))
    block.cbam.register_forward_hook(lambda _, inputs, output: seen.update(entered=inputs[0].clone(), scaled=output.clone()))
    x = torch.randn(2, block.cbam.channel.fc2.out_features, 8, 8)
    with torch.no_grad():
        y = block(x)
    assert torch.equal(seen["entered"], seen["normalized"])
    torch.testing.assert_close(y, (seen["scaled"] + x).relu())


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_attention_adds_the_parameters_and_macs_of_the_paper(depth):
    expansion = 1 if depth < 50 else 4
    parameters = macs = 0
    for side, channels, n_blocks in zip((8, 4, 2, 1), (64, 128, 256, 512), DEPTHS[depth], strict=True):
        wide = channels * expansion
        narrow = wide // 16
        parameters += n_blocks * (2 * wide * narrow + wide + narrow + 2 * 7 * 7 + 2)
        macs += n_blocks * (2 * 2 * wide * narrow + 2 * 7 * 7 * side**2)  # the two layers run on the mean and on the maximum
    counted = [_count(f"{family}{depth}") for family in ("resnet", "cbam_resnet")]
    assert counted[1][0] - counted[0][0] == parameters
    assert counted[1][1] - counted[0][1] == macs
    published = {18: 11.78, 34: 21.96, 50: 28.09, 101: 49.33}  # millions, the paper's table 4
    assert depth == 152 or round(counted[1][0] / 1e6, 2) == published[depth]


def _count(name: str) -> tuple[int, int]:
    model = create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def test_18_layers_for_cifar_have_the_published_number_of_parameters():
    model = create_model("cbam_resnet18", n_classes=10, first_block="cifar10")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 11.3


def test_the_stride_of_a_bottleneck_is_on_its_3x3():
    block = create_model("cbam_resnet50").layer2[0]
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)


def test_the_cifar_stem_keeps_the_resolution():
    stages = create_model("cbam_resnet18", first_block="cifar10").forward_stages(torch.zeros(1, 3, 32, 32))
    assert [tuple(stage.shape[1:]) for stage in stages] == [(64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_initial_weights_are_those_of_the_authors_code():
    model = create_model("cbam_resnet50")
    assert model.layer3[1].conv2.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert model.fc.weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.02)
    assert not model.fc.bias.any()
    attention = model.layer4[1].cbam
    assert attention.channel.fc1.weight.std().item() == pytest.approx((3 * 2048) ** -0.5, rel=0.02)  # uniform to 2048 ** -0.5
    assert not attention.channel.fc1.bias.any()
    assert not attention.channel.fc2.bias.any()


def test_every_position_is_scaled_by_one_half_at_initialization():
    spatial = create_model("cbam_resnet18").layer1[0].cbam.spatial
    x = torch.randn(2, 64, 9, 9)
    torch.testing.assert_close(spatial(x), x / 2)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="first_block is 'mnist'"):
        create_model("cbam_resnet18", first_block="mnist")


def randomize_attention(attention: CBAM) -> CBAM:
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return attention.eval()
