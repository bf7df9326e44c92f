"""train.compile regions: blocks are compiled alone, equal ones once, and the training stays the same."""

import copy

import pytest
import torch

from engine import ConfigError, load_config
from engine.build import _compiled
from engine.devices.accelerator import seed_device
from engine.devices.blocks import compile_blocks, recompute_blocks
from engine.run.macs import count
from models import create_model
from tests.engine.devices.test_blocks import assert_same_gradients_and_buffers, forward_backward
from tests.running import run_main, weights

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch.compiler.reset()


def regions(model, backend="eager"):
    """Compile the blocks of a copy; return it and the list in which each compiled graph counts."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    model = copy.deepcopy(model)
    assert compile_blocks(model, backend=record, dynamic=False)
    return model, graphs


@pytest.mark.parametrize(
    ("name", "options", "n_graphs"),
    [
        ("resnet18", {"layers": (3, 2, 1, 1)}, 5),  # the first block of each stage differs from the others
        ("vit_tiny", {"depth": 4, "patch_size": 16}, 1),
        ("timm/vit_tiny_patch16_224", {"depth": 4, "patch_size": 16}, 1),
    ],
)
def test_equal_blocks_share_a_graph_and_results_and_names_stay(name, options, n_graphs):
    torch.manual_seed(0)
    plain = create_model(name, n_classes=4, img_size=32, **options).train()
    model, graphs = regions(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    forward_backward(model, IMAGES)
    forward_backward(plain, IMAGES)
    assert len(graphs) == n_graphs
    assert_same_gradients_and_buffers(model, plain)


def test_an_evaluation_is_not_compiled():
    model, graphs = regions(create_model("vit_tiny", n_classes=4, img_size=32, depth=2))
    with torch.no_grad():
        model.eval()(IMAGES)
        model.train()(IMAGES)
    assert count(model, 3, 32).macs > 1e6
    assert graphs == []


def test_a_compiled_block_still_recomputes_its_activations():
    torch.manual_seed(0)
    plain = create_model("resnet18", n_classes=4, img_size=32, layers=(2,), first_block="cifar10").train()
    recomputed = copy.deepcopy(plain)
    recompute_blocks(recomputed)
    model, _ = regions(recomputed, "aot_eager")
    assert forward_backward(model, IMAGES) < 0.8 * forward_backward(plain, IMAGES)
    assert_same_gradients_and_buffers(model, plain)


@pytest.mark.parametrize(
    ("name", "checkpointing", "expected"),
    [("lenet", False, "lenet has no blocks"), ("timm/test_resnet", True, "would update BatchNorm twice")],
)
def test_models_that_cannot_be_compiled_by_regions_are_refused(name, checkpointing, expected):
    train = load_config(None, {"train.compile": "regions", "train.grad_checkpointing": checkpointing}).train
    with pytest.raises(ConfigError, match=expected):
        _compiled(create_model(name, n_classes=4), train, name, sizes_vary=False)


@pytest.mark.slow
def test_a_run_in_regions_trains_as_a_plain_run(tmp_path):
    argv = ("--model.name", "vit_tiny", "--model.depth", 3, "--model.patch_size", 7, "--train.n_steps", 4, "--train.ema", 0.9)
    for value in ("false", "regions"):
        assert run_main("-e", tmp_path / value, *argv, "--train.batch_size", 8, "--train.compile", value) == 0
    assert weights(tmp_path / "regions").keys() == weights(tmp_path / "false").keys()
    for name, value in weights(tmp_path / "regions").items():
        torch.testing.assert_close(value, weights(tmp_path / "false")[name], rtol=1e-3, atol=1e-4)


def test_seeding_one_device_gives_the_random_numbers_of_torch_manual_seed():
    torch.manual_seed(2**63 - 5)
    expected = torch.rand(3)
    seed_device(2**63 - 5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
