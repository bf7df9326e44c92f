"""The layers of a model, measured: shapes, parameters, multiply-accumulates and time."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from engine.run.macs import count

FORWARDS = 10  # that are timed, after one for warm-up; the fastest counts, as the least disturbed one
WITHOUT_EFFECT = ("Identity", "Dropout", "DropPath", "StochasticDepth")  # in evaluation mode


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str
    shape: tuple[int, ...] | None  # of the output for one image; None if unused in evaluation mode
    params: int
    macs: int
    seconds: float


@torch.no_grad()
def layers_of(model: nn.Module, inputs: Tensor, depth: int) -> list[Layer]:
    """Measure the modules `depth` levels down, or above if there are fewer levels, in execution order.

    Each parameter is in one of them. Two layers follow: "elsewhere", the work outside these modules, and "all", the model.
    """
    model.eval()
    shapes, seconds = _time_forwards(model, inputs)
    counted = count(model, inputs.shape[1], inputs.shape[2])
    layers = []
    for name in _names(model, "", shapes, depth):
        module = model.get_submodule(name)
        params, macs = sum(p.numel() for p in module.parameters()), counted.modules.get(name, 0)
        if params or macs or type(module).__name__ not in WITHOUT_EFFECT:
            layers.append(Layer(name, type(module).__name__, shapes.get(name), params, macs, seconds.get(name, 0.0)))
    order = {name: i for i, name in enumerate(shapes)}
    layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    params = counted.params - sum(layer.params for layer in layers)
    macs = counted.macs - sum(layer.macs for layer in layers)
    elsewhere = Layer("elsewhere", "", None, params, macs, max(0.0, seconds[""] - sum(layer.seconds for layer in layers)))
    whole = Layer("all", type(model).__name__, shapes[""], counted.params, counted.macs, seconds[""])
    return [*layers, elsewhere, whole]


def _time_forwards(model: nn.Module, inputs: Tensor) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """The output shape and the time of every module that is called, in the order of the first calls."""
    shapes: dict[str, tuple[int, ...]] = {}
    started: dict[str, float] = {}
    times: dict[str, list[float]] = defaultdict(list)  # of each module, in each forward pass

    def start(name: str) -> None:
        shapes.setdefault(name, ())
        _synchronize(inputs)
        started[name] = perf_counter()

    def stop(name: str, output: object) -> None:
        _synchronize(inputs)
        times[name][-1] += perf_counter() - started[name]
        output = output[0] if isinstance(output, (tuple, list)) else output
        shapes[name] = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda module, inputs, name=name: start(name)))
        hooks.append(module.register_forward_hook(lambda module, inputs, output, name=name: stop(name, output)))
    try:
        for _ in range(1 + FORWARDS):
            for name, _ in model.named_modules():
                times[name].append(0.0)
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    fastest = min(range(1, 1 + FORWARDS), key=times[""].__getitem__)
    return shapes, {name: of_module[fastest] for name, of_module in times.items()}


def _synchronize(inputs: Tensor) -> None:
    if inputs.device.type != "cpu":
        torch.accelerator.synchronize()


def _names(module: nn.Module, prefix: str, called: Collection[str], depth: int) -> Iterator[str]:
    """Names of submodules that together have every parameter. Containers that are never called, such as lists, add no level."""
    for child_name, child in module.named_children():
        name = f"{prefix}.{child_name}".lstrip(".")
        has_children = any(True for _ in child.children())
        calls_children = any(other.startswith(f"{name}.") for other in called)
        if has_children and calls_children and (depth > 1 or name not in called):
            yield from _names(child, name, called, depth - 1)
        else:
            yield name
