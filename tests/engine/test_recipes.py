"""The effect of each recipe key."""

import copy
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch._inductor.config as inductor
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import nn
from torch._inductor import cpu_vec_isa

from engine import build as builder
from engine import load_config
from engine.config.errors import RunError
from engine.devices.accelerator import make_accelerator
from engine.inference.trained import load_trained
from engine.train import train_batches
from tests.on_disk import write_image_folder
from tests.running import ROOT, assert_same_weights, metrics, results, run_command, run_main, untimed, weights

SMALL = ("--train.batch_size", 64, "--train.num_threads", 1, "--train.print_freq", 4, "--train.eval_freq", 8)


def build_run(*overrides):
    config = load_config(None, [f"--{name}={value}" for name, value in overrides])
    return builder.build(config, make_accelerator(config.train, deterministic=config.deterministic))


def test_run_holds_its_training_images_once():
    run = build_run(("augment.crop_padding", 2))
    split, cut = run.data.splits["train"], run.train_loader.cut
    assert split.images.untyped_storage().data_ptr() == cut.memory.untyped_storage().data_ptr()
    assert split.images.shape == (1437, 1, 8, 8)


def test_ema_weights_follow_the_closed_form():
    run = build_run(("train.n_steps", 6), ("train.batch_size", 64), ("train.ema", 0.9), ("train.ema_warmup", "false"))
    history = []
    for batch in train_batches(run, 0):
        run.update(run.state, batch, measure=False)
        history.append(copy.deepcopy(run.model.state_dict()))
    averaged = run.state.ema.module.state_dict()
    # timm copies the weights after the first update and averages from then on
    for name in averaged:
        expected = 0.9**5 * history[0][name] + sum(0.1 * 0.9 ** (5 - k) * history[k][name] for k in range(1, 6))
        torch.testing.assert_close(averaged[name], expected)


def test_average_last_is_the_mean_of_the_weights_of_the_last_part():
    run = build_run(("train.n_steps", 8), ("train.batch_size", 64), ("train.average_last", 0.5))
    history = []
    for batch in train_batches(run, 0):
        run.update(run.state, batch, measure=False)
        history.append(copy.deepcopy(run.model.state_dict()))
    for name, averaged in run.state.ema.module.state_dict().items():
        torch.testing.assert_close(averaged, torch.stack([weights[name] for weights in history[4:]]).mean(0))


def test_ema_is_evaluated_and_saved_and_resumes_bit_exactly(tmp_path):
    argv = (*SMALL, "--train.n_steps", 24, "--train.save_freq", 8, "--train.ema", 0.99, "--model.pdrop", 0.2)
    assert run_main("-e", tmp_path / "whole", *argv) == 0
    assert run_main("-e", tmp_path / "cut", *argv) == 0
    assert run_main("-r", tmp_path / "cut" / "ckpt" / "step-000008") == 0
    for run in ("whole", "cut"):
        assert all(("valid_ema/acc@1" in line) == ("valid/acc@1" in line) for line in metrics(tmp_path / run))
    assert untimed(metrics(tmp_path / "whole")) == untimed(metrics(tmp_path / "cut"))
    files = [load_file(tmp_path / run / "ckpt" / "latest" / "model_ema.safetensors") for run in ("whole", "cut")]
    assert_same_weights(*files)
    assert not torch.equal(files[0]["conv1.weight"], weights(tmp_path / "whole")["conv1.weight"])
    trained = load_trained(tmp_path / "whole" / "ckpt" / "latest", {}, averaged=True)
    assert trained.evaluate("valid")["acc@1"] == metrics(tmp_path / "whole")[-1]["valid_ema/acc@1"]


