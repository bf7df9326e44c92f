"""Train a recipe and return its curve; compare curves."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import build as builder
from engine import load_config, train
from engine.run.metrics import read_metrics
from tests.trajectories.recipes import COMMON, N_STEPS, RECIPES

Curve = dict[str, list[float]]  # loss and grad_norm of each update; valid/loss and valid_ema/loss of each evaluation
SERIES = {"train/loss": "loss", "train/grad_norm": "grad_norm", "valid/loss": "valid/loss", "valid_ema/loss": "valid_ema/loss"}
# Variables that choose the kernels of torch, oneDNN and MKL
CHOOSE_KERNELS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
MARGIN = 8  # of the band, over the largest deviation that was measured
FLOOR = 1e-5  # the narrowest band
AHEAD = 25  # updates
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "pillow", "simplejpeg")


def train_curve(name: str, folder: Path, *, threads: int = 1, noise: int | None = None) -> Curve:
    """Train a recipe to the middle, resume it to the end, and return its curve.

    `noise` is a seed that changes each initial weight by a relative 2^-24 or less, as another order of summation would.
    """
    recipe = RECIPES[name]
    (folder / "data").mkdir()
    options = COMMON | recipe.options | recipe.write(folder / "data") | {"train.num_threads": threads}
    with everywhere_alike(), rounding_noise(noise):
        for n_steps, resume in ((N_STEPS // 2, None), (N_STEPS, "latest")):
            config = load_config(None, options | {"train.n_steps": n_steps})
            result = train(config, exp_dir=folder / "run", resume=resume)
            assert (result.status, result.step) == ("completed", n_steps)
    lines = read_metrics(folder / "run")
    curve = {series: [line[tag] for line in lines if tag in line] for tag, series in SERIES.items()}
    return {series: values for series, values in curve.items() if values}


@contextmanager
def everywhere_alike() -> Iterator[None]:
    """Train on the CPU, with a dropout that is the same everywhere, and draw no figures, which take half of the time."""
    no_gpu = mock.patch.object(torch.accelerator, "is_available", return_value=False)
    with no_gpu, mock.patch.object(import_module("engine.train"), "_draw"), mock.patch.object(F, "dropout", dropout):
        yield


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Torch's own draws other numbers in version 2.6, and without MKL; torch.rand is the same everywhere."""
    return x * (torch.rand(x.shape) >= p) / (1 - p) if training and p > 0 else x


@contextmanager
def rounding_noise(seed: int | None) -> Iterator[None]:
    build_model = builder.build_model

    def noisy(*args: Any) -> torch.nn.Module:
        model, generator = build_model(*args), torch.Generator().manual_seed(seed or 0)
        with torch.no_grad():
            for parameter in model.parameters():
                signs = torch.randint(-1, 2, parameter.shape, generator=generator)
                parameter.mul_(1 + signs * 2.0**-23)
        return model

    with mock.patch.object(builder, "build_model", noisy if seed is not None else build_model):
        yield


def deviations(curve: Curve, recorded: Curve) -> Curve:
    """Return the relative deviation at each step."""
    lengths = [{series: len(values) for series, values in one.items()} for one in (curve, recorded)]
    assert lengths[0] == lengths[1], f"{lengths[0]} values instead of {lengths[1]}"
    pairs = {series: zip(values, recorded[series], strict=True) for series, values in curve.items()}
    return {series: [abs(a - b) / abs(b) for a, b in both] for series, both in pairs.items()}


def widest(of_machines: Sequence[Curve]) -> Curve:
    """Return the band around the deviations of several machines.

    A unit switches at another step on another machine, so a step's band includes the deviations of the following `AHEAD` steps.
    """
    band: Curve = {}
    for series, values in of_machines[0].items():
        of_step = [max(machine[series][i] for machine in of_machines) for i in range(len(values))]
        ahead = AHEAD * len(values) // N_STEPS
        band[series] = [float(f"{max(FLOOR, MARGIN * max(of_step[: i + ahead + 1])):.2g}") for i in range(len(values))]
    return band


def excess(curve: Curve, recorded: Curve, band: Curve) -> float:
    """Return the largest deviation in units of the band: up to 1 the curve is inside."""
    apart = deviations(curve, recorded)
    return max(d / limit for series in apart for d, limit in zip(apart[series], band[series], strict=True))


def first_outside(curve: Curve, recorded: Curve, band: Curve) -> str | None:
    """Return the first update after which a curve is outside its band, and the series, or None."""
    apart = deviations(curve, recorded)
    outside = [
        ((i + 1) * N_STEPS // len(apart[series]), series)
        for series in apart
        for i, (d, limit) in enumerate(zip(apart[series], band[series], strict=True))
        if not d <= limit
    ]
    return "update {}, {}".format(*min(outside)) if outside else None


def fingerprint() -> dict[str, Any]:
    """Return what the bits of a curve depend on: the processor, its caches, threads, and versions."""
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "caches": [path.read_text().strip() for path in caches],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": {name: os.environ[name] for name in CHOOSE_KERNELS if name in os.environ},
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def _processor() -> list[str]:
    """Return the lines of /proc/cpuinfo by which libraries choose their kernels; nothing on other systems."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "cache size", "Features", "CPU part")
    pairs = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in first)]
    return [f"{key}: {value}" for key, value in pairs if key in wanted]
