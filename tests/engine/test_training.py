"""Full runs of the program on the shipped configs, shortened by overrides."""

import json
import math
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine import ConfigError, load_config, train
from engine.devices.memory import peak_memory
from engine.optim.optimizer import _classes_of_timm, _of_torch
from engine.run.checkpoint import read_checkpoint
from engine.run.folder import RunFolder, committed_checkpoints
from engine.state import _numbers
from engine.tasks.classification import Classification
from engine.update import Update
from tests.faults.children import AtStep
from tests.running import (
    ROOT,
    assert_same_weights,
    metrics,
    results,
    run_command,
    run_main,
    untimed,
    weights,
)

SHORT = (
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
CLASSES = [cls.__name__ for cls in (*_of_torch().values(), *_classes_of_timm().values())]
WITH_RANDOMNESS = (*SHORT, "--model.pdrop", 0.3, "--train.optim.lr", 0.05)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run, used as the reference."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert run_main("-e", path, *WITH_RANDOMNESS) == 0
    return path


def test_run_folder_is_complete(whole_run):
    names = {str(path.relative_to(whole_run)) for path in whole_run.rglob("*") if path.is_file()}
    expected = {
        "config.yaml",
        "environment.json",
        "output.log",
        "metrics.jsonl",
        "results.json",
        "figures/curves.png",
        "figures/predictions.png",
    }
    assert expected <= names
    assert {f"ckpt/step-000060/{name}" for name in ("model.safetensors", "train_state.pt", "manifest.json")} <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert [name for name in names if "/." in name or name.startswith(".")] == [".lock"]
    assert (whole_run / "ckpt" / "latest").readlink().name == "step-000060"
    assert (whole_run / "ckpt" / "best").readlink().name == f"step-{results(whole_run)['best']['step']:06d}"


def test_results_contain_status_metrics_and_cost(whole_run):
    result, lines = results(whole_run), metrics(whole_run)
    evaluated = {line["step"]: line for line in lines if "valid/acc@1" in line}
    assert result["status"] == "completed"
    assert result["best"]["valid/acc@1"] == max(line["valid/acc@1"] for line in evaluated.values())
    assert result["last"]["valid/acc@1"] == evaluated[60]["valid/acc@1"]
    assert result["monitor"] == "acc@1"
    assert 100 < result["peak_memory_mb"] <= peak_memory(torch.device("cpu"))
    assert result["params"] == 61706
    assert result["macs"] == pytest.approx(416520, rel=0.01)  # 28*28*6*25 + 10*10*16*150 + 400*120 + 120*84 + 84*10


def test_peak_memory_includes_freed_memory():
    tensor = "torch.ones(2**26, dtype=torch.uint8)"
    program = (
        f"import torch; from engine.devices.memory import peak_memory as p; d = torch.device('cpu'); a = p(d); {tensor}; b = p(d)"
    )
    finished = run_command("python", "-c", f"{program}; torch.ones(1); print(b - a, p(d) - b)")
    rise, more = map(float, finished.stdout.split())
    assert rise == pytest.approx(64, abs=4)
    assert more < 4


def test_metrics_are_logged_once_with_the_documented_tags(whole_run):
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    for line in lines:
        assert {"train/loss", "train/acc@1", "train/lr", "train/images_per_sec", "train/grad_norm"} <= line.keys()
        assert ("valid/acc@1" in line) == (line["step"] % 20 == 0)
        assert 0 <= line["train/acc@1"] <= 1
    assert lines[-1]["valid/count"] == 360


def test_tensorboard_has_scalars_images_and_hyperparameters(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole_run / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"train/loss", "valid/acc@1", "train/lr", "hparam/acc@1"} <= set(tags["scalars"])
    assert tags["images"] == ["train/images"]
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30, 40, 50, 60]


