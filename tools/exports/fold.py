"""Folding of BatchNorm into the convolution or linear layer before it: in evaluation mode the two are one linear map."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

LAYERS = ("aten.conv1d.", "aten.conv2d.", "aten.conv3d.", "aten.linear.")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fold_batch_norm(model: nn.Module, images: Tensor) -> tuple[nn.Module, int, int]:
    """Return a folded copy of the model, how many of its BatchNorms are folded, and how many are left.

    A norm is folded if the output of the layer before it is used nowhere else, and if both are used only once.
    """
    model = copy.deepcopy(model)
    n_before = _count_norms(model)
    program = torch.export.export(model, (images,))
    names = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        before, mean = node.args[0], node.args[3]
        if not str(before.target).startswith(LAYERS) or len(before.users) > 1:
            continue
        weight = before.args[1]
        if any(tensor.name not in names or len(tensor.users) > 1 for tensor in (weight, mean)):
            continue  # shared, or computed from a parameter, as with weight standardization
        norm_name = names[mean.name].rpartition(".")[0]
        layer: Any = model.get_submodule(names[weight.name].rpartition(".")[0])
        norm: Any = model.get_submodule(norm_name)
        if type(norm) is BatchNormAct2d:  # timm's, which holds an activation
            replacement: nn.Module = nn.Sequential(norm.drop, norm.act)
        elif type(norm) in NORMS:
            replacement = nn.Identity()
        else:
            continue
        fuse: Callable[..., Any] = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        statistics = (norm.running_mean, norm.running_var, norm.eps)
        layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics, norm.weight, norm.bias)
        model.set_submodule(norm_name, replacement)
    n_left = _count_norms(model)
    return model, n_before - n_left, n_left


def _count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in model.modules())
