"""Compilation block by block, and gradient checkpointing: a block recomputes its activations in the backward pass.

Chen, Xu, Zhang, Guestrin (2016): Training Deep Nets with Sublinear Memory Cost. https://arxiv.org/abs/1604.06174
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(model: nn.Module) -> int:
    """Switch it on in every block of `model`, and return their number; a timm model does it itself.

    Call it before the model is wrapped. Names of parameters do not change.
    """
    for module in model.modules():
        if hasattr(module, "set_grad_checkpointing"):
            switch_on: Any = module.set_grad_checkpointing
            switch_on()
            for norm in _counting(module):
                norm.forward = partial(_count_once, norm)
            return 1
    blocks = list(_blocks(model))
    for block in blocks:
        block.forward = partial(_forward, block)  # a partial, unlike a bound method, is copied and pickled with its module
    return len(blocks)


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile every block of `model` in place for training, and return their number. Names of parameters do not change."""
    blocks = list(_blocks(model))
    for block in blocks:
        own = vars(block).get("forward")  # as recompute_blocks left it
        forward = own.func if isinstance(own, partial) else type(block).forward
        block.forward = partial(_forward_compiled, block, forward, torch.compile(forward, **options))
    return len(blocks)


def _forward_compiled(block: nn.Module, forward: Callable[..., Any], compiled_forward: Callable[..., Any], *inputs: Any) -> Any:
    """Evaluations are not compiled, as without regions."""
    return (compiled_forward if torch.is_grad_enabled() else forward)(block, *inputs)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield members of Sequentials and ModuleLists that are more than a layer of torch: residual, encoder, inception blocks."""
    for child in module.children():
        is_member = isinstance(module, (nn.Sequential, nn.ModuleList))
        if is_member and not type(child).__module__.startswith("torch.nn."):
            yield child
        else:
            yield from _blocks(child)


def _forward(block: nn.Module, *inputs: Any) -> Any:
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *inputs)
    if torch.compiler.is_compiling():  # the compiler updates statistics once
        return checkpoint(forward, block, *inputs, use_reentrant=False)
    contexts = partial(_contexts, block)
    return checkpoint(forward, block, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of the first computation and of the recomputation."""
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Keep BatchNorm from counting a batch twice."""
    norms: list[Any] = [norm for norm in _counting(block) if norm.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, n_batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, n_batches


def _counting(module: nn.Module) -> Iterator[Any]:
    return (norm for norm in module.modules() if getattr(norm, "track_running_stats", False))


def _count_once(norm: nn.Module, x: Tensor) -> Tensor:
    """Detect activation recomputation in timm's blocks: forward called during backward."""
    is_recomputation = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    with _frozen_statistics(norm) if is_recomputation else nullcontext():
        return type(norm).forward(norm, x)
