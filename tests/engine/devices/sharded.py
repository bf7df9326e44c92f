"""Shard the model of a training over the ranks as by FSDP2, without GPUs.

Accelerate supports FSDP2 on GPUs only; torch's fully_shard, which it calls, also works on a CPU.
"""

from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer


def prepare(self: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group, group_names in zip(optimizer.param_groups, grouped, strict=True):
        group["params"] = [sharded[name] for name in group_names]
    return model, AcceleratedOptimizer(optimizer)


def shard(run_dir: Path) -> None:
    Accelerator.prepare = prepare