def test_balanced_sampling_resumes_bit_exactly_and_the_log_names_the_rarest_class(tmp_path, capsys):
    write_image_folder(tmp_path / "data")
    rare = sorted((tmp_path / "data" / "train").iterdir())[1]
    for path in sorted(rare.iterdir())[1:]:
        path.unlink()
    argv = ("--train.num_threads", 1, "--data.name", "imagefolder", "--data.dataroot", tmp_path / "data", "--data.img_size", 28)
    argv += ("--data.sampler", "balanced", "--train.class_weights", "balanced", "--train.loss", "focal", "--train.batch_size", 4)
    argv += ("--train.n_steps", 12, "--train.save_freq", 4, "--train.optim.lr", 0.01, "--dataloader.num_workers", 0)
    assert run_main("-e", tmp_path / "whole", *argv) == 0
    assert f"training images per class: from 1 ({rare.name})" in capsys.readouterr().out
    assert run_main("-e", tmp_path / "cut", *argv) == 0
    assert run_main("-r", tmp_path / "cut" / "ckpt" / "step-000004") == 0
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize("micro_batch_size", [0, 24])
def test_gradients_are_clipped_by_the_norm_over_all_micro_batches(micro_batch_size):
    options = (("train.n_steps", 2), ("train.batch_size", 64), ("train.micro_batch_size", micro_batch_size))
    plain = ("train.optim.momentum", 0), ("train.optim.weight_decay", 0), ("train.sched.type", "constant")
    plain += (("train.sched.warmup_epochs", 0), ("train.optim.lr", 1.0))
    run = build_run(*options, *plain, ("train.clip_grad_norm", 0.01))
    before = [p.detach().clone() for p in run.model.parameters()]
    run.update(run.state, next(train_batches(run, 0)), measure=True)
    step = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, run.model.parameters(), strict=True)])
    assert step.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert run.state.window["grad_norm"] > 0.02  # the norm before clipping is logged


def test_gradients_are_clipped_by_value():
    options = ("train.n_steps", 2), ("train.optim.momentum", 0), ("train.optim.weight_decay", 0), ("train.optim.lr", 1.0)
    run = build_run(*options, ("train.sched.type", "constant"), ("train.sched.warmup_epochs", 0), ("train.clip_grad_value", 1e-4))
    before = [p.detach().clone() for p in run.model.parameters()]
    run.update(run.state, next(train_batches(run, 0)), measure=False)
    steps = [(b - p.detach()).abs().max().item() for b, p in zip(before, run.model.parameters(), strict=True)]
    assert max(steps) == pytest.approx(1e-4, rel=1e-2)


def test_dropout_and_drop_path_are_passed_to_the_model():
    run = build_run(*SHAPES, ("train.n_steps", 1), ("model.pdrop", 0.25), ("model.drop_path", 0.3))
    rates = [module.p for module in run.model.modules() if type(module).__name__ == "StochasticDepth"]
    assert rates == pytest.approx([0.3 * i / 7 for i in range(8)])
    assert run.model.dropout.p == 0.25
    run = build_run(*SHAPES, ("train.n_steps", 1), ("model.name", "timm/test_resnet"), ("model.drop_path_rate", 0.3))
    assert max(getattr(module, "drop_prob", 0.0) or 0.0 for module in run.model.modules()) == pytest.approx(0.3)


def test_compile_mode_is_passed_to_the_compiler(monkeypatch, caplog):
    compile_options = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_options.append(options) or model)
    build_run(("train.n_steps", 1), ("train.compile", "true"), ("train.compile_mode", "max-autotune"))
    assert compile_options == [{"mode": "max-autotune", "dynamic": False}]
    assert "max-autotune chooses kernels by their speed" in caplog.text


@pytest.mark.parametrize(("chosen", "kept"), [(None, True), (False, False)])  # TORCHINDUCTOR_VEC_ISA_OK
def test_headers_are_not_compiled_to_try_vector_instructions(chosen, kept, monkeypatch):
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", mock.Mock(side_effect=AssertionError))
    with inductor.patch({"cpp.vec_isa_ok": chosen}):
        build_run(("train.n_steps", 1), ("train.compile", "true"))
        assert inductor.cpp.vec_isa_ok is kept
        assert bool(cpu_vec_isa.VecAVX2()) is kept


GROWING = ("--model.name", "timm/test_resnet", "--data.name", "shapes", "--data.img_size", 32, "--data.n_train", 48)
GROWING += ("--data.n_test", 16, "--train.eval_freq", 99, "--train.batch_size", 24, "--train.num_threads", 1)
GROWING += ("--train.optim.lr", 0.01, "--augment.resize_from", 16)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_each_image_size_and_micro_batch_has_its_own_compiled_graph(monkeypatch):
    graphs, compile_model = [], torch.compile

    def record(graph, inputs):
        graphs.append(next(tuple(value.shape) for value in inputs if value.ndim == 4 and value.shape[-1] > 1))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, mode, **options: compile_model(model, backend=record, **options))
    argv = (
        *GROWING,
        "--augment.resize_step",
        2,
        "--train.n_epochs",
        9,
        "--train.micro_batch_size",
        16,
        "--train.compile",
        "true",
    )
    config = load_config(None, [str(word) for word in argv])
    run = builder.build(config, make_accelerator(config.train, deterministic=True), model=Tiny())
    for batch in train_batches(run, 0):
        run.update(run.state, batch, measure=False)
    sizes = [run.train_loader.size(epoch) for epoch in range(9)]
    assert sorted(graphs) == sorted((n, 3, size, size) for size in set(sizes) for n in (8, 16))
    assert len(graphs) > 8  # torch's limit


