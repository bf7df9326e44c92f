"""Parameters and multiply-accumulates of a model, counted by fvcore on one image in evaluation mode.

What fvcore calls a flop is one multiply-add. It doesn't count fused attention by itself; here it does.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

# Operations that move, pool or activate: by custom they count nothing, as the additions of a residual connection.
FREE = {
    f"aten::{name}"
    for name in ["add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "abs", "pow", "sqrt", "exp", "sigmoid", "sigmoid_", "tanh", "silu", "silu_", "gelu", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "relu6", "clamp", "clamp_", "clamp_min", "mean", "sum", "cumsum", "max", "amax", "max_pool2d", "avg_pool2d", "softmax", "log_softmax", "dropout", "dropout_", "feature_dropout", "drop_path", "clone", "repeat", "expand", "expand_as", "pad", "constant_pad_nd", "reflection_pad2d", "roll", "fill_", "zero_", "topk", "sort", "gather", "index", "index_select", "index_put_", "where", "eq", "ne", "lt", "gt", "le", "ge", "any", "all", "logical_and", "logical_not", "bitwise_not", "floor_divide", "remainder", "arange", "linspace", "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "zeros_like", "ones_like", "meshgrid", "stack", "sin", "cos", "rsqrt", "square", "unflatten", "im2col", "unfold", "fmod", "minimum", "maximum"]
}


@dataclass(frozen=True)
class Count:
    params: int
    macs: int
    stages: dict[str, tuple[int, int]]  # module -> parameters, MACs; the model's children, and theirs where a child is a sequence
    unsupported: dict[str, int]  # operation -> how often; neither counted nor known to be free


def count(model: nn.Module, in_channels: int, img_size: int) -> Count:
    was_training = model.training
    image = torch.zeros(1, in_channels, img_size, img_size, device=next(model.parameters()).device)
    analysis = FlopCountAnalysis(model.eval(), image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
    fvcore_log = logging.getLogger("fvcore.nn.jit_analysis")
    level = fvcore_log.level
    fvcore_log.setLevel(logging.ERROR)
    try:
        macs, by_module, unsupported = analysis.total(), analysis.by_module(), analysis.unsupported_ops()
    finally:
        fvcore_log.setLevel(level)
        model.train(was_training)
    stages = {
        name: (sum(p.numel() for p in module.parameters()), int(by_module[name]))
        for name, module in model.named_children()
        if by_module[name] or any(True for _ in module.parameters())
    }
    return Count(
        params=sum(p.numel() for p in model.parameters()),
        macs=int(macs),
        stages=stages,
        unsupported={name: n for name, n in unsupported.items() if name not in FREE},
    )


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter:
    """Queries times keys, and the result times values."""
    *batch, n_queries, width = inputs[0].type().sizes()
    n_keys, value_width = inputs[2].type().sizes()[-2:]
    per_head = n_queries * n_keys * (width + value_width)
    return Counter({"scaled_dot_product_attention": int(torch.tensor(batch).prod()) * per_head})
