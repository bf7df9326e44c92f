"""Failures of the machine and of other processes, as one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator

from engine.config.errors import RunError
from engine.config.schema import TrainConfig

LOST_PEER = (  # messages of gloo
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
    "timed out",
)


@contextmanager
def explained(train: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """Turn environment failures (out of memory, a dead worker or rank) into RunError."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        message = _explain(error, train, accelerator)
        if message is None:
            raise
        raise RunError(message) from error


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _explain(error: Exception, train: TrainConfig, accelerator: Accelerator) -> str | None:
    text = str(error)
    first_line = text.partition("\n")[0]
    if is_out_of_memory(error):
        per_device = train.batch_size // accelerator.num_processes
        at_once = min(train.micro_batch_size or per_device, per_device)
        remedy = f"--train.micro_batch_size {max(1, at_once // 2)} takes the same steps with less memory"
        if train.precision == "fp32":
            remedy += ", --train.precision bf16 needs about half"
        return (
            f"out of memory on {accelerator.device}: train.batch_size {train.batch_size} is {at_once} images at a time on each "
            f"device, in {train.precision}; {remedy}"
        )
    if text.startswith("Expected more than 1 value per channel"):
        key = "micro_batch_size" if train.micro_batch_size else "batch_size"
        return f"BatchNorm has a single value per channel to normalize by: train.{key} {getattr(train, key)} is too small for it"
    if text.startswith("DataLoader timed out"):
        return f"no worker has prepared a batch for {train.timeout} seconds (train.timeout); is the disk with the data alive?"
    if text.startswith("DataLoader worker"):
        reason = "; the kernel kills processes when memory runs out: fewer dataloader.num_workers need less" * ("Killed" in text)
        return f"a worker that reads data has died: {first_line.strip().rstrip('.')}{reason}"
    if "Too many open files" in text or text.startswith("received 0 items of ancdata"):
        return "the process may not open more files: ulimit -n allows more, fewer dataloader.num_workers need less"
    if "can't start new thread" in text:
        return "the system allows no more threads or processes (ulimit -u, or the limit of a container)"
    if isinstance(error, dist.DistError) or ("gloo" in text and any(message in text for message in LOST_PEER)):
        return f"another rank has ended or hasn't answered for {train.timeout} seconds (train.timeout); what it says comes first"
    return None
