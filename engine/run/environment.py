"""Where and with what a run was trained: the content of environment.json."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from datasets.pipeline.cores import usable_cores

PACKAGES = ("torch", "torchvision", "accelerate", "timm", "numpy", "safetensors", "omegaconf")


def describe_environment(
    accelerator: Accelerator, precision: str | None, plugins: dict[str, str], data: dict[str, Any]
) -> dict[str, Any]:
    return {
        "command": [sys.executable, *sys.argv],
        "device": device_name(accelerator.device),
        "world_size": accelerator.num_processes,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "plugins": plugins,
        "data": data,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {usable_cores()} cores" if device.type == "cpu" else device.type


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the code, with a + if files were changed since; None outside a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parents[2]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
