"""Evaluate a model on every sample of a split, each counted exactly once on any number of ranks."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from datasets.pipeline.images import UnreadableImage
from datasets.pipeline.loaders import EvalLoader
from datasets.pipeline.workers import WorkersFailed
from engine.config.errors import RunError
from engine.devices.agreement import Interrupted
from engine.devices.sharding import is_sharded
from engine.tasks import Task


def readable(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches. An unreadable file, or workers that can't work, end the run with one line."""
    try:
        yield from batches
    except UnreadableImage as error:
        raise RunError(f"{error}; tools/verify_dataset.py finds all such files and lists them for data.exclude") from error
    except WorkersFailed as error:
        raise RunError(str(error)) from error


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    task: Task,
    accelerator: Accelerator,
    *,
    max_batches: int | None = None,
    stop: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """Return the task's metrics. `model` is the one without wrappers: ranks may have different numbers of batches.

    `stop` is called between two batches, equally often on every rank; a signal that it returns raises Interrupted.
    """
    was_training = model.training
    model.eval()
    metric = task.metric(accelerator.device)
    n_batches, batch = 0, None
    try:
        for n_batches, batch in enumerate(readable(islice(loader.batches(), max_batches)), start=1):
            metric.update(model, batch)
            if stop is not None and n_batches <= loader.n_common_batches and (signum := stop()):
                raise Interrupted(signum)
        if batch is not None and n_batches == loader.n_common_batches and is_sharded(model):
            model(batch[0])  # if another rank has one batch more, this one must take part in its forward
    finally:
        model.train(was_training)
    sums = metric.sums()
    return metric.compute(accelerator.reduce(sums, reduction="sum") if isinstance(sums, Tensor) else gather_object(sums))


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every rank the buffers of rank 0, which a checkpoint saves: each rank's BatchNorm saw a different last batch."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
