import os
import subprocess
import sys
from pathlib import Path

import pytest

from datasets.pipeline.cores import cores_per_rank, usable_cores
from tests.running import ROOT

REAL = Path("/sys/fs/cgroup/cpu")  # of version 1


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),  # more than one
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        (  # a job's quota above the one of its step
            {
                "proc/self/cgroup": "0::/system.slice/job/step\n",
                "sys/fs/cgroup/system.slice/job/step/cpu.max": "max 100000\n",
                "sys/fs/cgroup/system.slice/job/cpu.max": "400000 100000\n",
            },
            4,
        ),
        (  # in a container, the path is that of the host, and the files are those of the container
            {"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"},
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        ({"proc/self/cgroup": "nonsense\n\n0:\n", "sys/fs/cgroup/cpu.max": "200000\n"}, 64),
    ],
)
def test_a_quota_limits_the_cores(many_cores, tmp_path, files, expected):
    write(tmp_path, files)
    assert usable_cores(tmp_path) == expected


def test_the_ranks_of_a_machine_share_its_cores(many_cores, monkeypatch):
    monkeypatch.setattr("datasets.pipeline.cores.usable_cores", lambda: 12)
    assert cores_per_rank() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_per_rank() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert cores_per_rank() == 1


@pytest.mark.skipif(not os.access(REAL, os.W_OK), reason="needs control groups of version 1, and the right to make one")
def test_a_real_quota_is_found():
    group = REAL / f"image-backbones-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text(str(int((group / "cpu.cfs_period_us").read_text())))
        program = (
            "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()));"
            "from datasets.pipeline.cores import usable_cores; print(usable_cores())"
        )
        argv = (sys.executable, "-c", program, group / "cgroup.procs")
        assert subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "1\n"
    finally:
        group.rmdir()
