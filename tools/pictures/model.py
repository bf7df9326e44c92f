"""The layers of a model in execution order, with shapes, parameters, multiply-accumulates and time."""

import csv
import io
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from engine import load_config
from engine.build import build_model, dataset_spec, described_data
from engine.config.errors import ConfigError
from engine.config.schema import Config
from engine.plots.style import COLORS, new_figure, style
from engine.run.log import millions
from engine.run.macs import count
from tools.pictures.output import check_picture_path, save_pictures
from tools.pictures.subject import open_source, require_positive
from tools.tables import giga, plain, write_text

UNKNOWN_CLASSES = 1000  # if the number of classes depends on the files of a dataset
FORWARDS = 10  # that are timed, after one for warm-up; the fastest counts, as the least disturbed one
WITHOUT_EFFECT = ("Identity", "Dropout", "DropPath", "StochasticDepth")  # in evaluation mode
HEAD = ("layer", "kind", "output", "parameters", "MACs", "ms")


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str
    shape: tuple[int, ...] | None  # of the output for one image; None if unused in evaluation mode
    params: int
    macs: int
    seconds: float


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    is_table = args.output is not None and args.output.suffix.lower() == ".csv"
    if not is_table:
        check_picture_path(args.output)
    elif args.show:
        raise ConfigError(f"--show shows a picture, and -o {args.output} is a table")
    depth, batch_size = require_positive("--depth", args.depth), require_positive("--batch_size", args.batch_size)
    if (args.source is None) == (args.config is None):
        raise ConfigError("model: give either a run, a checkpoint, the name of a model, or -c CONFIG")
    overrides = {**overrides, "model.pretrained": False}
    run_dir, step = None, 0
    config: Config
    if args.source is None:
        config = load_config(args.config, overrides)
        spec = dataset_spec(config)
        channels, size = spec.channels, config.data.img_size or spec.img_size
        n_classes = config.data.n_classes or spec.n_classes or UNKNOWN_CLASSES
        model = build_model(config, described_data(config, [str(label) for label in range(n_classes)]))
    else:
        trained = open_source(args, overrides)
        config, run_dir, step = trained.config, trained.run_dir, trained.step
        channels, size = len(trained.prepare.mean), trained.prepare.img_size
        # without Accelerate's mixed precision wrapper around forward
        model = trained.accelerator.unwrap_model(trained.model, keep_fp32_wrapper=False).float()
    inputs = torch.zeros(batch_size, channels, size, size, device=next(model.parameters()).device)
    layers = layers_of(model, inputs, depth)
    print(plain(as_rows(layers, exact=False), right=(3, 4, 5)))
    if is_table:
        csv.writer(text := io.StringIO(newline="")).writerows(as_rows(layers, exact=True))
        write_text(args.output, text.getvalue())
        return
    images = f"{batch_size} image{'s' if batch_size > 1 else ''} of {size}x{size} on {inputs.device.type}"
    draw(figure := new_figure(show=args.show), layers, f"{config.model.name}: {images}")
    save_pictures({"model": figure}, args, run_dir, step)


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

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda module, inputs, name=name: start(name))
            after = module.register_forward_hook(lambda module, inputs, output, name=name: stop(name, output))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        for _ in range(1 + FORWARDS):
            for name, _ in model.named_modules():
                times[name].append(0.0)
            model(inputs)
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


def as_rows(layers: Sequence[Layer], *, exact: bool) -> list[list[str]]:
    """Return the table, head first; `exact` numbers are for programs."""
    rows = [list(HEAD)]
    for layer in layers:
        if exact:
            amounts = [str(layer.params), str(layer.macs), f"{1000 * layer.seconds:.4f}"]
        else:
            counts = [millions(layer.params) if layer.params else "", _macs(layer.macs) if layer.macs else ""]
            amounts = [*counts, f"{1000 * layer.seconds:.2f}"]
        rows.append([layer.name, layer.kind, _shape(layer), *amounts])
    return rows


def _macs(n: float) -> str:
    return giga(n) if n >= 1e6 else millions(int(n))


def _shape(layer: Layer) -> str:
    if layer.shape is None:
        return "not used in evaluation" if layer.kind else ""
    return " x ".join(map(str, layer.shape))


def draw(figure: Figure, layers: Sequence[Layer], title: str) -> None:
    """Draw a bar for each layer in each of the three measures."""
    *parts, whole = layers
    measures: Sequence[tuple[str, Callable[[Layer], float], Callable[[float], str]]] = (
        ("parameters", lambda layer: layer.params, lambda n: millions(int(n))),
        ("MACs", lambda layer: layer.macs, _macs),
        ("time", lambda layer: layer.seconds, lambda seconds: f"{1000 * seconds:.2f} ms"),
    )
    with style(font_size=8):
        figure.set_size_inches(11, 1.2 + 0.19 * len(parts))
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (name, measure, as_text), color in zip(panels, measures, COLORS, strict=False):
            values = [measure(part) for part in parts]
            bars = axes.barh(range(len(parts)), values, color=color)
            axes.bar_label(bars, [as_text(value) if value else "" for value in values], padding=2, fontsize=7)
            axes.set_title(f"{name}: {as_text(measure(whole))}", fontsize=9)
            axes.set(xticks=[], xlim=(0, 1.3 * max(values) or 1))
            axes.tick_params(left=False)
            axes.grid(False)
            axes.margins(y=0.01)
        names = [f"{part.name}  ({part.kind}: {_shape(part)})" if part.kind else part.name for part in parts]
        panels[0].set_yticks(range(len(parts)), names)
        panels[0].invert_yaxis()
        figure.suptitle(title, fontsize=10)
