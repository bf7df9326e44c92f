"""The layers of a model in execution order, with shapes, parameters, multiply-accumulates and time."""

import csv
import io
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from engine import load_config
from engine.build import build_model, dataset_spec, described_data
from engine.config.errors import ConfigError
from engine.config.schema import Config
from engine.plots.style import COLORS, new_figure, style
from engine.run.log import millions
from tools.pictures.layers import Layer, layers_of
from tools.pictures.output import check_picture_path, save_pictures
from tools.pictures.subject import open_source, require_positive
from tools.tables import giga, plain, write_text

UNKNOWN_CLASSES = 1000  # if the number of classes depends on the files of a dataset
HEAD = ("layer", "kind", "output", "parameters", "MACs", "ms")


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
    print(plain([HEAD, *map(_row, layers)], right=(3, 4, 5)))
    if is_table:
        write_text(args.output, as_csv(layers))
        return
    images = f"{batch_size} image{'s' if batch_size > 1 else ''} of {size}x{size} on {inputs.device.type}"
    draw(figure := new_figure(show=args.show), layers, f"{config.model.name}: {images}")
    save_pictures({"model": figure}, args, run_dir, step)


def _row(layer: Layer) -> tuple[str, ...]:
    amounts = (millions(layer.params) if layer.params else "", _macs(layer.macs) if layer.macs else "")
    return layer.name, layer.kind, _shape(layer), *amounts, f"{1000 * layer.seconds:.2f}"


def _macs(n: float) -> str:
    return giga(n) if n >= 1e6 else millions(int(n))


def _shape(layer: Layer) -> str:
    if layer.shape is None:
        return "not used in evaluation" if layer.kind else ""
    return " x ".join(map(str, layer.shape))


def as_csv(layers: Sequence[Layer]) -> str:
    table = csv.writer(text := io.StringIO(newline=""))
    table.writerow(HEAD)
    for layer in layers:
        table.writerow([layer.name, layer.kind, _shape(layer), layer.params, layer.macs, f"{1000 * layer.seconds:.4f}"])
    return text.getvalue()


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
