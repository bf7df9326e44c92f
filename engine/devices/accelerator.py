"""The devices that the launcher provides, and the precision to train in."""

import os
import platform
from datetime import timedelta
from typing import get_args

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from datasets.pipeline.cores import cores_per_rank
from engine.config.errors import ConfigError
from engine.config.schema import Precision, TrainConfig


def make_accelerator(train: TrainConfig, *, deterministic: bool = False) -> Accelerator:
    """Return an Accelerator for the launcher's devices, in train.precision or else the launcher's."""
    torch.set_num_threads(train.num_threads or min(torch.get_num_threads(), cores_per_rank()))
    precision = requested_precision(train)
    has_device = torch.accelerator.is_available()
    key = "train.precision" if train.precision is not None else "the launcher's mixed precision"
    if precision not in get_args(Precision):
        raise ConfigError(key, f"{precision} is not offered", f"train.precision can be {', '.join(get_args(Precision))}")
    if (precision == "tf32" and not torch.cuda.is_available()) or (precision == "fp16" and not has_device):
        device = "an NVIDIA GPU" if precision == "tf32" else "a GPU"
        raise ConfigError(key, f"precision {precision} needs {device}", "--train.precision bf16 or fp32 runs here")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        asks = "the launcher asks for FSDP"
        if not has_device:
            raise ConfigError(f"{asks}, which shards a model over GPUs, but there are no GPUs: launch without it")
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(f"{asks} version 1, whose checkpoints are not supported: fsdp_version: 2")
    AcceleratorState._reset_state()  # a second training in one process may need another precision
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=train.timeout))] if train.timeout else []
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "tf32": "no"}.get(precision, precision),
        cpu=not has_device,  # otherwise, on a machine without a GPU, each rank would train alone
        kwargs_handlers=handlers,
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        problem = f"the launcher announces {expected} processes, {accelerator.num_processes} found each other"
        raise ConfigError(f"{problem}; start them with torchrun")
    if train.batch_size % accelerator.num_processes:
        raise ConfigError("train.batch_size", f"{train.batch_size} is not a multiple of the {accelerator.num_processes} ranks")
    return accelerator


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the CPU and the current `device` as torch.manual_seed does, which takes 0.3 ms for all kinds of devices."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)  # such as torch.cuda


def requested_precision(train: TrainConfig) -> str:
    """Return train.precision, or the launcher's, or fp32."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return train.precision or (launched if launched != "no" else "fp32")


def has_bf16_instructions() -> bool:
    """Return whether the CPU multiplies in bf16. Of processors other than x86 it is not known, and assumed."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
