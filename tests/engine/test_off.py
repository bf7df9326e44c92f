"""Disabled features cost nothing: an update runs the large operations of a plain loop and never waits for the device."""

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
    """Counts the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.large: Counter[str] = Counter()  # on tensors larger than the logits; views are free

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket._qualified_op_name
        self.all[name] += 1
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        if not operation.is_view and any(tensor.numel() > BATCH_SIZE * N_CLASSES for tensor in tensors):
            self.large[name] += 1
        return result


def update_operations(**options: Any) -> Operations:
    config = load_config(None, {"train.n_steps": 4, "train.batch_size": BATCH_SIZE, **options})
    run = builder.build(config, make_accelerator(config.train, deterministic=config.deterministic))
    first, second = list(train_batches(run, 0))[:2]
    run.update(run.state, first, measure=False)  # creates the optimizer's state
    with Operations() as counted:
        run.update(run.state, second, measure=False)
    return counted


def plain_loop_operations() -> Operations:
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


def test_update_runs_the_same_large_operations_as_a_plain_loop():
    ours, plain = update_operations(), plain_loop_operations()
    assert ours.large == plain.large
    assert not plain.all - ours.all
    assert (ours.all - plain.all).total() <= 20  # the batch's loss sum and correct predictions


def test_update_never_reads_a_value_back_from_the_device():
    assert "aten::_local_scalar_dense" not in update_operations().all


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
def test_enabled_feature_changes_the_operation_counts(key, value):
    assert update_operations(**{key: value}).large != plain_loop_operations().large