def test_environment_file_records_world_size_and_packages(whole_run):
    environment = json.loads((whole_run / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]


def test_config_of_a_run_reproduces_it(whole_run, tmp_path):
    assert run_main("-c", whole_run / "config.yaml", "-e", tmp_path / "again") == 0
    assert_same_weights(weights(whole_run), weights(tmp_path / "again"))
    assert untimed(metrics(whole_run)) == untimed(metrics(tmp_path / "again"))


def test_another_seed_gives_different_weights(whole_run, tmp_path):
    assert run_main("-c", whole_run / "config.yaml", "-e", tmp_path / "other", "--seed", 5) == 0
    assert not torch.equal(weights(whole_run)["fc3.weight"], weights(tmp_path / "other")["fc3.weight"])


def interrupt(run_dir, *argv, after_step, signum):
    """Start the program and send it a signal once it has logged step `after_step`."""
    process = subprocess.Popen(
        [sys.executable, "main.py", "-e", run_dir, *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if f"step {after_step}/" in line:
            process.send_signal(signum)
            break
    process.stdout.read()
    return process.wait(timeout=120)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_a_checkpoint_and_resume_is_bit_exact(whole_run, tmp_path, signum, code):
    run = tmp_path / "run"
    assert interrupt(run, *WITH_RANDOMNESS, "--train.num_threads", 1, after_step=30, signum=signum) == code
    stopped = results(run)
    assert stopped["status"] == "interrupted"
    assert 30 <= stopped["step"] < 60
    assert (run / "ckpt" / "latest").readlink().name == f"step-{stopped['step']:06d}"
    assert run_main("-e", run, "-r", "latest", "--train.num_threads", 1) == 0
    assert_same_weights(weights(whole_run), weights(run))
    assert untimed(metrics(whole_run)) == untimed(metrics(run))
    assert results(run)["status"] == "completed"


def test_metrics_after_the_last_checkpoint_are_not_logged_twice(whole_run, tmp_path):
    run = tmp_path / "run"
    assert run_main("-e", run, *WITH_RANDOMNESS) == 0
    for step in ("step-000060", "step-000040"):  # as if it had been killed before these were committed
        for file in (run / "ckpt" / step).iterdir():
            file.unlink()
        (run / "ckpt" / step).rmdir()
    assert run_main("-e", run, "-r", "latest") == 0
    assert untimed(metrics(run)) == untimed(metrics(whole_run))
    assert_same_weights(weights(whole_run), weights(run))


def test_resume_with_mixing_and_cutout_is_bit_exact(tmp_path):
    mixed = ("--augment.mixup", 0.8, "--augment.cutmix", 1.0, "--augment.cutout", 8, "--augment.hflip", "alternating")
    mixed += ("--augment.color_jitter", 0.2)
    argv = (*WITH_RANDOMNESS, *mixed, "--train.label_smoothing", 0.1, "--train.keep_last", 3)
    assert run_main("-e", tmp_path / "whole", *argv) == 0
    assert run_main("-e", tmp_path / "resumed", *argv) == 0
    assert run_main("-r", tmp_path / "resumed" / "ckpt" / "step-000020") == 0
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))
    assert untimed(metrics(tmp_path / "whole")) == untimed(metrics(tmp_path / "resumed"))


def test_run_with_a_t_max_warning_can_be_resumed(tmp_path, capsys):
    config, run = tmp_path / "twenty.yaml", tmp_path / "run"
    lines = "data: {name: digits, img_size: 28}", "model: {name: lenet}", "train: {n_steps: 20, batch_size: 64, save_freq: 10}"
    config.write_text("\n".join(lines))
    assert run_main("-c", config, "-e", run, "--train.sched.t_max", 100) == 0
    before = weights(run)
    capsys.readouterr()
    assert run_main("-r", run / "ckpt" / "step-000010") == 0
    assert "train.sched.t_max 100" in capsys.readouterr().out
    assert_same_weights(before, weights(run))


def test_resuming_a_complete_run_restores_missing_files(whole_run, tmp_path):
    run = tmp_path / "run"
    assert run_main("-e", run, *SHORT) == 0
    (run / "results.json").unlink()
    (run / "figures" / "curves.png").unlink()
    before = weights(run)
    assert run_main("-e", run, "-r", "latest") == 0
    assert results(run)["status"] == "completed"
    assert (run / "figures" / "curves.png").is_file()
    assert_same_weights(before, weights(run))


class TestResume:
    def test_auto_starts_a_run_and_then_resumes_it(self, tmp_path, capsys):
        argv = ("-e", tmp_path / "run", "-r", "auto", *SHORT)
        assert run_main(*argv) == 0
        assert "training: lenet" in capsys.readouterr().out
        assert run_main(*argv, "--train.n_steps", 70) == 0
        assert "resuming at step 60" in capsys.readouterr().out

    @pytest.mark.parametrize(("length", "key"), [(("--train.n_steps", 5), "n_steps"), (("--train.n_epochs", 1), "n_epochs")])
    def test_a_finished_run_keeps_its_files_and_says_how_to_continue_it(self, tmp_path, capsys, length, key):
        run = tmp_path / "run"
        assert run_main("-e", run, "--train.batch_size", 256, *length) == 0
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "output.log"}
        assert results(run)["images_per_sec"]
        assert results(run)["peak_memory_mb"]
        capsys.readouterr()
        assert run_main("-e", run, "-r", "latest") == 0
        assert f"nothing left to do: {run} is complete at step 5; --train.{key} N continues it" in capsys.readouterr().out
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "output.log"}

    def test_a_run_that_its_patience_ended_names_the_patience(self, tmp_path, capsys):
        run = tmp_path / "run"
        argv = (
            "--train.n_steps",
            90,
            "--train.eval_freq",
            5,
            "--train.patience",
            1,
            "--train.optim.lr",
            1e-9,
            "--train.save_freq",
            5,
        )
        assert run_main("-e", run, *argv) == 0
        assert results(run)["step"] < 90
        capsys.readouterr()
        assert run_main("-e", run, "-r", "latest") == 0
        assert "--train.patience N continues it" in capsys.readouterr().out

    def test_an_edited_config_is_compared_with_that_of_the_checkpoint(self, tmp_path, capsys):
        run = tmp_path / "run"
        assert run_main("-e", run, *SHORT) == 0
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("lr: 0.01\n", "lr: 0.5\n"))
        capsys.readouterr()
        assert run_main("-e", run, "-r", "latest", "--train.n_steps", 61) == 0
        output = capsys.readouterr().out
        assert "train.optim.lr is now 0.5, was 0.01; from here on the run is not bit-exact" in output
        assert output.count(" is now ") == 2  # and n_steps

    def test_path_of_a_run_or_a_checkpoint_is_sufficient(self, tmp_path, capsys):
        assert run_main("-e", tmp_path / "run", *SHORT) == 0
        assert run_main("-r", tmp_path / "run", "--train.n_steps", 70) == 0
        assert "resuming at step 60" in capsys.readouterr().out
        assert run_main("-r", tmp_path / "run" / "ckpt" / "step-000040") == 0
        assert "resuming at step 40" in capsys.readouterr().out

    def test_best_sets_aside_later_checkpoints(self, tmp_path, capsys):
        run = tmp_path / "run"
        assert run_main("-e", run, *SHORT) == 0
        state = torch.load(run / "ckpt" / "step-000040" / "train_state.pt", weights_only=True)
        (run / "ckpt" / "best").unlink()
        (run / "ckpt" / "best").symlink_to("step-000040")
        assert run_main("-e", run, "-r", "best") == 0
        assert "resuming at step 40" in capsys.readouterr().out
        assert state["step"] == 40
        assert (run / "ckpt" / "set-aside" / "step-000060-0" / "manifest.json").is_file()
        assert [line["step"] for line in metrics(run)] == [10, 20, 30, 40, 50, 60]

    def test_change_that_ends_bit_exactness_is_logged(self, tmp_path, capsys):
        run = tmp_path / "run"
        assert run_main("-e", run, *SHORT) == 0
        assert run_main("-e", run, "-r", "latest", "--train.n_steps", 80, "--train.optim.lr", 0.02, "--train.print_freq", 5) == 0
        output = capsys.readouterr().out
        assert "train.optim.lr is now 0.02, was 0.01; from here on the run is not bit-exact" in output
        assert "train.print_freq is now 5, was 10\n" in output
        rate = next(line["train/lr"] for line in metrics(run) if line["step"] == 65)
        assert rate == pytest.approx(0.02 * (1 + math.cos(math.pi * 64 / 80)) / 2)

    @pytest.mark.parametrize(
        ("argv", "code", "message"),
        [
            (("-r", "latest"), 2, "needs -e"),
            (("-r", "latest", "-e", "nowhere"), 2, "has no run to resume"),
            (("-r", "nowhere"), 2, "no such run"),
        ],
    )
    def test_nothing_to_resume_is_an_error(self, argv, code, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert run_main(*argv) == code
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_no_valid_checkpoint_is_an_error_and_never_restarts_the_run(self, tmp_path, capsys):
        run = tmp_path / "run"
        assert run_main("-e", run, *SHORT) == 0
        for file in run.glob("ckpt/step-*/model.safetensors"):
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        for resume in ("latest", "auto"):
            assert run_main("-e", run, "-r", resume) == 1
            assert "no valid checkpoint" in capsys.readouterr().err

    def test_damaged_checkpoint_is_reported_and_the_previous_one_is_used(self, tmp_path, capsys):
        run = tmp_path / "run"
        assert run_main("-e", run, *SHORT) == 0
        damaged = run / "ckpt" / "step-000060" / "train_state.pt"
        damaged.write_bytes(b"")
        assert run_main("-e", run, "-r", "latest") == 0
        output = capsys.readouterr().out
        assert str(damaged) in output
        assert "resuming at step 40" in output


def test_micro_batches_match_whole_batches(tmp_path):
    for name, size in (("whole", 0), ("parts", 24)):  # 64 = 24 + 24 + 16
        assert run_main("-e", tmp_path / name, *SHORT, "--train.micro_batch_size", size, "--train.n_steps", 20) == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-5, rtol=1e-5)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)


