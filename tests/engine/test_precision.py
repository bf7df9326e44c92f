"""The log says in which precision a run trains, and who asked for it."""

import json

import pytest
import torch

from engine import ConfigError, load_config
from engine.devices.accelerator import make_accelerator
from tests.running import run_main

ARGV = ("--train.n_steps", 2, "--train.batch_size", 64, "--train.num_threads", 1)
LAUNCHER = "ACCELERATE_MIXED_PRECISION"

without_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device that can do it")


def trained(run, *argv):
    assert run_main("-e", run, *argv) == 0
    return json.loads((run / "environment.json").read_text())["precision"], (run / "output.log").read_text()


def test_without_a_wish_it_is_fp32(tmp_path):
    precision, log = trained(tmp_path / "run", *ARGV)
    assert precision == "fp32"
    assert "precision fp32: neither train.precision nor the launcher asks for another" in log


def test_the_launchers_wish_holds_where_the_config_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHER, "bf16")
    precision, log = trained(tmp_path / "run", *ARGV)
    assert precision == "bf16"
    assert "precision bf16: the launcher's mixed precision, as train.precision is null" in log


def test_the_configs_wish_wins_and_a_resumed_run_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHER, "no")
    precision, log = trained(tmp_path / "run", *ARGV, "--train.precision", "bf16")
    assert precision == "bf16"
    assert "precision bf16: train.precision, --train.precision" in log
    monkeypatch.setenv(LAUNCHER, "fp16")
    precision, log = trained(tmp_path / "run", "-r", "latest")
    assert precision == "bf16"
    assert f"precision bf16: train.precision, {tmp_path / 'run' / 'config.yaml'}" in log


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    config = load_config(None, {"train.n_steps": 1, "train.precision": "bf16"})
    model = make_accelerator(config.train, deterministic=config.deterministic).prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model(torch.randn(4, 4))
    assert seen == [torch.bfloat16]
    assert model[0].weight.dtype == torch.float32


@without_gpu
@pytest.mark.parametrize(
    ("launched", "wish", "says"),
    [
        ("no", "fp16", "train.precision: precision fp16 needs a GPU"),
        ("no", "tf32", "train.precision: precision tf32 needs an NVIDIA GPU"),
        ("fp16", None, "the launcher's mixed precision: precision fp16 needs a GPU"),
        ("fp8", None, "the launcher's mixed precision: fp8 is not offered"),
    ],
)
def test_what_this_machine_can_not_do_names_who_asked_and_what_would_do(launched, wish, says, monkeypatch):
    monkeypatch.setenv(LAUNCHER, launched)
    with pytest.raises(ConfigError) as caught:
        make_accelerator(load_config(None, {"train.n_steps": 1, "train.precision": wish}).train)
    assert str(caught.value).startswith(says)
    assert "train.precision" in str(caught.value).removeprefix(says)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_fp16_trains_with_a_scaler_that_a_resumed_run_goes_on_with(tmp_path):
    argv = ("--train.n_steps", 20, "--train.batch_size", 64, "--train.save_freq", 10, "--train.precision", "fp16")
    trained(tmp_path / "run", *argv)
    saved = torch.load(tmp_path / "run" / "ckpt" / "step-000010" / "train_state.pt", weights_only=True)
    assert saved["scaler"]["scale"] > 1
    assert run_main("-r", tmp_path / "run" / "ckpt" / "step-000010") == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tf32_rounds_products_and_fp32_does_not():
    left, right = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)).cuda() for seed in (0, 1))
    exact, errors = left.double() @ right.double(), {}
    for precision in ("fp32", "tf32"):
        make_accelerator(load_config(None, {"train.n_steps": 1, "train.precision": precision}))
        errors[precision] = (left @ right - exact).abs().max().item()
    assert errors["tf32"] > 10 * errors["fp32"]
