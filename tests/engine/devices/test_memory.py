"""Freed memory is reused."""

import sys

import pytest

from tests.running import run_command

COUNT_PAGE_FAULTS = """
import resource
import sys

import torch

from engine.devices.memory import keep_freed_memory


def step():
    held = [torch.ones(int(sys.argv[2]) * 2**18) for _ in range(8)]
    while held:
        held.pop()


if sys.argv[1] != "given back":
    keep_freed_memory(of_any_size=sys.argv[1] == "kept, of any size")
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tests the Linux allocator")
@pytest.mark.parametrize(("mode", "mib"), [("kept", 16), ("kept, of any size", 16), ("kept, of any size", 80)])
def test_tensors_reuse_freed_memory(mode, mib):
    kept, returned = (int(run_command("python", "-c", COUNT_PAGE_FAULTS, how, mib).stdout) for how in (mode, "given back"))
    assert kept < 0.25 * returned  # page faults; how much memory is returned varies between processes
