"""Evaluate a model on every sample of a split, each counted exactly once on any number of ranks."""

from itertools import islice

import torch
from accelerate import Accelerator
from torch import nn

from datasets.loaders import EvalLoader
from engine.tasks import Task


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EvalLoader, task: Task, accelerator: Accelerator, max_batches: int | None = None
) -> dict[str, float]:
    """`model` is the bare one, not wrapped for several ranks: they may have different numbers of batches."""
    was_training = model.training
    model.eval()
    metric = task.metric(accelerator.device)
    for batch in islice(loader.batches(), max_batches):
        metric.update(model, batch)
    model.train(was_training)
    return metric.compute(accelerator.reduce(metric.sums(), reduction="sum"))
