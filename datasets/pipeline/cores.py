"""The processor cores that this process may use, which a container or a scheduler may limit to a few of the machine's."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that the affinity and the quotas of Linux control groups allow, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def cores_per_rank() -> int:
    """Return this rank's share of the usable cores; launchers tell how many ranks the machine has."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quota, in cores, of each control group of this process that has one. A container may see only the lower ones."""
    names: tuple[str, ...]
    for line in _words(root / "proc/self/cgroup", separator="\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":  # version 2
            mount, names = root / "sys/fs/cgroup", ("cpu.max",)
        elif "cpu" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup" / controllers, ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            quota, period, *_ = [*(word for name in names for word in _words(group / name)), "max", "max"]
            if quota.isdigit() and period.isdigit() and int(period) > 0:  # neither max nor -1
                yield int(quota) / int(period)
            if group == mount:
                break


def _words(path: Path, separator: str | None = None) -> list[str]:
    try:
        return path.read_text().split(separator)
    except (OSError, UnicodeDecodeError):  # not Linux, or no such controller
        return []
