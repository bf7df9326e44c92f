"""Tests that need GPUs. Without them, each test is skipped with its reason."""

import pytest
import torch

from tests.faults.campaign import SMALL
from tests.running import metrics, results, run_command, run_main

N_GPUS = torch.cuda.device_count()
needs_a_gpu = pytest.mark.skipif(N_GPUS < 1, reason="needs a GPU, for fp16 with a gradient scaler")
needs_two_gpus = pytest.mark.skipif(N_GPUS < 2, reason="needs two GPUs")
RESNET = (*SMALL, "--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--train.n_steps", 8, "--train.print_freq", 2)
RESNET += ("--train.batch_size", 64, "--train.eval_freq", 4, "--train.save_freq", 4, "--deterministic", "true")


@needs_a_gpu
def test_sam_with_fp16_clipping_and_ema_matches_fp32_within_rounding(tmp_path):
    """LeNet's gradients are below 0.1, so that 65,536 times as much is a number in fp16 and no update is skipped."""
    options = ("--train.n_steps", 8, "--train.print_freq", 2, "--train.batch_size", 64, "--deterministic", "true")
    options += ("--train.sam", 0.05, "--train.clip_grad_norm", 1.0, "--train.ema", 0.9)
    for precision in ("fp32", "fp16"):
        assert run_main("-e", tmp_path / precision, *SMALL, *options, "--train.precision", precision) == 0
    losses = [[line["train/loss"] for line in metrics(tmp_path / name)] for name in ("fp32", "fp16")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@needs_two_gpus
def test_sync_batchnorm_on_two_gpus_matches_one_gpu(tmp_path):
    launch = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "main.py")
    assert run_main("-e", tmp_path / "one", *RESNET) == 0
    finished = run_command(*launch, "-e", tmp_path / "two", *RESNET, "--train.sync_batchnorm", "true")
    assert finished.returncode == 0, finished.stderr
    losses = [[line["train/loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@needs_two_gpus
def test_fsdp2_checkpoint_evaluates_the_same_in_one_process(tmp_path):
    launcher = ("python", "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml")
    finished = run_command(*launcher, "main.py", "-e", tmp_path / "run", *RESNET)
    assert finished.returncode == 0, finished.stderr
    evaluated = run_command("python", "tools/evaluate.py", tmp_path / "run", "--json")
    assert f'"acc@1": {results(tmp_path / "run")["best"]["valid/acc@1"]}' in evaluated.stdout
