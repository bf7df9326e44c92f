"""The log states the precision of a run and where it was set."""

import json
import platform

import pytest
import torch

from engine import ConfigError, load_config
from engine.devices.accelerator import make_accelerator
from tests.running import run_main

ARGV = ("--train.n_steps", 2, "--train.batch_size", 64, "--train.num_threads", 1)
LAUNCHER = "ACCELERATE_MIXED_PRECISION"

without_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is available")


def trained(run, *argv):
    assert run_main("-e", run, *argv) == 0
    return json.loads((run / "environment.json").read_text())["precision"], (run / "output.log").read_text()


def test_default_precision_is_fp32(tmp_path):
    precision, log = trained(tmp_path / "run", *ARGV)
    assert precision == "fp32"
    assert "precision fp32: neither train.precision nor the launcher asks for another" in log


def test_launcher_precision_applies_when_the_config_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHER, "bf16")
    precision, log = trained(tmp_path / "run", *ARGV)
    assert precision == "bf16"
    assert "precision bf16: the launcher's mixed precision, as train.precision is null" in log


def test_config_precision_overrides_the_launcher_and_survives_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHER, "no")
    precision, log = trained(tmp_path / "run", *ARGV, "--train.precision", "bf16")
    assert precision == "bf16"
    assert "precision bf16: train.precision, --train.precision" in log
    monkeypatch.setenv(LAUNCHER, "fp16")
    precision, log = trained(tmp_path / "run", "-r", "latest")
    assert precision == "bf16"
    assert f"precision bf16: train.precision, {tmp_path / 'run' / 'config.yaml'}" in log


@without_gpu
@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_processor_without_bf16_is_named(has_instructions, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    _, log = trained(tmp_path / "run", *ARGV, "--train.precision", "bf16")
    assert ("this processor has no instructions for bf16" in log) is not has_instructions


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    config = load_config(None, {"train.n_steps": 1, "train.precision": "bf16"})
    accelerator = make_accelerator(config.train, deterministic=config.deterministic)
    model = accelerator.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    dtypes = []
    model[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    model(torch.randn(4, 4, device=accelerator.device))
    assert dtypes == [torch.bfloat16]
    assert model[0].weight.dtype == torch.float32


@without_gpu
@pytest.mark.parametrize(
    ("launcher_precision", "precision", "message"),
    [
        ("no", "fp16", "train.precision: precision fp16 needs a GPU"),
        ("no", "tf32", "train.precision: precision tf32 needs an NVIDIA GPU"),
        ("fp16", None, "the launcher's mixed precision: precision fp16 needs a GPU"),
        ("fp8", None, "the launcher's mixed precision: fp8 is not offered"),
    ],
)
def test_unsupported_precision_is_an_error_with_its_source_and_an_alternative(
    launcher_precision, precision, message, monkeypatch
):
    monkeypatch.setenv(LAUNCHER, launcher_precision)
    with pytest.raises(ConfigError) as caught:
        make_accelerator(load_config(None, {"train.n_steps": 1, "train.precision": precision}).train)
    assert str(caught.value).startswith(message)
    assert "train.precision" in str(caught.value).removeprefix(message)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_fp16_saves_its_gradient_scaler_and_resumes(tmp_path):
    argv = ("--train.n_steps", 20, "--train.batch_size", 64, "--train.save_freq", 10, "--train.precision", "fp16")
    trained(tmp_path / "run", *argv)
    saved = torch.load(tmp_path / "run" / "ckpt" / "step-000010" / "train_state.pt", weights_only=True)
    assert saved["scaler"]["scale"] > 1
    assert run_main("-r", tmp_path / "run" / "ckpt" / "step-000010") == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tf32_rounds_matrix_products_and_fp32_does_not():
    left, right = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)).cuda() for seed in (0, 1))
    exact, errors = left.double() @ right.double(), {}
    for precision in ("fp32", "tf32"):
        make_accelerator(load_config(None, {"train.n_steps": 1, "train.precision": precision}).train)
        errors[precision] = (left @ right - exact).abs().max().item()
    assert errors["tf32"] > 10 * errors["fp32"]
