import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import create_model

EPSILON = 5e-4


def correlated_images(n=64, size=12, in_channels=3):
    """Draw smooth images, whose neighboring pixels are similar, as in photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, in_channels, size // 2, size // 2, generator=generator)
    return F.interpolate(coarse, size=size, mode="bilinear") + 0.1 * torch.randn(n, in_channels, size, size, generator=generator)


def patches_of(images):
    """Cut out all 2x2 patches one by one: N x values of a patch."""
    side = images.shape[-1] - 1
    return torch.stack([images[:, :, i : i + 2, j : j + 2].flatten(1) for i in range(side) for j in range(side)]).flatten(0, 1)


@pytest.fixture(scope="module")
def initialized():
    torch.manual_seed(0)
    model, images = create_model("airbench94"), correlated_images()
    model.initialize_from(iter(images.split(25)))  # the last batch is smaller
    return model.double(), images.double()


def test_outputs_of_the_first_layer_are_white_for_the_patches_it_was_fitted_to(initialized):
    model, images = initialized
    outputs = model.whiten(images).transpose(0, 1).flatten(1)  # B C H W -> C BHW
    half = len(outputs) // 2
    covariance = outputs[:half] @ outputs[:half].T / outputs.shape[1]
    patches = patches_of(images)
    variances = torch.linalg.eigvalsh(patches.T @ patches / len(patches)).flip(0)
    assert variances.max() > 30 * variances.min()  # the patches were far from white
    torch.testing.assert_close(covariance, torch.diag(variances / (variances + EPSILON)), rtol=1e-4, atol=1e-4)
    assert (covariance - torch.eye(half)).abs().max() < EPSILON / (variances.min() + EPSILON) + 1e-4
    assert torch.equal(outputs[half:], -outputs[:half])


def test_only_the_bias_of_the_first_layer_is_trained(initialized):
    model, _ = initialized
    names = [name for name, _ in model.named_parameters()]
    assert "whiten.bias" in names
    assert not {"whiten.weight", "groups.0.norm1.weight"} & set(names)
    assert "whiten.weight" in model.state_dict()


def test_the_network_has_1_97_million_weights():
    model = create_model("airbench94", n_classes=10)
    whitening, head = 3 * 4, 256 * 10
    filters = sum(9 * i * o + 9 * o * o for i, o in ((2 * whitening, 64), (64, 256), (256, 256)))
    biases = 2 * whitening + 2 * (64 + 256 + 256)
    assert sum(parameter.numel() for parameter in model.parameters()) == filters + biases + head
    assert round((filters + biases + head + 2 * whitening**2) / 1e6, 2) == 1.97


def test_convolutions_start_as_the_identity():
    model = create_model("airbench94")
    images = torch.randn(2, 24, 8, 8)
    torch.testing.assert_close(model.groups[0].conv1(images)[:, :24], images)
    torch.testing.assert_close(model.groups[2].conv1(torch.ones(1, 256, 4, 4)), torch.ones(1, 256, 4, 4))


def test_norms_have_a_bias_but_no_scale_and_a_momentum_of_0_4():
    norm = create_model("airbench94").groups[1].norm2.train()
    maps = 3 + 2 * torch.randn(8, 256, 4, 4, generator=torch.Generator().manual_seed(0))
    normalized = F.batch_norm(maps, None, None, training=True, eps=1e-12)
    torch.testing.assert_close(norm(maps), normalized)
    torch.testing.assert_close(norm.running_mean, 0.4 * maps.mean((0, 2, 3)))
    nn.init.constant_(norm.bias, 0.5)
    torch.testing.assert_close(norm(maps), normalized + 0.5)


def test_logits_are_divided_by_nine():
    model = create_model("airbench94", img_size=16).eval()
    embedding = model.forward_head(model.forward_features(torch.randn(2, 3, 16, 16)), pre_logits=True)
    torch.testing.assert_close(model.forward_head(embedding[..., None, None]), embedding @ model.head.weight.T / 9)


def test_the_last_pooling_is_3x3_for_a_32x32_image():
    model = create_model("airbench94").eval()
    last = model.forward_features(torch.randn(2, 3, 32, 32))
    assert last.shape[-2:] == (3, 3)
    assert torch.equal(model.forward_head(last, pre_logits=True), F.max_pool2d(last, 3).flatten(1))


class TestNormalizedFilters:
    def built(self):
        torch.manual_seed(0)
        return create_model("airbench94", widths=(8, 16, 16), img_size=16, normalise_filters=True)

    def test_a_training_step_rescales_the_norm_to_the_root_of_the_number_of_filters(self):
        model = self.built().train()
        with torch.no_grad():
            model.groups[1].conv1.weight.mul_(7)
        model(torch.randn(4, 3, 16, 16))
        for group in model.groups:
            for conv in (group.conv1, group.conv2):
                assert conv.weight.norm().item() == pytest.approx(conv.out_channels**0.5)

    def test_rescaling_changes_neither_the_output_nor_the_direction_of_a_gradient(self):
        plain, model, images = self.built().train().double(), self.built().train().double(), torch.randn(4, 3, 16, 16).double()
        for group in plain.groups:
            group.conv1.normalized = group.conv2.normalized = False
        outputs = [net(images) for net in (plain, model)]
        torch.testing.assert_close(*outputs)
        for logits in outputs:
            logits.logsumexp(1).sum().backward()
        for name in ("groups.0.conv2.weight", "groups.2.conv1.weight"):
            a, b = (net.get_parameter(name).grad.flatten() for net in (plain, model))
            assert F.cosine_similarity(a, b, dim=0).item() == pytest.approx(1)

    def test_evaluation_does_not_change_the_weights(self):
        model = self.built().eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model(torch.randn(4, 3, 16, 16))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_rescaling_compiles_without_a_graph_break(self):
        torch.compiler.reset()
        model = self.built().train()
        torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(4, 3, 16, 16)).sum().backward()
        assert model.groups[0].conv1.weight.norm().item() == pytest.approx(8**0.5)


def test_a_too_small_image_is_refused():
    with pytest.raises(ValueError, match="img_size is 8"):
        create_model("airbench94", img_size=8)