@pytest.mark.slow
def test_a_compiled_run_with_growing_images_resumes_bit_exactly(tmp_path):
    argv = (*GROWING, "--augment.resize_step", 8, "--train.n_epochs", 4, "--train.save_freq", 1, "--train.keep_last", 9)
    whole, eager = tmp_path / "whole", tmp_path / "eager"
    assert run_main("-e", whole, *argv, "--train.compile", "true") == 0
    assert run_main("-e", eager, *argv) == 0
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(whole)[name], value, rtol=1e-3, atol=1e-4)
    for step in (3, 5, 7):  # at images of 16, 24 and 32 pixels
        resumed = tmp_path / f"from-{step}"
        shutil.copytree(whole, resumed, symlinks=True)
        ended = run_command("python", "main.py", "-r", resumed / "ckpt" / f"step-{step:06d}")  # with nothing compiled yet
        assert ended.returncode == 0, ended.stderr
        assert_same_weights(weights(whole), weights(resumed))


def test_mixing_stops_after_mix_epochs():
    run = build_run(("train.n_epochs", 3), ("train.batch_size", 512), ("augment.mixup", 0.8), ("augment.mix_epochs", 2))
    assert [batch[1].ndim for batch in train_batches(run, 0)] == [2, 2, 2, 2, 1, 1]


def test_channels_last_changes_only_the_memory_layout():
    names = ("data.name", "shapes"), ("data.n_train", 64), ("data.n_test", 64), ("model.name", "resnet18"), ("train.n_steps", 1)
    plain, last = (build_run(*names, ("train.batch_size", 16), ("train.channels_last", value)) for value in ("false", "true"))
    assert last.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    batch = next(train_batches(plain, 0))
    with torch.no_grad():
        torch.testing.assert_close(last.model.eval()(batch[0]), plain.model.eval()(batch[0]), rtol=1e-3, atol=1e-3)


def test_early_stopping_ends_the_run_and_a_resume_does_not_continue_it(tmp_path, capsys):
    argv = (*SMALL, "--train.n_steps", 200, "--train.optim.lr", 1e-9, "--train.patience", 3)
    assert run_main("-e", tmp_path / "run", *argv) == 0
    result = results(tmp_path / "run")
    assert result["status"] == "completed"
    assert result["step"] == result["best"]["step"] + 3 * 8 < 200
    assert "3 evaluations without a better one" in capsys.readouterr().out
    assert run_main("-e", tmp_path / "run", "-r", "latest") == 0
    assert results(tmp_path / "run")["step"] == result["step"]


def test_eval_first_evaluates_before_the_first_step(tmp_path):
    argv = (*SMALL, "--train.n_steps", 8, "--train.eval_first", "true")
    assert run_main("-e", tmp_path / "run", *argv) == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert "valid/acc@1" in lines[0]
    assert run_main("-r", tmp_path / "run" / "ckpt" / "step-000000") == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 4, 8]


def test_time_limit_saves_and_ends_and_the_run_can_be_resumed(tmp_path, capsys):
    argv = (*SMALL, "--train.n_steps", 100_000, "--train.time_limit", 0.02, "--train.save_freq", 100_000)
    assert run_main("-e", tmp_path / "run", *argv) == 143
    step = results(tmp_path / "run")["step"]
    assert 0 < step < 100_000
    assert run_main("-e", tmp_path / "run", "-r", "latest") == 143
    assert results(tmp_path / "run")["step"] > step


