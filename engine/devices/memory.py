"""Peak memory, and malloc settings that keep freed blocks."""

import ctypes
import os
import sys
from pathlib import Path

import psutil
import torch

MIB = 2**20
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # in glibc's malloc.h, with an M_ before them


def keep_freed_memory(*, of_any_size: bool) -> None:
    """Let freed CPU tensors leave their memory to the next ones; blocks of more than 32 MiB only with `of_any_size`.

    glibc returns large blocks to the system, which hands them out again as pages to be zeroed: a tenth of the time of a ResNet's
    training, and up to a third with large batches. Blocks of any size fit into each other worse: up to 45 % more memory.
    MALLOC_* variables in the environment take precedence.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    if of_any_size and libc.mallopt(MMAP_THRESHOLD, 1024 * MIB):  # an older glibc refuses more than 32 MiB
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    else:
        libc.mallopt(MMAP_THRESHOLD, 32 * MIB)
        libc.mallopt(TRIM_THRESHOLD, 256 * MIB)


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the peak anew, where several runs share a process; on a CPU it stays that of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Return the peak in MiB: of tensors on an NVIDIA GPU, otherwise of this process without its workers."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_process()
    return round(peak / MIB, 1)


def _peak_of_process() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts the memory of the parent when it started this process
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
