"""Find the largest part of a batch that fits the device at once, without a change of the global batch."""

import multiprocessing
import os
import signal
from functools import partial
from typing import Any

import psutil
import torch

from engine.config.errors import ConfigError, RunError
from engine.devices.failures import is_out_of_memory
from tools.benchmarks import ours
from tools.benchmarks.report import Options, Report, report

N_UPDATES = 3  # the second one has the optimizer's state beside the activations, and the third one its fragments
GIB = 2**30


def measure(options: Options) -> Report:
    config = ours.load_config(options.config, options.overrides)
    if config.task != "classification":
        raise ConfigError("task", f"{config.task}: this benchmark measures models for classification only")
    if "train.micro_batch_size" in options.overrides:
        raise ConfigError("--train.micro_batch_size", "it is what this benchmark finds", "leave it out")
    n, limit = config.train.batch_size, int(options.max_memory * GIB) if options.max_memory else None
    sizes = sorted({-(-n // parts) for parts in range(1, n + 1)})  # equal parts: a size between two needs as many of them
    fits = partial(fits_in_a_process, options.config, options.overrides, limit)
    rows, low, high = list[dict[str, Any]](), -1, len(sizes)  # indices: low fits, high does not
    while high - low > 1:
        middle = len(sizes) - 1 if high == len(sizes) and low == -1 else (low + high) // 2  # the whole batch first
        peak = fits(sizes[middle])
        rows.append({"micro_batch_size": sizes[middle], "fits": "no" if peak is None else "yes", "peak_mib": peak or ""})
        low, high = (middle, high) if peak is not None else (low, middle)
    if low == -1:
        raise RunError(
            f"not even one image of {config.model.name} fits; --train.precision bf16 or a smaller data.img_size may help"
        )
    size, advice = sizes[low], f"The whole batch of {n} fits: --train.micro_batch_size 0"
    if size < n:
        same = "The updates stay those of the whole batch, but BatchNorm, if the model has it, normalizes each part by itself."
        advice = f"--train.micro_batch_size {size}: {n} images in {-(-n // size)} parts. {same}"
    return report([], config.model.name, rows=rows, end=advice, keys={"train.micro_batch_size": size % n})


def fits_in_a_process(config: str | None, keys: dict[str, Any], limit: int | None, size: int) -> float | None:
    """Return the peak memory in MiB of a few updates with micro-batches of `size`, or None if there is not enough.

    The process has its own address space on a CPU, so that it fails there before the system runs out of memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_update, args=(config, {**keys, "train.micro_batch_size": size}, limit, sender))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None  # killed: by the kernel, or by a library that can't allocate
    finally:  # also after Ctrl-C
        process.kill()
        process.join()
    if isinstance(outcome, str):
        raise RunError(outcome)
    return outcome


def _update(config: str | None, keys: dict[str, Any], limit: int | None, sender: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        _limit_memory(limit)
        sender.send(ours.peak_of_updates(config, keys, N_UPDATES))
    except Exception as error:
        is_full = is_out_of_memory(error) or "could not create a primitive" in str(error)  # of oneDNN
        sender.send(None if is_full else f"{type(error).__name__}: {error}")
    os._exit(0)  # libraries that have no memory left may hang as they are unloaded


def _limit_memory(limit: int | None) -> None:
    if torch.cuda.is_available():
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
        return
    import resource

    free = psutil.virtual_memory().available if limit is None else limit
    most = psutil.Process().memory_info().vms + free
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