def test_aux_weight_without_auxiliary_heads_and_padding_mode_without_padding_are_warnings(tmp_path):
    argv = (*SMALL, "--train.n_steps", 1, "--train.aux_weight", 0.5, "--augment.padding_mode", "reflect")
    argv += ("--augment.crop_padding", 0)
    assert run_main("-e", tmp_path / "run", *argv) == 0
    log = (tmp_path / "run" / "output.log").read_text()
    assert "train.aux_weight has no effect on lenet, which has no auxiliary head" in log
    assert "augment.padding_mode (--augment.padding_mode) has no effect with augment.crop_padding 0" in log


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (("--train.ema", 0.9, "--train.average_last", 0.5), ["train.ema: 0.9", "train.average_last 0.5"]),
        (("--train.ema", 1.5), ["train.ema", "below 1"]),
        (("--train.clip_grad_norm", 0), ["train.clip_grad_norm", "above 0"]),
        (("--train.freeze", "[nothing_here]"), ["train.freeze", "nothing_here"]),
        (("--train.class_weights", "balanced", "--train.loss", "bce"), ["train.class_weights", "train.loss", "bce"]),
        (("--train.class_weights", "[1, 2]"), ["train.class_weights", "2 numbers for 10 classes"]),
        (("--train.class_weights", "[1, -2]"), ["train.class_weights", "from 0 on"]),
        (("--train.class_weights", "even"), ["train.class_weights", "balanced"]),
    ],
)
def test_invalid_value_is_a_one_line_error(tmp_path, argv, fragments, capsys):
    assert run_main("-e", tmp_path / "run", *argv) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (("--augment.mix_epochs", 2), "augment.mix_epochs"),
        (("--train.ema_warmup", "false"), "train.ema_warmup"),
        (("--train.focal_gamma", 1), "train.focal_gamma"),
    ],
)
def test_option_without_effect_is_a_warning(argv, key, tmp_path, capsys):
    assert run_main("--dry_run", *argv) == 0
    assert f"warning: {key} (--{key}) has no effect" in capsys.readouterr().out


class TestNonFiniteGradients:
    def inject_nan(self, monkeypatch, *steps):
        from engine.update import Update

        update = Update.__call__

        def update_with_nan(this, state, batch, **kwargs):
            images = batch[0] * float("nan") if state.step in steps else batch[0]
            update(this, state, (images, *batch[1:]), **kwargs)

        monkeypatch.setattr(Update, "__call__", update_with_nan)

    def test_updates_are_skipped_and_leave_no_trace(self, tmp_path, monkeypatch, capsys):
        self.inject_nan(monkeypatch, 5, 6, 11)
        argv = (
            "--data.name",
            "shapes",
            "--data.n_train",
            64,
            "--data.n_test",
            32,
            "--train.batch_size",
            8,
            "--train.n_steps",
            12,
        )
        argv += ("--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--train.print_freq", 6, "--train.num_threads", 1)
        assert run_main("-e", tmp_path / "run", *argv, "--train.nonfinite", "skip") == 0
        assert capsys.readouterr().out.count("non-finite gradient; skipping this update") == 3
        assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
        assert all(line.get("train/loss", 0.0) is not None for line in metrics(tmp_path / "run"))

    def test_too_many_consecutive_skips_stop_the_run(self, tmp_path, monkeypatch, capsys):
        self.inject_nan(monkeypatch, 2, 3, 4, 5)
        argv = (*SMALL, "--train.n_steps", 12, "--train.nonfinite", "skip", "--train.most_skipped", 3)
        assert run_main("-e", tmp_path / "run", *argv) == 1
        assert "for 4 updates in a row (train.most_skipped 3)" in capsys.readouterr().err

    def test_updates_skipped_by_a_gradient_scaler_count_and_lower_its_scale(self):
        """Uses the fp16 gradient scaler on the CPU, since fp16 itself needs a GPU."""
        run = build_run(("train.nonfinite", "skip"), ("train.most_skipped", 2), ("train.ema", 0.5), ("train.batch_size", 64))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        run.state.scaler = run.accelerator.scaler = scaler
        run.state.optimizer = AcceleratedOptimizer(run.state.optimizer.optimizer, scaler=scaler)
        images, labels = next(train_batches(run, 0))
        run.update(run.state, (images, labels), measure=True)
        before = {name: value.clone() for name, value in run.state.ema.module.state_dict().items()}
        for _ in range(2):
            run.update(run.state, (images * float("nan"), labels), measure=True)
        assert scaler.get_scale() == 256
        assert run.state.skipped == 2
        assert all(value.equal(before[name]) for name, value in run.state.ema.module.state_dict().items())
        with pytest.raises(RunError, match=r"for 3 updates in a row \(train.most_skipped 2\)"):
            run.update(run.state, (images * float("nan"), labels), measure=True)

    def test_interval_without_an_update_is_logged_without_a_loss(self, tmp_path, monkeypatch):
        self.inject_nan(monkeypatch, 0, 1, 2, 3)
        assert run_main("-e", tmp_path / "run", *SMALL, "--train.n_steps", 8, "--train.nonfinite", "skip") == 0
        assert ["train/loss" in line for line in metrics(tmp_path / "run")] == [False, True]


