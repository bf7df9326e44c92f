"""What is off costs nothing: an update does to weights and activations what a plain loop does, and waits for no number."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import build as builder
from engine import load_config
from engine.devices.accelerator import make_accelerator
from engine.train import train_batches

BATCH_SIZE, N_CLASSES = 64, 10


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.large: Counter[str] = Counter()  # those on more numbers than there are logits; a view touches none

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket._qualified_op_name
        self.all[name] += 1
        touched = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        if not operation.is_view and any(tensor.numel() > BATCH_SIZE * N_CLASSES for tensor in touched):
            self.large[name] += 1
        return result


def of_an_update(**options: Any) -> Operations:
    config = load_config(None, {"train.n_steps": 4, "train.batch_size": BATCH_SIZE, **options})
    run = builder.build(config, make_accelerator(config.train, deterministic=config.deterministic))
    first, second = list(train_batches(run, 0))[:2]
    run.update(run.state, first, measure=False)  # makes the optimizer's state
    with Operations() as counted:
        run.update(run.state, second, measure=False)
    return counted


def of_a_plain_loop() -> Operations:
    config = load_config(None, {"train.n_steps": 4, "train.batch_size": BATCH_SIZE})
    run = builder.build(config, make_accelerator(config.train, deterministic=config.deterministic))
    model, batches = copy.deepcopy(run.model).train(), list(train_batches(run, 0))[:2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for images, labels in batches:
        with Operations() as counted:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return counted


def test_an_update_touches_weights_and_activations_as_often_as_a_plain_loop():
    ours, plain = of_an_update(), of_a_plain_loop()
    assert ours.large == plain.large
    assert not plain.all - ours.all
    assert (ours.all - plain.all).total() <= 20  # the loss's sum and the hits, of the batch


def test_an_update_waits_for_no_number():
    assert "aten::_local_scalar_dense" not in of_an_update().all


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.ema", 0.9),
        ("train.average_last", 1.0),
        ("train.clip_grad_norm", 1.0),
        ("train.clip_grad_value", 1.0),
        ("train.micro_batch_size", 32),
        ("train.nonfinite", "skip"),
        ("train.sam", 0.05),
        ("model.pdrop", 0.1),
    ],
)
def test_what_is_on_would_have_been_counted(key, value):
    assert of_an_update(**{key: value}).large != of_a_plain_loop().large
