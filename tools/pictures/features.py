"""Feature maps of an image, from the stages of a model or any of its layers; and the filters of the first layer."""

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from engine.plots.images import show_image
from engine.plots.style import SHADES, new_figure, style
from tools.pictures.activations import first_filters, layer_maps, stage_maps
from tools.pictures.output import save_pictures
from tools.pictures.subject import model_title, open_classifier, read_files, read_samples, require_positive

MOST_FILTERS = 64


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    n_channels = require_positive("--channels", args.channels)
    trained = open_classifier(args, overrides)
    samples = read_files(trained, [args.image]) if args.image else read_samples(trained, args.split, [args.sample])
    with torch.no_grad():
        inputs = samples.batch[0][:1]
        maps = layer_maps(trained.model, inputs, args.layers) if args.layers else stage_maps(trained.model, inputs)
    maps = {name: of_layer[0] for name, of_layer in maps.items()}
    model = model_title(trained)
    figures = {"features": new_figure(show=args.show)}
    draw_maps(figures["features"], samples.images[0], maps, n_channels, f"{model}: features of {samples.names[0]}")
    if (first := first_filters(trained.model)) is not None:
        figures["filters"] = new_figure(show=args.show)
        draw_filters(figures["filters"], *first, title=model)
    save_pictures(figures, args, trained.run_dir, trained.step)


def draw_maps(figure: Figure, image: Tensor, maps: Mapping[str, Tensor], n_channels: int, title: str) -> None:
    """Draw the image and, at its right, a row for each layer, C H W: the channels that vary most over the image.

    If the channels are single numbers, all of them are drawn in a square.
    """
    with style(font_size=8):
        figure.set_size_inches(0.6 + 1.25 * (n_channels + 1), 0.5 + 1.45 * len(maps))
        grid = _empty_grid(figure, len(maps), n_channels + 1)
        show_image(grid[0, 0], image)
        for row, (name, layer) in zip(grid, maps.items(), strict=True):
            row[1].set_ylabel("{}\n{} x {}x{}".format(name, *layer.shape))
            values = layer.flatten(1)
            if values.shape[1] == 1:
                side = math.ceil(math.sqrt(len(values)))
                square = values.new_full((math.ceil(len(values) / side), side), math.nan)
                square.view(-1)[: len(values)] = values[:, 0]
                channels = [("all channels", square)]
            else:
                most = values.std(1).topk(min(n_channels, len(layer))).indices.sort().values.tolist()
                channels = [(f"channel {channel}", layer[channel]) for channel in most]
            for axes, (label, channel) in zip(row[1:], channels, strict=False):
                axes.imshow(channel.cpu().numpy(), cmap=SHADES)
                axes.set_title(label, fontsize=7)
        figure.suptitle(title, fontsize=10)


def draw_filters(figure: Figure, name: str, weights: Tensor, title: str) -> None:
    """Draw the filters, N C H W, with the largest weights: three channels in color, where gray is zero, or else their mean."""
    largest = weights.flatten(1).norm(dim=1).topk(min(MOST_FILTERS, len(weights))).indices.sort().values
    columns = min(16, len(largest))
    rows = math.ceil(len(largest) / columns)
    with style(font_size=7):
        figure.set_size_inches(max(4.5, 0.6 * columns), 0.7 + 0.75 * rows)
        grid = _empty_grid(figure, rows, columns)
        for axes, i in zip(grid.flat, largest.tolist(), strict=False):
            weight = weights[i].cpu()
            limit = float(weight.abs().max())
            if len(weight) == 3:
                show_image(axes, 0.5 + weight / (2 * limit))
            else:
                axes.imshow(weight.mean(0).numpy(), cmap=SHADES, vmin=-limit, vmax=limit)
            axes.set_title(str(i), fontsize=6, pad=2)
        some = f"{len(largest)} of {len(weights)}" if len(largest) < len(weights) else f"{len(weights)}"
        figure.suptitle(f"{title}: {name}, {some} filters {weights.shape[2]}x{weights.shape[3]}", fontsize=10)


def _empty_grid(figure: Figure, rows: int, columns: int) -> np.ndarray:
    """Return axes without ticks and frames."""
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    return grid
