"""The most memory that was in use."""

import sys
from pathlib import Path

import psutil
import torch


def begin_peak_memory(device: torch.device) -> None:
    """Where several runs share a process, each has a peak of its own; on a CPU it is that of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """The most that there was at one time, in MiB: of tensors on an NVIDIA GPU, else of this process, without its workers."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_process()
    return round(peak / 2**20, 1)


def _peak_of_process() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what a parent held when it started this process
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
