"""Parameters and multiply-accumulates of a model, counted by fvcore on one image in evaluation mode.

fvcore calls one multiply-add a flop. It does not count fused attention, so a handler here does.
"""

import copy
import logging
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.devices.sharding import is_sharded

with warnings.catch_warnings():  # fvcore uses torch.jit.script, which is deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import FlopCountAnalysis


log = logging.getLogger(__name__)

ATTENTION = "scaled_dot_product_attention"
PRODUCTS = ("conv", "linear", "addmm", "matmul", "mm", "bmm", "einsum", ATTENTION)  # torch counts them too


@dataclass(frozen=True)
class Count:
    params: int
    macs: int
    stages: dict[str, tuple[int, int]]  # each child of the model -> its parameters, its MACs
    modules: dict[str, int]  # every module -> its MACs
    products: tuple[int, int]  # MACs without those of norms, poolings and upsamplings, by fvcore and by torch's own counter
    not_counted: dict[str, int]  # operation -> how often; additions, activations and poolings, by convention not multiply-adds


def count(model: nn.Module, in_channels: int, img_size: int) -> Count:
    was_training = model.training
    image = torch.zeros(1, in_channels, img_size, img_size, device=next(model.parameters()).device)
    analysis = FlopCountAnalysis(model.eval(), image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle(f"aten::{ATTENTION}", _attention)
    fvcore_log = logging.getLogger("fvcore.nn.jit_analysis")
    level = fvcore_log.level
    fvcore_log.setLevel(logging.ERROR)
    proposes = getattr(model, "rpn", None)
    if proposes is not None:  # a two-stage detector: its number of proposals depends on the image, so count the maximum
        threshold, proposes.nms_thresh = proposes.nms_thresh, 1.0
    try:
        with warnings.catch_warnings(), torch.no_grad():  # compiled blocks run as they are
            warnings.simplefilter("ignore")  # of the tracer, about shapes that become constants
            macs, by_module, not_counted = analysis.total(), analysis.by_module(), analysis.unsupported_ops()
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as by_torch:
                model(image)  # with an attention of plain products: torch doesn't count the CPU's fused one
    finally:
        fvcore_log.setLevel(level)
        if proposes is not None:
            proposes.nms_thresh = threshold
        model.train(was_training)
    products = sum(int(analysis.by_operator()[name]) for name in PRODUCTS), int(by_torch.get_total_flops()) // 2
    if products[0] != products[1]:
        found = "%s: fvcore counts %d multiply-adds of convolutions, products and attention, torch %d; one misses an operation"
        log.warning(found, type(model).__name__, *products)
    stages = {
        name: (sum(p.numel() for p in module.parameters()), int(by_module[name]))
        for name, module in model.named_children()
        if by_module[name] or any(True for _ in module.parameters())
    }
    return Count(
        params=sum(p.numel() for p in model.parameters()),
        macs=int(macs),
        stages=stages,
        modules={name: int(macs) for name, macs in by_module.items()},
        products=products,
        not_counted={name.removeprefix("aten::"): n for name, n in sorted(not_counted.items())},
    )


def macs_of(model: nn.Module, accelerator: Accelerator, in_channels: int, img_size: int) -> int | None:
    """Count on a copy without Accelerate's wrappers; None for a sharded model, or a plugin's that can't be traced."""
    if is_sharded(model):
        return None
    try:
        copied = accelerator.unwrap_model(copy.deepcopy(model), keep_fp32_wrapper=False).float()
        return count(copied, in_channels, img_size).macs
    except Exception as error:  # whatever copying or tracing that model raises
        reason = str(error).partition("\n")[0] or type(error).__name__
        log.warning("the multiply-accumulates of %s could not be counted: %s", type(model).__name__, reason)
        return None


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter:
    """Count queries times keys, and the result times values."""
    *batch, n_queries, width = inputs[0].type().sizes()
    n_keys, value_width = inputs[2].type().sizes()[-2:]
    per_head = n_queries * n_keys * (width + value_width)
    return Counter({ATTENTION: int(torch.tensor(batch).prod()) * per_head})
