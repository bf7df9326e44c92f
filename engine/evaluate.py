"""Evaluate a model on every sample of a split, each counted exactly once on any number of ranks."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from datasets.pipeline.images import UnreadableImage
from datasets.pipeline.loaders import EvalLoader
from engine.config.errors import RunError
from engine.devices.agreement import Interrupted
from engine.devices.sharding import is_sharded
from engine.tasks import Task


def readable(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches. A file that can't be read is no bug of ours: it ends the run with one line, that names it."""
    try:
        yield from batches
    except UnreadableImage as error:
        raise RunError(f"{error}; tools/verify_dataset.py finds all such files and lists them for data.exclude") from error


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    task: Task,
    accelerator: Accelerator,
    *,
    max_batches: int | None = None,
    stop: Callable[[], int] | None = None,
) -> dict[str, float]:
    """`model` is the bare one, not wrapped for several ranks: they may have different numbers of batches.

    `stop` is asked between two batches, equally often on every rank, for a signal to leave by.
    """
    was_training = model.training
    model.eval()
    metric = task.metric(accelerator.device)
    n_batches = 0
    try:
        for n_batches, batch in enumerate(readable(islice(loader.batches(), max_batches)), start=1):
            metric.update(model, batch)
            if stop is not None and n_batches <= loader.n_common_batches and (signum := stop()):
                raise Interrupted(signum)
        if 0 < n_batches == loader.n_common_batches and is_sharded(model):
            model(batch[0])  # where another rank has one batch more, this one must take part in its forward
    finally:
        model.train(was_training)
    sums = metric.sums()
    return metric.compute(accelerator.reduce(sums, reduction="sum") if isinstance(sums, Tensor) else gather_object(sums))