def test_n_epochs_on_the_command_line_is_sufficient(tmp_path, data_root, capsys):
    argv = ("-c", "configs/resnet18_cifar10.yaml", "--train.n_epochs", 3, "--train.batch_size", 16, "--data.verify", "false")
    assert run_main(*argv, "--data.dataroot", data_root / "CIFAR-10", "--model.layers", "[1,1,1,1]", "-e", tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split(" | ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all("train loss" in line and "valid loss" in line and "acc@1" in line and "images/s" in line for line in lines)


def test_valid_ratio_selects_the_best_on_training_samples_and_tests_once(tmp_path, capsys):
    run = tmp_path / "run"
    assert run_main("-e", run, *SHORT, "--data.valid_ratio", 0.1) == 0
    assert "validation uses 144 of the 1437 training samples" in capsys.readouterr().out
    lines = metrics(run)
    assert [line["valid/count"] for line in lines if "valid/count" in line] == [144] * 3
    assert [line["test/count"] for line in lines if "test/count" in line] == [360]
    assert results(run)["test"]["test/acc@1"] == lines[-1]["test/acc@1"]


def test_bf16_trains(tmp_path):
    assert (
        run_main(
            "-e",
            tmp_path / "run",
            "--train.n_epochs",
            12,
            "--train.precision",
            "bf16",
            "--train.optim.type",
            "Adam",
            "--train.optim.lr",
            0.003,
        )
        == 0
    )
    assert results(tmp_path / "run")["best"]["valid/acc@1"] > 0.9
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())


@pytest.mark.slow
def test_adam_from_the_command_line_reaches_95_percent(tmp_path):
    argv = ("--train.optim.type", "Adam", "--train.n_epochs", 20, "-e", tmp_path / "run")
    assert run_main("-c", "configs/lenet_digits.yaml", *argv) == 0
    assert results(tmp_path / "run")["best"]["valid/acc@1"] > 0.95


@pytest.mark.slow
def test_digits_reach_98_percent(tmp_path):
    assert run_main("-c", "configs/lenet_digits.yaml", "-e", tmp_path / "run") == 0
    assert results(tmp_path / "run")["last"]["valid/acc@1"] >= 0.98


def test_compiled_model_saves_plain_weight_names(tmp_path):
    run = tmp_path / "run"
    assert run_main("-e", run, *SHORT, "--train.n_steps", 4, "--train.compile", "true") == 0
    assert sorted(weights(run))[0] == "conv1.bias"


def test_any_timm_model_trains(tmp_path, data_root):
    argv = ("--model.name", "timm/test_resnet", "--data.name", "MNIST", "--data.img_size", 32, "--data.verify", "false")
    assert (
        run_main(
            "-c",
            "configs/lenet_digits.yaml",
            *argv,
            "--data.dataroot",
            data_root / "MNIST",
            "--train.n_epochs",
            1,
            "-e",
            tmp_path / "run",
        )
        == 0
    )
    assert results(tmp_path / "run")["status"] == "completed"


@pytest.mark.parametrize("save_freq", [1, 30])  # detected from the weights or from the loss
def test_diverging_run_stops_and_no_checkpoint_contains_nan(tmp_path, capsys, save_freq):
    run = tmp_path / "run"
    assert run_main("-e", run, *SHORT, "--train.optim.lr", 1e6, "--train.print_freq", 5, "--train.save_freq", save_freq) == 1
    assert "the training diverged" in capsys.readouterr().err
    assert results(run)["status"] == "failed"
    assert "diverged" in results(run)["why"]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is not valid JSON
    for file in run.glob("ckpt/step-*/model.safetensors"):
        assert all(bool(value.isfinite().all()) for value in weights(run, file.parent.name).values())


# Kron is tested in test_optimizer.py: without the package opt_einsum it takes 20 GB for a convolution of LeNet
OTHERS = [name for name in CLASSES if name != "Kron"]
ABSORBING = ("Adopt", "Lion", "Rprop")  # take a NaN into their state, and keep the weights finite for a step or more


@pytest.mark.parametrize(
    "optimizer",
    [name if name in ABSORBING else pytest.param(name, marks=pytest.mark.slow) for name in dict.fromkeys((*ABSORBING, *OTHERS))],
)
def test_after_a_nan_batch_every_checkpoint_is_finite_and_resumable(optimizer, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    argv = ("--train.n_steps", 8, "--train.batch_size", 16, "--train.save_freq", 1, "--train.keep_last", 20)
    argv += ("--train.print_freq", 100, "--train.eval_freq", 100, "--train.ema", 0.9, "--train.optim.lr", 1e-3)
    with monkeypatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(Update, "__call__", Update.__call__)
        AtStep(3, "nan")(run)
        assert run_main("-e", run, *argv, "--train.optim.type", optimizer) == 1
    assert "the training diverged at step" in capsys.readouterr().err
    checkpoints = committed_checkpoints(run)
    assert [path.name for path in checkpoints] == ["step-000001", "step-000002", "step-000003"]
    for path in checkpoints:
        checkpoint = read_checkpoint(path)
        values = (checkpoint.weights, checkpoint.ema_weights, checkpoint.train_state["optimizer"])
        assert all(bool(number.isfinite().all()) for value in values for number in _numbers(value))
    with torch.compiler.set_stance("force_eager"):
        assert run_main("-r", run) == 0
    assert results(run)["step"] == 8


def test_custom_model_and_task_replace_those_of_the_config(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 10))
    config = load_config(None, {"train.n_steps": 20, "train.optim.lr": 0.05})

    class Careful(Classification):
        def loss_sum(self, model, batch):
            loss, sums = super().loss_sum(model, batch)
            return 2 * loss, {**sums, "loss": 2 * loss, "care": loss.detach()}

    result = train(config, exp_dir=tmp_path / "run", model=model, task=Careful([str(i) for i in range(10)]))
    assert result.status == "completed"
    assert weights(tmp_path / "run").keys() == {"1.weight", "1.bias"}
    line = next(line for line in metrics(tmp_path / "run") if "train/care" in line)
    assert line["train/loss"] == pytest.approx(2 * line["train/care"])


def test_dry_run_leaves_no_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run_main("--dry_run") == 0
    assert "dry run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


class TestBadInput:
    """Exit code 2 or 1, a one-line error with a remedy, no traceback and no partial run directory."""

    @pytest.mark.parametrize(
        ("argv", "code", "message"),
        [
            (("--train.optm.lr", 1), 2, "did you mean train.optim?"),
            (("--train.n_steps", "many"), 2, "train.n_steps"),
            (("--confg", "x"), 2, "did you mean --config?"),
            (("-c", "nowhere.yaml"), 2, "no such config"),
            (("--model.name", "lenett"), 2, "did you mean lenet"),
            (("--model.name", "timm/resnet1888"), 2, "unknown model"),
            (("--model.pdrp", 0.1), 2, "did you mean model.pdrop?"),
            (("--model.pdrop", "much"), 2, "expected a number"),
            (("--model.n_classes", 10), 2, "no such argument"),
            (("--data.name", "digit"), 2, "did you mean digits?"),
            (("--data.n_classes", 7), 2, "has 10 classes"),
            (("--data.im_size", 28), 2, "did you mean data.img_size?"),
            (("--data.img_size", 16), 2, "28x28"),
            (("--train.optim.type", "Adm"), 2, "did you mean Adam?"),
            (("--train.optim.betaz", "[0.9,0.99]"), 2, "did you mean train.optim.betas?"),
            (("--train.optim.typ", "Adam"), 2, "did you mean train.optim.type?"),
            (("--train.optim.type", "LBFGS"), 2, "LBFGS can't run in this loop"),
            (("--train.batch_size", 5000), 2, "1437 training samples"),
            (("--train.precision", "fp16"), 2, "train.precision: precision fp16 needs a GPU"),
            (("--train.precision", "tf32"), 2, "needs an NVIDIA GPU"),
            (("--model.pretrained", "nowhere.pth"), 1, "no such file"),
            (("--data.name", "imagefolder", "--model.name", "resnet18", "--data.dataroot", "nowhere"), 1, "no such folder"),
            (
                ("--data.name", "CIFAR-10", "--model.name", "resnet18", "--data.dataroot", "nowhere"),
                1,
                "nowhere/cifar-10-batches-py",
            ),
            (("--data.name", "MNIST", "--data.dataroot", "nowhere", "--data.download", "false"), 1, "nowhere/MNIST/raw"),
        ],
    )
    def test_is_a_one_line_error_with_a_remedy_and_leaves_no_directory(self, argv, code, message, tmp_path, monkeypatch, capsys):
        if code == 2 or argv[0] != "--data.name":
            argv = (*argv, "--data.download", "false")
        else:
            monkeypatch.setattr("datasets.pipeline.downloads.TIMEOUT", 0.5)
        monkeypatch.chdir(tmp_path)
        assert run_main(*argv, "-e", "made/here") == code
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
        assert not list(tmp_path.iterdir())

    def test_directory_with_a_run_is_an_error(self, whole_run, capsys):
        before = (whole_run / "output.log").read_text()
        assert run_main("-e", whole_run) == 2
        assert "already has a run" in capsys.readouterr().err
        assert (whole_run / "output.log").read_text() == before

    def test_path_that_cannot_be_a_directory_is_an_error(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert run_main("-e", tmp_path / "file" / "run") == 1
        assert "can't be made" in capsys.readouterr().err
        assert run_main("-e", tmp_path / "file") == 2
        assert "is a file" in capsys.readouterr().err

    def test_directory_in_use_is_an_error(self, tmp_path):
        first = RunFolder.start(tmp_path / "run")
        script = f"from engine.run.folder import RunFolder; RunFolder.start({str(tmp_path / 'run')!r})"
        second = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert "is in use by another process" in second.stderr
        first.close()

    def test_bug_keeps_its_traceback(self, tmp_path):
        class Broken(torch.nn.Linear):
            def forward(self, x):
                raise ZeroDivisionError("a bug")

        with pytest.raises(ZeroDivisionError):
            train(load_config(None, {"train.n_steps": 2}), exp_dir=tmp_path / "run", model=Broken(2, 2))
        assert "Traceback" in (tmp_path / "run" / "output.log").read_text()
        assert results(tmp_path / "run")["status"] == "failed"


def test_concurrent_runs_get_separate_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(20) as pool:
        folders = list(pool.map(lambda _: RunFolder.start(None), range(20)))
    assert len({folder.path for folder in folders}) == 20
    assert all(folder.path.parent.name == "runs" and folder.path.name.startswith("exp-") for folder in folders)


def test_batch_size_zero_is_an_error():
    with pytest.raises(ConfigError, match="must be at least 1"):
        load_config(None, {"train.batch_size": 0})


def test_wall_time_accumulates_over_a_resume(tmp_path):
    run = tmp_path / "run"
    assert run_main("-e", run, *SHORT) == 0
    first = results(run)["wall_time"]
    time.sleep(0.2)
    assert run_main("-e", run, "-r", "latest", "--train.n_steps", 80) == 0
    assert results(run)["wall_time"] > first
