"""Weights that are divided over two ranks: the training, its checkpoint, and going on from it.

torch divides them on a CPU as Accelerate lets it do on GPUs; see tests/engine/devices/sharded.py.
"""

import json

import pytest
import torch

from engine.run.checkpoint import read_checkpoint
from tests.faults.campaign import SMALL
from tests.running import assert_same_weights, metrics, results, run_command, run_on_two_ranks, untimed, weights

ARGV = (*SMALL, "--data.name", "shapes", "--data.n_train", 128, "--data.n_test", 53, "--data.img_size", 32)
ARGV += ("--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--train.n_steps", 8, "--train.batch_size", 16)
ARGV += ("--train.print_freq", 2, "--train.save_freq", 4, "--train.eval_freq", 4, "--eval.batch_size", 13)  # 26 and 27 samples
ARGV += ("--train.clip_grad_norm", 1.0, "--train.sam", 0.05)


def on_two_ranks(*argv: object):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    return run_command("python", *launcher, "-m", "tests.engine.devices.sharded", *argv)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "sharded"
    finished = on_two_ranks("-e", run, *ARGV)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    finished = run_on_two_ranks("-e", run, *ARGV)
    assert finished.returncode == 0, finished.stderr
    return run


def test_the_training_is_that_of_whole_weights(sharded, whole):
    for line, other in zip(metrics(sharded), metrics(whole), strict=True):
        for name in ("train/loss", "train/grad_norm", "valid/loss", "valid/acc@1"):
            assert line.get(name) == pytest.approx(other.get(name), abs=1e-4), name
    assert (sharded / "figures" / "predictions.png").exists()


def test_its_checkpoint_is_that_of_a_run_that_is_not_sharded(sharded, whole):
    ours, theirs = (read_checkpoint((run / "ckpt" / "latest").resolve()) for run in (sharded, whole))
    assert {name: value.shape for name, value in ours.weights.items()} == {n: v.shape for n, v in theirs.weights.items()}
    for name, value in ours.weights.items():
        torch.testing.assert_close(value, theirs.weights[name], rtol=1e-3, atol=1e-4)
    states = [checkpoint.train_state["optimizer"] for checkpoint in (ours, theirs)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, state in states[0]["state"].items():
        assert state["momentum_buffer"].shape == states[1]["state"][number]["momentum_buffer"].shape


def test_one_process_finds_in_it_what_two_ranks_reported(sharded):
    found = run_command("python", "tools/evaluate.py", sharded, "--json")
    assert found.returncode == 0, found.stderr
    metrics_there = json.loads(found.stdout)
    assert metrics_there["count"] == 53
    assert metrics_there["acc@1"] == results(sharded)["best"]["valid/acc@1"]


def test_it_goes_on_sharded_bit_for_bit_and_in_one_process_to_rounding(sharded, tmp_path):
    cut = tmp_path / "cut"
    assert on_two_ranks("-e", cut, *ARGV, "--train.time_limit", 1e-9).returncode != 0
    step = results(cut)["step"]
    assert 0 < step < 8
    alone = tmp_path / "alone"
    run_command("cp", "-r", cut, alone)
    finished = on_two_ranks("-e", cut, "-r", "latest", "--train.time_limit", "null")
    assert finished.returncode == 0, finished.stderr
    assert_same_weights(weights(cut), weights(sharded))
    assert untimed(metrics(cut)) == untimed(metrics(sharded))
    finished = run_command("python", "main.py", "-e", alone, "-r", "latest", "--train.time_limit", "null")
    assert finished.returncode == 0, finished.stderr
    assert f"resuming at step {step}:" in finished.stdout


@pytest.mark.parametrize("key", ["train.sync_batchnorm", "FSDP"])
def test_what_needs_gpus_is_refused_without_them(tmp_path, key):
    if torch.cuda.is_available():
        pytest.skip("there are GPUs here, on which this is no mistake")
    argv = ("main.py", "-e", tmp_path / "run", "--train.n_steps", 1)
    if key == "FSDP":
        refused = run_command("python", *argv, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    else:
        refused = run_command("python", *argv, f"--{key}", "true")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert key in line
    assert "GPU" in line
    assert not (tmp_path / "run").exists()
