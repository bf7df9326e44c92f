"""Where a run was trained: the devices, and what is written down of them."""

import os
import platform
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from engine.config.errors import ConfigError
from engine.config.resolve import LoadedConfig
from engine.config.schema import Precision
from engine.plugins import loaded

PACKAGES = ("torch", "torchvision", "accelerate", "timm", "numpy", "safetensors", "omegaconf")


def make_accelerator(config: LoadedConfig) -> Accelerator:
    """The devices that the launcher gave, in the config's precision or else the launcher's."""
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    precision, asked_by = asked_precision(config)
    has_device = torch.accelerator.is_available()
    if precision not in get_args(Precision):
        offered = ", ".join(get_args(Precision))
        raise ConfigError(f"precision {precision} ({asked_by}) isn't offered; train.precision can be {offered}")
    if (precision == "tf32" and not torch.cuda.is_available()) or (precision == "fp16" and not has_device):
        device = "an NVIDIA GPU" if precision == "tf32" else "a GPU"
        raise ConfigError(f"precision {precision} ({asked_by}) needs {device}; --train.precision bf16 or fp32 runs here")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    _set_deterministic(config.deterministic)
    _check_fsdp(has_device)
    AcceleratorState._reset_state()  # a second training in one process may ask for another precision
    # Without cpu=True, ranks on a machine with no GPU would each train on their own.
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=config.train.timeout))] if config.train.timeout else []
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "tf32": "no"}.get(precision, precision), cpu=not has_device, kwargs_handlers=handlers
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ConfigError(
            f"the launcher announces {expected} processes, {accelerator.num_processes} found each other; start them with torchrun"
        )
    if config.train.batch_size % accelerator.num_processes:
        raise ConfigError(f"train.batch_size {config.train.batch_size} doesn't divide by the {accelerator.num_processes} ranks")
    return accelerator


def _check_fsdp(has_device: bool) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if not has_device:
        raise ConfigError("the launcher asks for FSDP, which divides a model over GPUs, and there is none: launch without it")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("the launcher asks for the first FSDP, of which no checkpoint could be written here: fsdp_version: 2")


def _set_deterministic(wanted: bool) -> None:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted


def asked_precision(config: LoadedConfig) -> tuple[str, str]:
    """The precision to train in, and who asks for it."""
    if config.train.precision is not None:
        return config.train.precision, f"train.precision, {config.origin('train.precision').name}"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":
        return launched, "the launcher's mixed precision, as train.precision is null"
    return "fp32", "neither train.precision nor the launcher asks for another"


def precision_of(accelerator: Accelerator) -> str:
    plain = "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"
    return {"no": plain}.get(accelerator.mixed_precision, accelerator.mixed_precision)


def describe(accelerator: Accelerator) -> dict[str, Any]:
    return {
        "command": [sys.executable, *sys.argv],
        "device": device_name(accelerator.device),
        "world_size": accelerator.num_processes,
        "precision": precision_of(accelerator),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "plugins": loaded(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {os.cpu_count()} cores" if device.type == "cpu" else device.type


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code, with a + behind it if files were changed since."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