def test_gradient_checkpointing_gives_the_same_run(tmp_path):
    argv = [f"--{name}={value}" for name, value in SHAPES]
    argv += ["--train.n_steps=4", "--model.layers=[1,1,1,1]", "--train.ema=0.9", "--model.drop_path=0.2"]
    for name, value in (("plain", "false"), ("recomputed", "true")):
        assert run_main("-e", tmp_path / name, *argv, "--train.grad_checkpointing", value) == 0
    assert_same_weights(weights(tmp_path / "plain"), weights(tmp_path / "recomputed"))
    assert untimed(metrics(tmp_path / "plain")) == untimed(metrics(tmp_path / "recomputed"))


def test_model_without_gradient_checkpointing_is_an_error(tmp_path, capsys):
    assert run_main("-e", tmp_path / "run", "--train.grad_checkpointing", "true", "--train.n_steps", 2) == 2
    assert "model.name lenet does not offer it" in capsys.readouterr().err


def test_nondeterminism_is_noted_unless_deterministic_is_set(tmp_path):
    for run, value in (("a", "false"), ("b", "true")):
        assert run_main("-e", tmp_path / run, *SMALL, "--train.n_steps", 1, "--deterministic", value) == 0
    torch.use_deterministic_algorithms(False)
    logs = [(tmp_path / run / "output.log").read_text() for run in ("a", "b")]
    assert ["GPU kernels may sum in another order" in log for log in logs] == [True, False]


def test_deterministic_enables_torch_determinism_and_repeats_bit_exactly(tmp_path):
    argv = (*SMALL, "--train.n_steps", 8, "--model.pdrop", 0.2)
    try:
        for run in ("a", "b"):
            assert run_main("-e", tmp_path / run, *argv, "--deterministic", "true") == 0
            assert torch.are_deterministic_algorithms_enabled()
        assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
        assert run_main("-e", tmp_path / "c", *argv) == 0
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_evaluation_can_use_another_image_size():
    names = [("data.name", "shapes"), ("data.n_train", 64), ("data.n_test", 64), ("model.name", "resnet18"), ("train.n_steps", 1)]
    run = build_run(*names, ("eval.img_size", 48), ("train.batch_size", 16), ("data.img_size", 32))
    assert next(train_batches(run, 0))[0].shape[-2:] == (32, 32)
    assert next(iter(run.data.loader("valid").batches()))[0].shape[-2:] == (48, 48)


def test_evaluation_size_that_the_model_does_not_support_is_an_error(tmp_path, capsys):
    argv = ("--data.name", "shapes", "--data.n_train", 64, "--data.img_size", 32, "--train.batch_size", 16, "--train.n_steps", 2)
    assert run_main("-e", tmp_path / "run", *argv, "--model.name", "vit_tiny", "--eval.img_size", 64) == 2
    line = capsys.readouterr().err.strip()
    assert all(words in line for words in ("eval.img_size: 64", "vit_tiny", "data.img_size 32"))


SHAPES = [
    ("data.name", "shapes"),
    ("data.n_train", 48),
    ("data.n_test", 16),
    ("model.name", "resnet18"),
    ("train.batch_size", 16),
]


def test_progressive_resizing_grows_images_to_full_size():
    growing = [("augment.resize_from", 16), ("augment.resize_epochs", 4), ("augment.resize_step", 4)]
    run = build_run(*SHAPES, ("train.n_epochs", 6), ("data.img_size", 32), *growing)
    sizes = [batch[0].shape[-1] for batch in train_batches(run, 0)][::3]
    assert sizes == [16, 20, 24, 28, 32, 32]
    assert next(iter(run.data.loader("valid").batches()))[0].shape[-1] == 32
    assert next(train_batches(run, 3))[0].shape[-1] == 20  # also when starting at a later step


@pytest.mark.parametrize("n_workers", [0, 2])
def test_progressive_resizing_works_with_image_files(data_root, n_workers):
    options = [("data.name", "imagefolder"), ("data.dataroot", data_root / "imagefolder"), ("data.img_size", 32)]
    options += [
        ("dataloader.num_workers", n_workers),
        ("train.batch_size", 8),
        ("model.name", "resnet18"),
        ("augment.erasing", 1),
    ]
    run = build_run(*options, ("train.n_epochs", 3), ("augment.resize_from", 16), ("augment.resize_step", 8))
    assert [batch[0].shape[-1] for batch in train_batches(run, 0)] == [16] * 3 + [24] * 3 + [24] * 3


