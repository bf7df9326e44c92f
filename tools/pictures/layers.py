"""The layers of a model, measured: shapes, parameters, multiply-accumulates and time."""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from engine.run.macs import count

FORWARDS = 10  # that are timed, after one that isn't; the fastest counts, since it was disturbed least
WITHOUT_EFFECT = ("Identity", "Dropout", "DropPath", "StochasticDepth")  # in an evaluation


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str
    shape: tuple[int, ...] | None  # of what it gives for one image; None where an evaluation doesn't use it
    params: int
    macs: int
    seconds: float


@torch.no_grad()
def layers_of(model: nn.Module, inputs: Tensor, depth: int) -> list[Layer]:
    """The modules `depth` levels down, or above where there are no more, as they run. Each parameter is in one of them.

    The last layer is the whole; what is in none of the modules stands before it.
    """
    model.eval()
    shapes, seconds = _forwards(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about shapes that become constants
        counted = count(model, inputs.shape[1], inputs.shape[2])
    modules = dict(model.named_modules())
    layers = [
        Layer(
            name,
            type(modules[name]).__name__,
            shapes.get(name),
            sum(p.numel() for p in modules[name].parameters()),
            counted.modules.get(name, 0),
            seconds.get(name, 0.0),
        )
        for name in _parts(model, "", shapes, depth)
    ]
    layers = [layer for layer in layers if layer.params or layer.macs or layer.kind not in WITHOUT_EFFECT]
    order = list(shapes)
    layers.sort(key=lambda layer: order.index(layer.name) if layer.name in shapes else len(order))
    between = Layer(
        "elsewhere",
        "",
        None,
        counted.params - sum(layer.params for layer in layers),
        counted.macs - sum(layer.macs for layer in layers),
        max(0.0, seconds[""] - sum(layer.seconds for layer in layers)),
    )
    whole = Layer("all", type(model).__name__, shapes[""], counted.params, counted.macs, seconds[""])
    return [*layers, between, whole]


def _forwards(model: nn.Module, inputs: Tensor) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """Of every module that is used, in the order of their first use: the shape of its output, and its time in a forward."""
    shapes: dict[str, tuple[int, ...]] = {}
    begun: dict[str, float] = {}
    spent: dict[str, list[float]] = defaultdict(list)

    def begin(name: str) -> None:
        shapes.setdefault(name, ())
        _wait(inputs)
        begun[name] = perf_counter()

    def end(name: str, output: object) -> None:
        _wait(inputs)
        spent[name][-1] += perf_counter() - begun[name]
        output = output[0] if isinstance(output, (tuple, list)) else output
        shapes[name] = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda module, given, name=name: begin(name)))
        hooks.append(module.register_forward_hook(lambda module, given, output, name=name: end(name, output)))
    try:
        for _ in range(1 + FORWARDS):
            for name, _ in model.named_modules():
                spent[name].append(0.0)
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    fastest = min(range(1, 1 + FORWARDS), key=spent[""].__getitem__)
    return shapes, {name: times[fastest] for name, times in spent.items()}


def _wait(inputs: Tensor) -> None:
    if inputs.device.type != "cpu":
        torch.accelerator.synchronize()


def _parts(module: nn.Module, name: str, used: dict[str, tuple[int, ...]], depth: int) -> Iterator[str]:
    """Names that together hold every parameter of the submodules. What is never called itself, as a list, is taken apart."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".lstrip(".")
        has_more = any(True for _ in child.children())
        within = any(known.startswith(f"{path}.") for known in used)
        if has_more and within and (depth > 1 or path not in used):
            yield from _parts(child, path, used, depth - 1)
        else:
            yield path
