"""Training with two CPU processes."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from engine.config.command_line import run_tool
from tests.faults.children import AtStep, train
from tests.on_disk import write_image_folder
from tests.running import ROOT, assert_same_weights, metrics, results, run_main, run_on_two_ranks, untimed, weights
from tools.evaluate import main as evaluate

ARGV = (
    "--train.n_steps",
    60,
    "--train.batch_size",
    64,
    "--train.print_freq",
    10,
    "--train.eval_freq",
    20,
    "--train.save_freq",
    20,
)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "two"
    finished = run_on_two_ranks("-e", run, *ARGV)
    assert finished.returncode == 0, finished.stderr
    return run


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "one"
    assert run_main("-e", run, *ARGV) == 0
    return run


def test_two_ranks_are_used(on_two_ranks):
    assert json.loads((on_two_ranks / "environment.json").read_text())["world_size"] == 2
    assert "2 x cpu" in (on_two_ranks / "output.log").read_text()


def test_every_sample_is_evaluated_once(on_two_ranks, on_one_rank):
    assert [line["valid/count"] for line in metrics(on_two_ranks) if "valid/count" in line] == [360] * 3
    assert [line["valid/count"] for line in metrics(on_one_rank) if "valid/count" in line] == [360] * 3


def test_each_sample_has_its_score_in_the_order_of_the_dataset(on_two_ranks, tmp_path):
    shutil.copytree(on_two_ranks, copied := tmp_path / "copied", symlinks=True)
    written = {path.name: path.read_bytes() for path in (on_two_ranks / "samples").iterdir()}
    shutil.rmtree(copied / "samples")
    for which in ("best", "latest"):
        assert run_tool(lambda which=which: evaluate([str(copied / "ckpt" / which)])) == 0
    again = {path.name: path.read_bytes() for path in (copied / "samples").iterdir()}
    assert set(again) == {"valid-60.npz", f"valid-{results(on_two_ranks)['best']['step']}.npz"}
    assert again.items() <= written.items()


def test_same_global_batch_has_the_same_loss_as_on_one_rank(on_two_ranks, on_one_rank):
    for two, one in zip(metrics(on_two_ranks), metrics(on_one_rank), strict=True):
        for name in ("train/loss", "valid/loss", "train/grad_norm"):
            if name in one:
                assert two[name] == pytest.approx(one[name], abs=1e-4)


@pytest.mark.slow
def test_gradient_accumulation_weights_a_smaller_last_micro_batch_by_its_samples(on_one_rank, tmp_path):
    ended = train(tmp_path / "run", *ARGV, "--train.micro_batch_size", 12, ranks=2)  # 32 = 12 + 12 + 8
    assert ended.codes == [0, 0], ended.output
    for two, one in zip(metrics(tmp_path / "run"), metrics(on_one_rank), strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], abs=1e-4)


def test_micro_batches_reduce_gradients_once_per_update(tmp_path):
    """As with whole batches: once per bucket and update."""
    sent = {}
    for size in (0, 8):
        counted = tmp_path / f"sent-{size}"
        argv = ("--train.n_steps", 3, "--train.batch_size", 64, "--train.micro_batch_size", size, "--train.num_threads", 1)
        ended = train(tmp_path / f"run-{size}", *argv, fault=CountReductions(str(counted)), ranks=2)
        assert ended.codes == [0, 0], ended.output
        sent[size] = counted.read_text().splitlines()
    assert len(sent[8]) == len(sent[0]) >= 3


@dataclass
class CountReductions:
    """Write a line each time rank 0 reduces a bucket of gradients."""

    path: str

    def __call__(self, run_dir):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        from engine.update import Update

        create = Update.__init__

        def count_and_reduce(group, bucket):
            if torch.distributed.get_rank() == 0:
                with open(self.path, "a") as file:
                    file.write("sent\n")
            return allreduce_hook(group, bucket)

        def with_hook(this, model, *args, **options):
            model.register_comm_hook(None, count_and_reduce)
            create(this, model, *args, **options)

        Update.__init__ = with_hook


@pytest.mark.slow
def test_recipes_match_one_rank_including_averaged_weights(tmp_path):
    argv = (*ARGV, "--train.n_steps", 40, "--train.ema", 0.9, "--train.clip_grad_norm", 0.5, "--train.micro_batch_size", 12)
    argv += ("--train.loss", "bce", "--train.label_smoothing", 0.1, "--eval.tta", "flip", "--train.nonfinite", "skip")
    argv += ("--train.optim.type", "AdamW", "--train.optim.lr", 0.002, "--train.optim.layer_decay", 0.7)
    argv += ("--train.optim.head_lr", 0.004, "--train.optim.decay_norm_and_bias", "false", "--train.freeze", "[conv1]")
    argv += ("--train.sched.type", "LinearLR", "--train.sched.warmup_steps", 5, "--train.sched.cooldown_steps", 5)
    ended = train(tmp_path / "two", *argv, ranks=2)
    assert ended.codes == [0, 0], ended.output
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["world_size"] == 2
    assert run_main("-e", tmp_path / "one", *argv) == 0
    for two, one in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert two.keys() == one.keys()
        for name in one.keys() & {"train/loss", "train/grad_norm", "train/lr", "valid/loss", "valid_ema/loss", "valid_ema/count"}:
            assert two[name] == pytest.approx(one[name], abs=1e-4), name
    assert metrics(tmp_path / "two")[-1]["valid_ema/count"] == 360


def test_sigterm_of_one_rank_saves_the_same_step_on_both_and_resume_is_bit_exact(on_two_ranks, tmp_path):
    run = tmp_path / "run"
    assert train(run, *ARGV, fault=AtStep(20, "SIGTERM", rank=1), ranks=2).codes == [143, 143]
    assert_resumes_to_the_same(run, on_two_ranks)


@pytest.mark.slow
def test_the_launcher_passes_sigterm_on_to_both_ranks(on_two_ranks, tmp_path):
    run = tmp_path / "run"
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "main.py", "-e", run, *ARGV)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    launcher = subprocess.Popen([str(word) for word in command], cwd=ROOT, text=True, **pipes)
    for line in launcher.stdout:
        if "step 20/" in line:
            launcher.send_signal(signal.SIGTERM)
            break
    launcher.communicate(timeout=120)
    assert_resumes_to_the_same(run, on_two_ranks)


def assert_resumes_to_the_same(run, uninterrupted):
    stopped = results(run)
    assert stopped["status"] == "interrupted"
    assert 20 <= stopped["step"] < 60
    ended = train(run, "-r", "latest", ranks=2)
    assert ended.codes == [0, 0], ended.output
    assert_same_weights(weights(uninterrupted), weights(run))
    assert untimed(metrics(uninterrupted)) == untimed(metrics(run))


def test_run_of_two_ranks_resumes_on_one_rank_with_a_note(on_two_ranks, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(on_two_ranks, run, symlinks=True)
    assert run_main("-r", run / "ckpt" / "step-000040") == 0
    assert "ranks: now 1, was 2" in capsys.readouterr().out
    assert metrics(run)[-1]["step"] == 60


def test_two_ranks_report_the_loss_that_one_rank_computes(tmp_path, data_root, capsys):
    """Each rank's BatchNorm sees different images; the evaluation must use the saved statistics."""
    argv = ("-c", "configs/resnet18_cifar10.yaml", "--model.layers", "[1,1,1,1]", "--data.dataroot", data_root / "CIFAR-10")
    argv += ("--data.verify", "false", "--train.n_steps", 3, "--train.batch_size", 8)
    ended = train(tmp_path / "run", *argv, ranks=2)
    assert ended.codes == [0, 0], ended.output
    capsys.readouterr()
    assert run_tool(lambda: evaluate([str(tmp_path / "run" / "ckpt" / "latest"), "--json"])) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluated["loss"] == pytest.approx(results(tmp_path / "run")["last"]["valid/loss"], rel=1e-6)