def test_resize_step_that_misses_the_full_size_is_an_error(tmp_path, capsys):
    argv = [f"--{name}={value}" for name, value in SHAPES]
    assert run_main("-e", tmp_path / "run", *argv, "--train.n_steps", 2, "--augment.resize_from", 20, "--data.img_size", 32) == 2
    line = capsys.readouterr().err.strip()
    assert "augment.resize_step: 16 doesn't lead from augment.resize_from 20 to data.img_size 32; 4 would" in line


def test_invalid_resize_from_is_an_error(tmp_path, capsys):
    argv = [f"--{name}={value}" for name, value in SHAPES]
    assert run_main("-e", tmp_path / "run", *argv, "--train.n_steps", 2, "--augment.resize_from", 64, "--data.img_size", 32) == 2
    assert "augment.resize_from: 64" in capsys.readouterr().err
    assert (
        run_main(
            "-e",
            tmp_path / "run",
            *argv,
            "--model.name=vit_tiny",
            "--train.n_steps=2",
            "--augment.resize_from=16",
            "--augment.resize_step=4",
        )
        == 2
    )
    assert "vit_tiny" in capsys.readouterr().err


def test_micro_batch_too_small_for_batchnorm_is_a_one_line_error(tmp_path, capsys):
    argv = [f"--{name}={value}" for name, value in SHAPES]
    assert run_main("-e", tmp_path / "run", *argv, "--train.n_steps", 2, "--train.micro_batch_size", 1) == 1
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert "train.micro_batch_size 1 is too small" in line


MANY_RECIPES = (
    *("--data.name", "shapes", "--data.n_train", 64, "--data.n_test", 32, "--data.img_size", 32, "--train.batch_size", 16),
    *("--model.name", "timm/test_resnet", "--model.drop_path_rate", 0.1, "--model.drop_rate", 0.1, "--train.n_steps", 16),
    *("--train.save_freq", 4, "--train.eval_freq", 8, "--train.print_freq", 4, "--train.num_threads", 1),
    *("--augment.crop_padding", 4, "--augment.padding_mode", "reflect", "--augment.hflip", "alternating"),
    *("--augment.cutout", 8, "--augment.color_jitter", 0.2, "--augment.mixup", 0.8, "--augment.cutmix", 1.0),
    *("--augment.mix_epochs", 3, "--augment.resize_from", 24, "--augment.resize_step", 4, "--train.loss", "bce"),
    *("--train.precision", "bf16", "--train.channels_last", "true", "--train.grad_checkpointing", "true"),
    *("--train.micro_batch_size", 6, "--train.ema", 0.9, "--train.clip_grad_norm", 1.0, "--train.label_smoothing", 0.1),
    *("--train.optim.nesterov", "true", "--train.optim.layer_decay", 0.8, "--train.optim.decay_norm_and_bias", "false"),
    *("--train.optim.lr", 0.02, "--train.optim.weight_decay", 0.001, "--train.sched.type", "PolynomialLR"),
    *("--train.sched.warmup_steps", 3, "--train.sched.cooldown_epochs", 0.5, "--train.sched.eta_min", 0.001),
    *("--train.nonfinite", "skip", "--train.sam", 0.05, "--train.freeze", "[stem]", "--train.patience", 9),
    *("--eval.tta", "flip", "--eval.img_size", 40, "--train.eval_first", "true"),
)


@pytest.mark.slow
def test_killed_run_with_many_recipes_resumes_bit_exactly(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_main("-e", whole, *MANY_RECIPES) == 0
    process = subprocess.Popen(
        [sys.executable, "main.py", "-e", str(cut), *map(str, MANY_RECIPES)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (cut / "ckpt" / "step-000004" / "manifest.json").exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = run_command("python", "main.py", "-e", cut, "-r", "latest")
    assert finished.returncode == 0, finished.stderr
    assert "resuming at step 0," not in finished.stdout
    assert "warning" not in (whole / "output.log").read_text().lower()  # every key has an effect
    assert_same_weights(weights(whole), weights(cut))
    assert untimed(metrics(whole)) == untimed(metrics(cut))
    files = [load_file(run / "ckpt" / "latest" / "model_ema.safetensors") for run in (whole, cut)]
    assert_same_weights(*files)
