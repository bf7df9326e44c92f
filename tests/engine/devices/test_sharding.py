"""Weights sharded over two ranks: training, checkpoint and resume.

These tests shard on the CPU, as Accelerate does on GPUs; see tests/engine/devices/sharded.py.
"""

import json
import os
import shutil

import pytest
import torch

from engine.config.command_line import run_tool
from engine.run.checkpoint import read_checkpoint
from tests.engine.devices.sharded import shard
from tests.faults.campaign import SMALL
from tests.faults.children import train
from tests.running import assert_same_weights, metrics, results, untimed, weights
from tools.evaluate import main as evaluate

ARGV = (*SMALL, "--data.name", "shapes", "--data.n_train", 128, "--data.n_test", 53, "--data.img_size", 32)
ARGV += ("--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--train.n_steps", 8, "--train.batch_size", 16)
ARGV += ("--train.print_freq", 2, "--train.save_freq", 4, "--train.eval_freq", 4, "--eval.batch_size", 13)  # 26 and 27 samples
ARGV += ("--train.clip_grad_norm", 1.0, "--train.sam", 0.05)


def sharded_training(run, *argv):
    return train(run, *argv, fault=shard, ranks=2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "sharded"
    ended = sharded_training(run, *ARGV)
    assert ended.codes == [0, 0], ended.output
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    return run


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    ended = train(run, *ARGV, ranks=2)
    assert ended.codes == [0, 0], ended.output
    return run


def test_sharded_training_matches_unsharded_training(sharded, unsharded):
    for line, other in zip(metrics(sharded), metrics(unsharded), strict=True):
        for name in {"train/loss", "train/grad_norm", "valid/loss", "valid/acc@1"} & other.keys():
            assert line[name] == pytest.approx(other[name], rel=0.01, abs=1e-3), name  # sums in another order
    assert (sharded / "figures" / "predictions.png").exists()


def test_sharded_checkpoint_matches_an_unsharded_one(sharded, unsharded):
    ours, theirs = (read_checkpoint((run / "ckpt" / "latest").resolve()) for run in (sharded, unsharded))
    assert {name: value.shape for name, value in ours.weights.items()} == {n: v.shape for n, v in theirs.weights.items()}
    for name, value in ours.weights.items():
        torch.testing.assert_close(value, theirs.weights[name], rtol=1e-3, atol=1e-3)
    states = [checkpoint.train_state["optimizer"] for checkpoint in (ours, theirs)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, state in states[0]["state"].items():
        assert state["momentum_buffer"].shape == states[1]["state"][number]["momentum_buffer"].shape


def test_one_process_reproduces_the_evaluation_of_two_ranks(sharded, capsys):
    assert run_tool(lambda: evaluate([str(sharded), "--json"])) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluated["count"] == 53
    assert evaluated["acc@1"] == results(sharded)["best"]["valid/acc@1"]


@pytest.mark.slow
def test_resume_is_bit_exact_when_sharded_and_works_in_one_process(sharded, tmp_path):
    interrupted = tmp_path / "cut"
    assert sharded_training(interrupted, *ARGV, "--train.time_limit", 1e-9).codes == [143, 143]
    step = results(interrupted)["step"]
    assert 0 < step < 8
    one_process = tmp_path / "alone"
    shutil.copytree(interrupted, one_process, symlinks=True)
    ended = sharded_training(interrupted, "-r", "latest", "--train.time_limit", "null")
    assert ended.codes == [0, 0], ended.output
    assert_same_weights(weights(interrupted), weights(sharded))
    assert untimed(metrics(interrupted)) == untimed(metrics(sharded))
    ended = train(one_process, "-r", "latest", "--train.time_limit", "null")
    assert ended.codes == [0], ended.output
    assert f"resuming at step {step}:" in ended.output


def ask_for_fsdp(run_dir):
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize("key", ["train.sync_batchnorm", "FSDP"])
def test_gpu_only_option_is_an_error_without_a_gpu(tmp_path, key):
    if torch.cuda.is_available():
        pytest.skip("a GPU is available, so this is allowed")
    argv = ("--train.n_steps", 1, *(("--train.sync_batchnorm", "true") if key != "FSDP" else ()))
    ended = train(tmp_path / "run", *argv, fault=ask_for_fsdp if key == "FSDP" else None)
    assert ended.codes == [2], ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    assert key in line
    assert "GPU" in line
    assert not (tmp_path / "run").exists()


def test_fewer_validation_samples_than_ranks_are_refused_before_the_training(tmp_path):
    ended = sharded_training(tmp_path / "run", *ARGV, "--data.n_test", 1)
    assert ended.codes == [2, 2]
    assert ended.output.count("error: data: the valid split has 1 samples for 2 ranks; FSDP needs one on each") == 1
    assert not (tmp_path / "run").exists()