MIXED = (
    "--train.n_steps",
    12,
    "--train.batch_size",
    48,
    "--train.print_freq",
    1,
    "--train.eval_freq",
    12,
    "--train.num_threads",
    1,
)
MIXED += ("--augment.mixup", 0.8, "--augment.cutmix", 1.0, "--train.save_freq", 6, "--train.optim.lr", 0.05)
MIXING = {
    "with micro-batches": ("--train.micro_batch_size", 5),
    "in half of the batches of the first epoch": (
        "--augment.mix_prob",
        0.5,
        "--augment.mix_epochs",
        1,
        "--train.batch_size",
        240,
    ),
    "with repeats of images in files": (
        "IMAGES",
        "--augment.repeats",
        2,
        "--train.batch_size",
        12,
        "--dataloader.num_workers",
        0,
    ),
    "with a teacher": ("TEACHER",),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "with micro-batches" else pytest.param(kind, marks=pytest.mark.slow) for kind in MIXING]
)
def test_mixing_is_a_function_of_the_global_batch(kind, tmp_path):
    words = {"IMAGES": (), "TEACHER": ()}
    if "IMAGES" in MIXING[kind]:
        data = write_image_folder(tmp_path / "data", n_classes=4, n_train=24)
        words["IMAGES"] = ("--data.name", "imagefolder", "--data.dataroot", data, "--data.img_size", 28)
    if "TEACHER" in MIXING[kind]:
        assert train(tmp_path / "teacher", *MIXED, "--seed", 5).codes == [0]
        words["TEACHER"] = ("--distill.teacher", tmp_path / "teacher")
    argv = (*MIXED, *(part for word in MIXING[kind] for part in words.get(word, (word,))))
    for ranks in (1, 2, 3):
        run = tmp_path / str(ranks)
        ended = train(run, *argv, ranks=ranks)
        assert ended.codes == [0] * ranks, ended.output
        assert json.loads((run / "environment.json").read_text())["world_size"] == ranks
        assert _largest_difference(run, tmp_path / "1") < 1e-6


@pytest.mark.slow
def test_mixing_on_two_ranks_resumes_on_one(tmp_path):
    for ranks in (1, 2):
        assert train(tmp_path / str(ranks), *MIXED, ranks=ranks).codes == [0] * ranks
    assert train(tmp_path / "2", "-r", tmp_path / "2" / "ckpt" / "step-000006").codes == [0]
    assert _largest_difference(tmp_path / "2", tmp_path / "1") < 1e-6


def _largest_difference(run, other):
    ours, theirs = weights(run), weights(other)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def test_batch_size_not_divisible_by_the_ranks_is_a_one_line_error(tmp_path):
    ended = train(tmp_path / "run", *ARGV, "--train.batch_size", 63, ranks=2)
    assert ended.codes == [2, 2]
    assert ended.output.count("error: train.batch_size: 63 is not a multiple of the 2 ranks") == 1
    assert not (tmp_path / "run").exists()


def test_missing_data_is_a_one_line_error_and_stops_both_ranks(tmp_path):
    argv = ("--data.name", "MNIST", "--data.dataroot", tmp_path / "nowhere", "--data.download", "false", "-e", tmp_path / "run")
    finished = run_on_two_ranks(*argv, *ARGV)
    assert finished.returncode == 1
    assert finished.stderr.count("error: MNIST is not in") == 1
    assert "[rank" not in finished.stderr  # torchrun's prefix of a rank's traceback
    assert not (tmp_path / "run").exists()
