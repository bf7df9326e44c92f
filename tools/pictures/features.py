"""The feature maps of a model's stages, or of any of its layers, for an image; and the filters of its first layer."""

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tools.pictures.output import add_output, deliver, new_figure
from tools.pictures.subject import (
    SOURCE,
    USAGE,
    add_source,
    add_split,
    expect_classes,
    expect_positive,
    files_of,
    name_of,
    open_source,
    samples_of,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

EXAMPLES = """
A row holds the channels of a layer that differ most over the image, each scaled to its own range. `visualize.py model` names the
layers.

examples:
  python tools/visualize.py features runs/first
  python tools/visualize.py features runs/first photo.jpg --layers layer1.0.conv1 layer4 --channels 12
  python tools/visualize.py features resnet50 photo.jpg
"""
MOST_FILTERS = 64


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "features",
        help="feature maps of an image, and the filters of the first layer",
        description=__doc__,
        epilog=SOURCE + EXAMPLES,
        usage="%(prog)s RUN_OR_MODEL [IMAGE] [--sample I] [--split SPLIT] [--layers NAME ...] [--channels N] " + USAGE,
    )
    add_source(parser)
    add_split(parser)
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="a file; without it, a sample of the split")
    parser.add_argument("--sample", type=int, default=0, metavar="I", help="which of the split, counted from 0 (default: 0)")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="instead of the stages")
    parser.add_argument("--channels", type=int, default=8, metavar="N", help="of each layer (default: 8)")
    add_output(parser, "features.png, in figures/ of a run, and filters.png beside it")
    parser.set_defaults(run=run)


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    import torch

    from tools.pictures.activations import first_filters, layer_maps, stage_maps

    n_channels = expect_positive("--channels", args.channels)
    trained = open_source(args, overrides)
    expect_classes(trained.task, trained.config, "features")
    subject = files_of(trained, [args.image]) if args.image else samples_of(trained, args.split, [args.sample])
    with torch.no_grad():
        inputs = subject.inputs[:1]
        maps = layer_maps(trained.model, inputs, args.layers) if args.layers else stage_maps(trained.model, inputs)
    title = f"{name_of(trained)}: features of {subject.names[0]}"
    of_image = {name: of_layer[0].cpu() for name, of_layer in maps.items()}
    draw_maps(figure := new_figure(args), subject.images[0].cpu(), of_image, n_channels, title)
    figures = {"features": figure}
    if (first := first_filters(trained.model)) is not None:
        draw_filters(figure := new_figure(args), *first, title=name_of(trained))
        figures["filters"] = figure
    deliver(figures, args, trained.run_dir, trained.step)
    return 0


def draw_maps(figure: "Figure", image: "Tensor", maps: "Mapping[str, Tensor]", n_channels: int, title: str) -> None:
    """The image, and beside it a row for each layer, C H W."""
    from engine.plots.images import show_image
    from engine.plots.style import SHADES, style

    with style(font_size=8):
        figure.set_size_inches(0.6 + 1.25 * (n_channels + 1), 0.5 + 1.45 * len(maps))
        grid = _grid_without_axes(figure, len(maps), n_channels + 1)
        show_image(grid[0, 0], image)
        for row, (name, of_layer) in zip(grid, maps.items(), strict=True):
            row[1].set_ylabel("{}\n{} x {}x{}".format(name, *of_layer.shape))
            for axes, (said, of_channel) in zip(row[1:], _chosen(of_layer, n_channels), strict=False):
                axes.imshow(of_channel.numpy(), cmap=SHADES)
                axes.set_title(said, fontsize=7)
        figure.suptitle(title, fontsize=10)


def _chosen(of_layer: "Tensor", n: int) -> list[tuple[str, "Tensor"]]:
    """The channels, of C H W, that differ most over the image; where each is a single number, all of them, in rows."""
    values = of_layer.flatten(1)
    if values.shape[1] == 1:
        return [("all channels", _in_rows(values[:, 0]))]
    most = values.std(1).topk(min(n, len(of_layer))).indices.sort().values.tolist()
    return [(f"channel {channel}", of_layer[channel]) for channel in most]


def _in_rows(vector: "Tensor") -> "Tensor":
    """As good as a square, with NaN after its end."""
    side = math.ceil(math.sqrt(len(vector)))
    square = vector.new_full((math.ceil(len(vector) / side), side), math.nan)
    square.view(-1)[: len(vector)] = vector
    return square


def draw_filters(figure: "Figure", name: str, weights: "Tensor", title: str) -> None:
    """Those with the largest weights, N C H W. With three channels in color, gray being zero; else the mean of the channels."""
    from engine.plots.images import show_image
    from engine.plots.style import SHADES, style

    largest = weights.flatten(1).norm(dim=1).topk(min(MOST_FILTERS, len(weights))).indices.sort().values
    chosen = weights[largest].cpu()
    columns = min(16, len(chosen))
    rows = -(-len(chosen) // columns)
    with style(font_size=7):
        figure.set_size_inches(max(4.5, 0.6 * columns), 0.7 + 0.75 * rows)
        grid = _grid_without_axes(figure, rows, columns)
        for axes, number, weight in zip(grid.flat, largest.tolist(), chosen, strict=False):
            limit = weight.abs().max()
            if len(weight) == 3:
                show_image(axes, 0.5 + weight / (2 * limit))
            else:
                axes.imshow(weight.mean(0).numpy(), cmap=SHADES, vmin=-limit, vmax=limit)
            axes.set_title(str(number), fontsize=6, pad=2)
        some = f"{len(chosen)} of {len(weights)}" if len(chosen) < len(weights) else f"{len(weights)}"
        figure.suptitle(f"{title}: {name}, {some} filters {weights.shape[2]}x{weights.shape[3]}", fontsize=10)


def _grid_without_axes(figure: "Figure", rows: int, columns: int) -> "np.ndarray":
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    return grid
