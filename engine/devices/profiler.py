"""A trace of some updates, recorded by torch's profiler."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from torch.profiler import profile, schedule

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")

SKIPPED = 10  # updates, slower than later ones: kernels are chosen, memory is allocated
WARM_UP = 1  # of the profiler itself


def recorded(batches: Iterator[Batch], folder: Path, *, rank: int, n_updates: int, n_left: int) -> Iterator[Batch]:
    """Yield the batches. The work between one and the next is an update, a ProfilerStep in the trace.

    `n_left` updates are still to come: in a short run the last ones are recorded.
    """
    n_updates = min(n_updates, max(1, n_left - WARM_UP))
    wait = min(SKIPPED, max(0, n_left - WARM_UP - n_updates))

    def write(profiler: profile) -> None:
        folder.mkdir(exist_ok=True)
        path = folder / f"trace-rank{rank}.json"
        profiler.export_chrome_trace(str(path))
        log.info("a profile of %d updates is in %s; https://ui.perfetto.dev opens it", n_updates, path)

    # otherwise CUPTI stays attached and slows all later updates: https://github.com/pytorch/pytorch/issues/144455
    os.environ.setdefault("TEARDOWN_CUPTI", "1")
    plan = schedule(wait=wait, warmup=WARM_UP, active=n_updates, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as profiler:
        for batch in batches:
            yield batch
            profiler.step()
