"""Sharded weights (FSDP2): gathered for a checkpoint, and sharded again when one is loaded.

A checkpoint holds whole tensors, under the names and in the order of a run without sharding, so that each can resume the other.
Tensors that are not sharded pass through untouched, at no cost.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(value: Any) -> Any:
    """Replace sharded tensors by whole ones. Every rank has to call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    return [gathered(item) for item in value] if isinstance(value, list) else value


def own_part(tensor: Tensor) -> Tensor:
    """Return the shard of this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole tensors into a model, of which each rank keeps its shard."""
    own = model.state_dict()
    model.load_state_dict({name: _sharded(value, own[name]) if name in own else value for name, value in weights.items()})


def sharded_state(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's saved state with each tensor of a weight's shape sharded like the weight."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: _sharded(value, parameters[number]) for name, value in of_one.items()}
        for number, of_one in saved["state"].items()
    }
    return {**saved, "state": state}


def _sharded(value: Any, like: Tensor) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
