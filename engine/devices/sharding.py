"""Weights that are divided over the ranks (FSDP2), gathered for a checkpoint and divided again from one.

A checkpoint holds whole tensors, under the names and in the order of a run that isn't sharded: each can go on from the other's.
What is not sharded passes through untouched, and costs nothing.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(value: Any) -> Any:
    """The same with whole tensors; every rank has to call."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    return [gathered(item) for item in value] if isinstance(value, list) else value


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Whole tensors into a model, of which each rank keeps its part."""
    own = model.state_dict()
    model.load_state_dict({name: _divided(value, own[name]) if name in own else value for name, value in weights.items()})


def divided_state(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's saved state, with each tensor that belongs to the elements of a weight divided as the weight is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: _divided(value, parameters[number]) for name, value in of_one.items()}
        for number, of_one in saved["state"].items()
    }
    return {**saved, "state": state}


def _divided(value: Any, like: Tensor) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
