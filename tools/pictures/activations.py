"""What the layers of a model give for an image."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from torch import Tensor, nn

from engine.config.errors import ConfigError


def stage_maps(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """The maps that `feature_info` lists, B C H W, by the name of the module."""
    if hasattr(model, "forward_stages"):
        maps = model.forward_stages(inputs)
    elif hasattr(model, "forward_intermediates"):  # timm
        maps = model.forward_intermediates(inputs, intermediates_only=True)
    else:
        raise ConfigError(f"{type(model).__name__} doesn't say what its stages are; --layers names some of its layers")
    names = [stage["module"] for stage in model.feature_info]
    return {name: as_map(output) for name, output in zip(names, maps, strict=True)}


def layer_maps(model: nn.Module, inputs: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The outputs of these layers as maps, B C H W."""
    with captured(model, names, copy=True) as outputs:
        model(inputs)
    return {name: as_map(output) for name, output in outputs.items()}


@contextmanager
def captured(model: nn.Module, names: Sequence[str], *, copy: bool) -> Iterator[dict[str, Tensor]]:
    """The outputs of these layers in the forward that the block runs. With `copy` as they were given: what follows may change
    them in place."""
    outputs: dict[str, Tensor] = {}

    def note(name: str, output: object) -> None:
        output = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(output, Tensor):
            outputs[name] = output.clone() if copy else output

    hooks = [
        expect_layer(model, name).register_forward_hook(lambda layer, given, output, name=name: note(name, output))
        for name in names
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
    if idle := [name for name in names if name not in outputs]:
        raise ConfigError(f"layer {idle[0]} isn't used in an evaluation, or gives no tensor")


def expect_layer(model: nn.Module, name: str) -> nn.Module:
    layers = dict(model.named_modules())
    if name in layers and name:
        return layers[name]
    near = get_close_matches(name, list(layers), n=3, cutoff=0.5) or list(dict(model.named_children()))
    raise ConfigError(f"{type(model).__name__} has no layer {name!r}; near it are {', '.join(near)}")


def as_map(output: Tensor) -> Tensor:
    """B C H W, from the same, from B H W C (as Swin has it), from tokens B N D, without those in front that are no patches, or
    from vectors B D. The image is a square, and so are its maps."""
    if output.ndim == 4:
        is_last = output.shape[1] == output.shape[2] != output.shape[3]
        return output.permute(0, 3, 1, 2) if is_last else output
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        return output[:, output.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))
    if output.ndim == 2:
        return output[:, :, None, None]
    raise ConfigError(f"a layer that gives {' x '.join(map(str, output.shape))} can't be drawn as a map")


def first_filters(model: nn.Module) -> tuple[str, Tensor] | None:
    """The first convolution, by its name, and its weights N C H W; None where there is none."""
    convolutions = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    name, layer = next(convolutions, (None, None))
    return (name, layer.weight.detach()) if layer is not None else None
