"""Gradient checkpointing: a block keeps its input only, and computes what lies between again in the backward pass.

Chen, Xu, Zhang, Guestrin (2016): Training Deep Nets with Sublinear Memory Cost. https://arxiv.org/abs/1604.06174
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(model: nn.Module) -> int:
    """Do so in every block of `model`, and give their number; a model of timm does it itself.

    To be called on the bare model. Names of parameters stay what they are.
    """
    for module in model.modules():
        if hasattr(module, "set_grad_checkpointing"):
            module.set_grad_checkpointing()
            for norm in _counting(module):
                norm.forward = partial(_count_once, norm)
            return 1
    blocks = list(_blocks(model))
    for block in blocks:
        block.forward = partial(_forward, block)  # a partial, unlike a bound method, is copied and pickled with its module
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What stands in a row and is more than a layer of torch: residual blocks, inverted ones, an encoder's, inceptions."""
    for child in module.children():
        is_in_a_row = isinstance(module, (nn.Sequential, nn.ModuleList))
        if is_in_a_row and not type(child).__module__.startswith("torch.nn."):
            yield child
        else:
            yield from _blocks(child)


def _forward(block: nn.Module, *inputs: Any) -> Any:
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *inputs)
    if torch.compiler.is_compiling():  # the compiler sees that statistics are written once
        return checkpoint(forward, block, *inputs, use_reentrant=False)
    contexts = partial(_contexts, block)
    return checkpoint(forward, block, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Of the first and of the second computation."""
    return nullcontext(), _statistics_stand_still(block)


@contextmanager
def _statistics_stand_still(block: nn.Module) -> Iterator[None]:
    """A BatchNorm that sees a batch twice would count it twice."""
    norms = [norm for norm in _counting(block) if norm.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, n_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, n_batches


def _counting(module: nn.Module) -> Iterator[nn.Module]:
    return (norm for norm in module.modules() if getattr(norm, "track_running_stats", False))


def _count_once(norm: nn.Module, x: Tensor) -> Tensor:
    """In a block of timm, which computes again without saying so: what runs inside of a backward pass does."""
    is_again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    with _statistics_stand_still(norm) if is_again else nullcontext():
        return type(norm).forward(norm, x)
