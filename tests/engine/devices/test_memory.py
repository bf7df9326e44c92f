"""Memory that is freed is used again."""

import sys

import pytest

from tests.running import run_command

PAGES = """
import resource
import sys

import torch

from engine.devices.memory import keep_freed_memory


def step():
    held = [torch.ones(4 * 2**20) for _ in range(8)]
    while held:
        held.pop()


if sys.argv[1] == "kept":
    keep_freed_memory()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose allocator it is about")
def test_tensors_take_the_memory_of_those_before():
    kept, given_back = (int(run_command("python", "-c", PAGES, which).stdout) for which in ("kept", "given back"))
    assert kept < 0.25 * given_back  # pages, of whatever size; how many go back differs from process to process
