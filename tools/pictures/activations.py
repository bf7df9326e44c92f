"""The outputs of a model's layers, as feature maps."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import Tensor, nn

from engine.config.errors import ConfigError


def stage_maps(model: Any, inputs: Tensor) -> dict[str, Tensor]:
    """The maps of the stages in `feature_info`, B C H W, by module name."""
    if hasattr(model, "forward_stages"):
        maps = model.forward_stages(inputs)
    elif hasattr(model, "forward_intermediates"):  # timm
        maps = model.forward_intermediates(inputs, intermediates_only=True)
    else:
        raise ConfigError(f"{type(model).__name__} doesn't list its stages; give the names of layers with --layers")
    names = [stage["module"] for stage in model.feature_info]
    return {name: as_map(output) for name, output in zip(names, maps, strict=True)}


def layer_maps(model: nn.Module, inputs: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The outputs of these layers as maps, B C H W."""
    with captured(model, names, copy=True) as outputs:
        model(inputs)
    return {name: as_map(output) for name, output in outputs.items()}


@contextmanager
def captured(model: nn.Module, names: Sequence[str], *, copy: bool) -> Iterator[dict[str, Tensor]]:
    """The outputs of these layers in the forward pass of the block. Use `copy` if later layers may change them in place."""
    outputs: dict[str, Tensor] = {}

    def keep(layer: nn.Module, inputs: object, output: object, name: str) -> None:
        output = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(output, Tensor):
            outputs[name] = output.clone() if copy else output

    layers = dict(model.named_modules())
    with ExitStack() as hooks:
        for name in names:
            if not name or name not in layers:
                near = get_close_matches(name, list(layers), n=3, cutoff=0.5) or list(dict(model.named_children()))
                raise ConfigError(f"{type(model).__name__} has no layer {name!r}; similar names: {', '.join(near)}")
            hooks.callback(layers[name].register_forward_hook(partial(keep, name=name)).remove)
        yield outputs
    if missing := [name for name in names if name not in outputs]:
        raise ConfigError(f"layer {missing[0]} isn't used in evaluation mode, or returns no tensor")


def as_map(output: Tensor) -> Tensor:
    """B C H W, from the same, from B H W C (Swin), from tokens B N D, without class tokens in front, or from vectors B D.

    Images are square, and so are their maps.
    """
    if output.ndim == 4:
        channels_last = output.shape[1] == output.shape[2] != output.shape[3]
        return output.permute(0, 3, 1, 2) if channels_last else output
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        return output[:, output.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))
    if output.ndim == 2:
        return output[:, :, None, None]
    raise ConfigError(f"an output of shape {' x '.join(map(str, output.shape))} can't be drawn as a map")


def first_filters(model: nn.Module) -> tuple[str, Tensor] | None:
    """The name of the first convolution and its weights N C H W; None if there is no convolution."""
    convolutions = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    return next(((name, layer.weight.detach()) for name, layer in convolutions), None)
