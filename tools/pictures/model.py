"""The architecture: the layers of a model as they run, with shapes, parameters, multiply-accumulates and time."""

import csv
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import load_config
from engine.config.errors import ConfigError, RunError
from engine.run.log import millions
from tools.pictures.output import add_output, deliver, expect_picture, new_figure
from tools.pictures.subject import expect_positive, open_source
from tools.tables import giga, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from tools.pictures.layers import Layer

EXAMPLES = """
It is printed as a table, and drawn; -o NAME.csv writes the table with whole numbers instead. The time is that of one image (or
--batch_size) on this machine, in the fastest of ten forwards; of a layer that is used more than once, all of them. No weights are
fetched, and no data is read.

examples:
  python tools/visualize.py model -c configs/resnet18_cifar10.yaml
  python tools/visualize.py model timm/convnext_tiny --depth 3
  python tools/visualize.py model runs/first -o layers.csv
"""
UNKNOWN_CLASSES = 1000  # where only the files of a data set say how many there are


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "model",
        help="the layers of a model, as a table",
        description=__doc__,
        epilog=EXAMPLES,
        usage="%(prog)s RUN_OR_MODEL | -c CONFIG [--depth N] [--batch_size N] [-o PATH.png|PATH.csv] [--show] "
        "[--key.sub value ...]",
    )
    parser.add_argument("source", nargs="?", metavar="RUN_OR_MODEL", help="a run, a checkpoint, or a name, as timm/resnet50")
    parser.add_argument("-c", "--config", help="the model of a config instead")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="how far modules are taken apart (default: 2)")
    parser.add_argument("--batch_size", type=int, default=1, metavar="N", help="images that are timed together (default: 1)")
    add_output(parser, "model.png, in figures/ of a run")
    parser.set_defaults(run=run, ema=False)


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    is_table = args.output is not None and args.output.suffix.lower() == ".csv"
    if not is_table:
        expect_picture(args.output)
    elif args.show:
        raise ConfigError(f"--show shows a picture, and -o {args.output} is a table")
    depth, batch_size = expect_positive("--depth", args.depth), expect_positive("--batch_size", args.batch_size)
    if (args.source is None) == (args.config is None):
        raise ConfigError("model: give either a run, a checkpoint, the name of a model, or -c CONFIG")

    import torch

    from tools.pictures.layers import layers_of

    subject = _of_config(args, overrides) if args.source is None else _of_source(args, overrides)
    size = subject.img_size
    inputs = torch.zeros(batch_size, subject.channels, size, size, device=next(subject.model.parameters()).device)
    layers = layers_of(subject.model, inputs, depth)
    print(plain([HEAD, *map(_row, layers)], right=(3, 4, 5)))
    if is_table:
        write_csv(args.output, layers)
        return 0
    images = f"{batch_size} image{'s' if batch_size > 1 else ''} of {size}x{size} on {inputs.device.type}"
    draw(figure := new_figure(args), layers, f"{subject.title}: {images}")
    deliver({"model": figure}, args, subject.run_dir, subject.step)
    return 0


@dataclass(frozen=True)
class Subject:
    model: "nn.Module"
    title: str
    channels: int
    img_size: int
    run_dir: Path | None = None
    step: int = 0


def _of_config(args: Namespace, overrides: dict[str, Any]) -> Subject:
    from engine.build import build_model, dataset_spec, described_data

    config = load_config(args.config, {**overrides, "model.pretrained": False})
    spec = dataset_spec(config)
    img_size = config.data.img_size or spec.img_size
    n_classes = config.data.n_classes or spec.n_classes or UNKNOWN_CLASSES
    model = build_model(config, described_data(config, [str(label) for label in range(n_classes)]))
    return Subject(model, config.model.name, spec.channels, img_size)


def _of_source(args: Namespace, overrides: dict[str, Any]) -> Subject:
    trained = open_source(args, {**overrides, "model.pretrained": False})
    channels = len(trained.prepare.mean)
    # without what Accelerate puts around its forward for another precision
    model = trained.accelerator.unwrap_model(trained.model, keep_fp32_wrapper=False).float()
    return Subject(model, trained.config.model.name, channels, trained.prepare.img_size, trained.run_dir, trained.step)


HEAD = ("layer", "kind", "output", "parameters", "MACs", "ms")


def _row(layer: "Layer") -> tuple[str, ...]:
    amounts = (millions(layer.params) if layer.params else "", _macs(layer.macs) if layer.macs else "")
    return layer.name, layer.kind, _shape(layer), *amounts, f"{1000 * layer.seconds:.2f}"


def _macs(n: int) -> str:
    return giga(n) if n >= 1e6 else millions(n)


def _shape(layer: "Layer") -> str:
    if layer.shape is None:
        return "not used in evaluation" if layer.kind else ""
    return " x ".join(map(str, layer.shape))


def write_csv(path: Path, layers: "Sequence[Layer]") -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(HEAD)
            for layer in layers:
                table.writerow([layer.name, layer.kind, _shape(layer), layer.params, layer.macs, f"{1000 * layer.seconds:.4f}"])
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from error
    print(f"wrote {path}")


def draw(figure: "Figure", layers: "Sequence[Layer]", title: str) -> None:
    """A bar for each layer in each of the three measures."""
    from engine.plots.style import COLORS, style

    *parts, whole = layers
    measures = {
        "parameters": ([part.params for part in parts], millions, whole.params),
        "MACs": ([part.macs for part in parts], _macs, whole.macs),
        "time": ([part.seconds for part in parts], lambda seconds: f"{1000 * seconds:.2f} ms", whole.seconds),
    }
    with style(font_size=8):
        figure.set_size_inches(11, 1.2 + 0.19 * len(parts))
        for axes, (name, (values, say, total)), color in zip(
            figure.subplots(1, 3, sharey=True), measures.items(), COLORS, strict=False
        ):
            bars = axes.barh(range(len(parts)), values, color=color)
            axes.bar_label(bars, [say(value) if value else "" for value in values], padding=2, fontsize=7)
            axes.set_title(f"{name}: {say(total)}", fontsize=9)
            axes.set(xticks=[], xlim=(0, 1.3 * max(values) or 1))
            axes.tick_params(left=False)
            axes.grid(False)
            axes.margins(y=0.01)
        names = [f"{part.name}  ({part.kind}: {_shape(part)})" if part.kind else part.name for part in parts]
        figure.axes[0].set_yticks(range(len(parts)), names)
        figure.axes[0].invert_yaxis()
        figure.suptitle(title, fontsize=10)
