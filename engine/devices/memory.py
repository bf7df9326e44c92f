"""Memory: the most that was in use, and that what was freed stays at hand."""

import ctypes
import os
import sys
from pathlib import Path

import psutil
import torch

MIB = 2**20
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # in glibc's malloc.h, with an M_ before them


def keep_freed_memory() -> None:
    """Tensors of a CPU that are freed leave their memory to the next ones.

    glibc gives large pieces back to the system, which hands them out again as pages to be zeroed: up to a tenth of the time of a
    ResNet's training. Those of more than 32 MiB still go back, as keeping them costs more memory than is gained in time by most.
    Who has set MALLOC_* variables has settled it already.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(MMAP_THRESHOLD, 32 * MIB)
    libc.mallopt(TRIM_THRESHOLD, 256 * MIB)


def begin_peak_memory(device: torch.device) -> None:
    """Where several runs share a process, each has a peak of its own; on a CPU it is that of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """The most that there was at one time, in MiB: of tensors on an NVIDIA GPU, else of this process, without its workers."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_process()
    return round(peak / MIB, 1)


def _peak_of_process() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what a parent held when it started this process
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
