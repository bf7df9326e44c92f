"""main.py, with a model that is divided over the ranks as FSDP2 divides it, where there are no GPUs.

Accelerate does that on GPUs only; torch's fully_shard, which it calls, does it on a CPU too.
"""

import os
import sys

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from engine.config.command_line import run_tool
from main import main


def prepare(self: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    divided = dict(model.named_parameters())
    for group, own in zip(optimizer.param_groups, grouped, strict=True):
        group["params"] = [divided[name] for name in own]
    return model, AcceleratedOptimizer(optimizer)


if __name__ == "__main__":
    Accelerator.prepare = prepare
    code = run_tool(main)
    sys.stdout.flush()
    os._exit(code)  # at a regular exit the threads of the mesh's own process group may outlive it, which aborts
