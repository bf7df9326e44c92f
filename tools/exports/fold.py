"""BatchNorm folded into the convolution or linear layer before it: in evaluation mode the two are one linear map."""

import copy

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

LAYERS = ("aten.conv1d.", "aten.conv2d.", "aten.conv3d.", "aten.linear.")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fold_batch_norm(model: nn.Module, images: Tensor) -> tuple[nn.Module, int, int]:
    """A copy of the model, how many of its BatchNorms are gone, and how many are left since nothing before them can take them."""
    model = copy.deepcopy(model)
    n_before = _count(model)
    for layer_name, norm_name in _pairs(model, images):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        activation = _activation(norm)
        if activation is None:
            continue
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        statistics = (norm.running_mean, norm.running_var, norm.eps)
        layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics, norm.weight, norm.bias)
        model.set_submodule(norm_name, activation)
    return model, n_before - _count(model), _count(model)


def _count(model: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in model.modules())


def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Layers whose output goes to a BatchNorm and nowhere else, each used once, by their names."""
    program = torch.export.export(model, (images,))
    names = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
    found = []
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        before, mean = node.args[0], node.args[3]
        if str(before.target).startswith(LAYERS) and len(before.users) == 1:
            weight = before.args[1]
            if _is_used_once(weight, names) and _is_used_once(mean, names):
                found.append((names[weight.name].rpartition(".")[0], names[mean.name].rpartition(".")[0]))
    return found


def _is_used_once(node: Node, names: dict[str, str]) -> bool:
    """Of the model itself, not computed from something, as where weights are standardised."""
    return node.name in names and len(node.users) == 1


def _activation(norm: nn.Module) -> nn.Module | None:
    """What is left of a norm: nothing, or of timm's, which hold one, the activation. None for one that isn't known."""
    from timm.layers import BatchNormAct2d

    if type(norm) is BatchNormAct2d:
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity() if type(norm) in NORMS else None
