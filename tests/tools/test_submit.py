"""Run tools/submit.slurm with fakes of SLURM's programs, which start, preempt and requeue it as SLURM does."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.campaign import SMALL
from tests.running import ROOT, metrics, results

SUBMIT = ROOT / "tools" / "submit.slurm"
LENGTH = 2000

# Start the command once for each node, and forward SIGTERM, as srun does.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" & tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") echo 127.0.0.1 ;;
    "requeue 7") touch "$QUEUE/requeued" ;;
    *) exit 1 ;;
esac
"""


class Slurm:
    """Runs jobs on two nodes; a job is preempted as soon as `preempt()` is true."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def run(self, *argv: object, preempt=None) -> int:
        options = dict(re.findall(r"^#SBATCH --(\S+?)(?:=(\S+))?$", SUBMIT.read_text(), re.MULTILINE))
        assert "requeue" in options
        receiver, signal_name, _ = re.split("[:@]", options["signal"])
        assert receiver == "B"  # only the script, which forwards the signal
        job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "QUEUE": str(self.folder)}
        job |= {"PATH": f"{self.folder}:{os.environ['PATH']}", "PYTHON": sys.executable}
        with (self.folder / "log").open("a") as log:
            script = subprocess.Popen(
                ["bash", SUBMIT, *map(str, argv)], cwd=ROOT, env={**os.environ, **job}, stdout=log, stderr=log
            )
            if preempt is not None:
                while script.poll() is None and not preempt():
                    time.sleep(0.1)
                subprocess.run(["kill", f"-{signal_name}", str(script.pid)], check=False)
            return script.wait(timeout=240)

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_completes(slurm, tmp_path):
    run = tmp_path / "run"
    argv = ("-e", run, *SMALL, "--train.n_steps", LENGTH, "--train.print_freq", 100, "--train.save_freq", LENGTH)
    argv += ("--train.eval_freq", LENGTH)
    assert slurm.run(*argv, preempt=lambda: (run / "metrics.jsonl").exists() and metrics(run)) == 0, slurm.log()
    assert (tmp_path / "requeued").exists(), slurm.log()
    assert results(run)["status"] == "interrupted"
    step = results(run)["step"]
    assert 100 <= step < LENGTH

    (tmp_path / "requeued").unlink()
    assert slurm.run(*argv) == 0, slurm.log()
    assert f"resuming at step {step}:" in slurm.log()
    assert "2 x cpu" in slurm.log()
    assert results(run)["status"] == "completed"
    assert [line["step"] for line in metrics(run)] == list(range(100, LENGTH + 1, 100))
    assert not (tmp_path / "requeued").exists()


def test_a_job_without_a_run_folder_is_rejected(slurm):
    assert slurm.run("-c", "configs/lenet_digits.yaml") == 2
    assert "-e must name the run folder" in slurm.log()


@pytest.mark.slow
def test_a_failed_job_is_not_requeued(slurm, tmp_path):
    assert slurm.run("-e", tmp_path / "run", "--train.optim.typo", 1) != 0
    assert "train.optim.typo" in slurm.log()
    assert not (tmp_path / "requeued").exists()
