"""Gradient checkpointing keeps less and changes no bit."""

import copy
import pickle

import pytest
import torch

from engine.devices.recompute import recompute_blocks
from models import create_model

SMALL = {"n_classes": 4, "img_size": 32}
OPTIONS = {
    "resnet18": {"layers": (1, 1, 1, 1), "pdrop": 0.2, "drop_path": 0.3},
    "resnet50": {"layers": (1, 1, 1, 1)},
    "preactresnet18": {"layers": (1, 1, 1, 1)},
    "vit_tiny": {"depth": 3, "patch_size": 8, "pdrop": 0.1, "drop_path": 0.3},
    "efficientnet_b0": {},
    "mobilenet_0_25x": {},
    "googlenet": {"img_size": 64},
    "hrnet_w18_small": {},
    "timm/vit_tiny_patch16_224": {"depth": 3},
    "timm/resnet18": {},
    "timm/mobilenetv3_small_050": {},
}


def trained_once(model, images):
    """The numbers that the forward pass keeps for the backward pass, which is taken too."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(1)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(images)
    sum(logits.logsumexp(1).sum() for logits in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return kept


def assert_trained_alike(model, other):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_and_running_statistics_are_the_same_and_less_is_kept(name):
    torch.manual_seed(0)
    plain = create_model(name, **SMALL | OPTIONS[name]).train()
    recomputed = copy.deepcopy(plain)
    assert recompute_blocks(recomputed)
    side = (SMALL | OPTIONS[name])["img_size"]
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(2))
    assert trained_once(recomputed, images) < 0.8 * trained_once(plain, images)
    assert_trained_alike(plain, recomputed)
    assert [name for name, _ in recomputed.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_weights(of):
    model = create_model("resnet18", layers=(1, 1, 1, 1), **SMALL).train()
    recompute_blocks(model)
    twin = of(model)
    trained_once(twin, torch.randn(4, 3, 32, 32))
    assert all(weight.grad is not None for weight in twin.parameters())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_a_compiled_model_counts_a_batch_once(name):
    torch.manual_seed(0)
    plain = create_model(name, **SMALL | ({} if name.startswith("timm/") else {"layers": (1, 1, 1, 1)})).train()
    recomputed, images = copy.deepcopy(plain), torch.randn(4, 3, 32, 32)
    recompute_blocks(recomputed)
    trained_once(plain, images)
    torch.compiler.reset()
    trained_once(torch.compile(recomputed, backend="aot_eager", fullgraph=True), images)
    assert_trained_alike(plain, recomputed)


def test_a_model_without_blocks_is_left_alone():
    assert recompute_blocks(create_model("lenet", in_channels=1, n_classes=4)) == 0
