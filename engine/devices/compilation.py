"""torch.compile, of the whole model or of each block alone (train.compile regions)."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.config.errors import ConfigError
from engine.config.schema import TrainConfig
from engine.devices.recompute import repeated_blocks

log = logging.getLogger(__name__)

MAX_GRAPHS = 1_000  # that train.compile makes, one for each size of the images and each size of a micro-batch


def compiled(model: nn.Module, train: TrainConfig, name: str, *, sizes_vary: bool) -> Any:
    """Compile a graph for each size of the images, so that a resumed run computes with the same ones.

    By default, the second size would be compiled for all sizes, and from the ninth graph on the rest would not be compiled.
    """
    options: dict[str, Any] = {"mode": train.compile_mode}
    if sizes_vary:
        log.warning(
            "train.compile: images of many sizes share graphs that depend on the first ones, so resuming is not bit exact"
        )
    else:
        if train.compile_mode == "max-autotune":
            log.warning("train.compile_mode max-autotune chooses kernels by their speed, so resuming is not bit exact")
        import torch._dynamo.config as dynamo  # takes a second

        for limit in ("cache_size_limit", "accumulated_cache_size_limit"):
            setattr(dynamo, limit, max(MAX_GRAPHS, getattr(dynamo, limit)))
        options["dynamic"] = False
    if train.compile != "regions":
        return torch.compile(model, **options)
    if train.grad_checkpointing and any(hasattr(module, "set_grad_checkpointing") for module in model.modules()):
        problem = f"regions: {name} recomputes around its blocks, which would update BatchNorm twice per batch"
        raise ConfigError("train.compile", problem, "train.compile true compiles the recomputation too")
    n_blocks = compile_blocks(model, **options)
    if not n_blocks:
        raise ConfigError("train.compile", f"regions: {name} is not made of blocks", "train.compile true compiles any model")
    log.info("train.compile regions: %d blocks; those that are alike share their graphs", n_blocks)
    return model


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile every block of `model` in place for training, and return their number. Names of parameters do not change."""
    blocks = list(repeated_blocks(model))
    for block in blocks:
        own = vars(block).get("forward")  # as recompute_blocks left it
        forward = own.func if isinstance(own, partial) else type(block).forward
        block.forward = partial(_forward, block, forward, torch.compile(forward, **options))
    return len(blocks)


def _forward(block: nn.Module, forward: Callable[..., Any], compiled_forward: Callable[..., Any], *inputs: Any) -> Any:
    """Evaluations are not compiled, as without regions."""
    return (compiled_forward if torch.is_grad_enabled() else forward)(block, *inputs)
