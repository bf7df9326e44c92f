"""The engine trains exactly as a plain loop does, so its results can be trusted."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from engine import load_config, train
from engine.build import build
from tests.running import ROOT, assert_same_weights, weights


def plain_training(model, batches, make_optimizer, lr_of_step, n_steps):
    """A plain training loop."""
    optimizer = make_optimizer(model.parameters())
    model.train()
    for step, (images, targets) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr_of_step(step, n_steps)
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def cosine(lr, eta_min):
    return lambda step, n_steps: eta_min + (lr - eta_min) * (1 + math.cos(math.pi * step / n_steps)) / 2


CASES = {
    "SGD with momentum on ResNet-18": (
        "resnet18_cifar10.yaml",
        {"train.batch_size": 2, "train.print_freq": 50, "train.optim.lr": 0.01, "data.verify": False},
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.0005),
        cosine(0.01, 0.001),
    ),
    "Adam on LeNet": (
        "lenet_digits.yaml",
        {
            "train.batch_size": 16,
            "train.print_freq": 50,
            "train.optim.type": "Adam",
            "train.optim.lr": 0.001,
        },
        lambda parameters: torch.optim.Adam(parameters, lr=0.001),
        cosine(0.001, 0),
    ),
}


@pytest.mark.parametrize(
    ("case", "n_steps"),
    [
        ("SGD with momentum on ResNet-18", 20),
        pytest.param("SGD with momentum on ResNet-18", 200, marks=pytest.mark.slow),
        ("Adam on LeNet", 200),
    ],
)
def test_weights_match_a_plain_loop_bit_for_bit(case, n_steps, tmp_path, data_root):
    name, overrides, make_optimizer, lr_of_step = CASES[case]
    overrides = overrides | {"data.dataroot": str(data_root / "CIFAR-10"), "train.n_steps": n_steps}
    config = load_config(ROOT / "configs" / name, overrides)
    assert train(config, exp_dir=tmp_path / "run").status == "completed"

    run = build(config, Accelerator(cpu=True))  # only the initial weights and the batches come from the engine
    trained = plain_training(run.model, run.train_loader.batches(0, n_steps), make_optimizer, lr_of_step, n_steps)
    assert_same_weights(weights(tmp_path / "run"), trained)
