"""Gradient checkpointing saves memory and changes no bit of the result."""

import copy
import pickle

import pytest
import torch

from engine.devices.blocks import recompute_blocks
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


def forward_backward(model, images):
    """Run one forward and backward pass; return how many values are saved between them."""
    n_saved = 0

    def pack(tensor):
        nonlocal n_saved
        n_saved += tensor.numel()
        return tensor

    torch.manual_seed(1)  # for dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(images)
    sum(logits.logsumexp(1).sum() for logits in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return n_saved


def assert_same_gradients_and_buffers(model, other):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpointing_saves_memory_and_keeps_gradients_and_statistics(name):
    torch.manual_seed(0)
    plain = create_model(name, **SMALL | OPTIONS[name]).train()
    recomputed = copy.deepcopy(plain)
    assert recompute_blocks(recomputed)
    side = (SMALL | OPTIONS[name])["img_size"]
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(2))
    assert forward_backward(recomputed, images) < 0.8 * forward_backward(plain, images)
    assert_same_gradients_and_buffers(plain, recomputed)
    assert [name for name, _ in recomputed.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copied_model_uses_its_own_weights(make_copy):
    model = create_model("resnet18", layers=(1, 1, 1, 1), **SMALL).train()
    recompute_blocks(model)
    copied = make_copy(model)
    forward_backward(copied, torch.randn(4, 3, 32, 32))
    assert all(weight.grad is not None for weight in copied.parameters())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_compiled_model_updates_its_statistics_once_per_batch(name):
    torch.manual_seed(0)
    plain = create_model(name, **SMALL | ({} if name.startswith("timm/") else {"layers": (1, 1, 1, 1)})).train()
    recomputed, images = copy.deepcopy(plain), torch.randn(4, 3, 32, 32)
    recompute_blocks(recomputed)
    forward_backward(plain, images)
    torch.compiler.reset()
    forward_backward(torch.compile(recomputed, backend="aot_eager", fullgraph=True), images)
    assert_same_gradients_and_buffers(plain, recomputed)


def test_model_without_blocks_is_unchanged():
    assert recompute_blocks(create_model("lenet", in_channels=1, n_classes=4)) == 0
