"""The confusion matrix of a split, and the accuracy of each class; of a multi-label model, the mistakes for each label."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from engine.plots.images import short
from engine.plots.style import COLORS, INK, new_figure, style
from engine.tasks.multilabel import MultiLabel
from tools.pictures.output import save_pictures
from tools.pictures.subject import evaluate_with, model_title, open_source, require_classification

MOST_IN_MATRIX = 120  # classes; of more, the most frequent mistakes are listed
MOST_IN_PERCENT = 20  # classes whose cells have room for a percentage, too
LISTED = 30


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    trained = open_source(args, overrides)
    is_multilabel = isinstance(trained.task, MultiLabel)
    if not is_multilabel:
        require_classification(trained.task, trained.config, args.picture)
    metrics = evaluate_with(trained, args.split, "confusion")
    figure, title = new_figure(show=args.show), f"{model_title(trained)}, {args.split}"
    if is_multilabel:
        title += f": mAP {100 * metrics['mAP']:.2f} % on {metrics['count']:,} images"
        draw_labels(figure, metrics["confusion"], title)
    else:
        title += f": accuracy {100 * metrics['acc@1']:.2f} % of {metrics['count']:,} images"
        draw(figure, np.array(metrics["confusion"]), trained.classes, title)
    save_pictures({"confusion": figure}, args, trained.run_dir, trained.step)


def draw(figure: Figure, counts: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Draw counts of true classes (rows) and predicted ones."""
    totals = counts.sum(1)
    accuracies = np.where(totals > 0, 100 * counts.diagonal() / np.maximum(totals, 1), np.nan)
    if len(classes) > MOST_IN_MATRIX:
        _draw_lists(figure, counts, accuracies, classes, title)
    else:
        _draw_matrix(figure, counts, accuracies, classes, title)


def draw_labels(figure: Figure, counts: Mapping[str, Sequence[Sequence[int]]], title: str) -> None:
    """Draw for each label how often it was found, missed and found where it isn't; the most frequent ones if there are many."""
    rows = sorted(counts.items(), key=lambda row: -sum(row[1][1]))[:MOST_IN_MATRIX]
    parts = {
        "found": (COLORS[5], [there[1] for _, (_, there) in rows]),
        "missed": (COLORS[4], [there[0] for _, (_, there) in rows]),
        "wrongly found": (COLORS[1], [absent[1] for _, (absent, _) in rows]),
    }
    with style(font_size=9):
        figure.set_size_inches(8, 1.6 + 0.24 * len(rows))
        axes, begin = figure.subplots(), np.zeros(len(rows))
        for name, (color, values) in parts.items():
            bars = axes.barh(range(len(rows)), values, left=begin, color=color, label=name)
            axes.bar_label(bars, [f"{value:,}" if value else "" for value in values], label_type="center")
            begin += values
        axes.set_yticks(range(len(rows)), [short(name, 28) for name, _ in rows])
        axes.set(xlabel="images")
        axes.grid(False, axis="y")
        axes.margins(y=0.01)
        axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=10)


def _draw_matrix(figure: Figure, counts: np.ndarray, accuracies: np.ndarray, classes: Sequence[str], title: str) -> None:
    n = len(classes)
    side = max(4.5, min(0.62 * n, 6 + 0.16 * n))  # of the matrix, in inches
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with style(font_size=min(9, 33 * side / n), label_size=max(9, 0.6 * side)):
        figure.set_size_inches(1.3 * side + 2.2, side + 1.4)
        matrix, bars = figure.subplots(1, 2, width_ratios=(4, 1), sharey=True)
        image = matrix.imshow(percent, cmap=INK, vmin=0, vmax=100, aspect="auto")
        figure.colorbar(image, ax=matrix, label="% of the true class", fraction=0.04, pad=0.01)
        matrix.grid(False)
        matrix.set(xlabel="predicted class", ylabel="true class")
        names = [short(name) for name in classes]
        matrix.set_xticks(range(n), names, rotation=90)
        matrix.set_yticks(range(n), names)
        for row, column in np.argwhere(counts).tolist():
            text = f"{counts[row, column]}" + (f"\n{percent[row, column]:.0f} %" if n <= MOST_IN_PERCENT else "")
            color = "white" if percent[row, column] > 55 else "black"
            matrix.text(column, row, text, ha="center", va="center", color=color)
        bars.barh(range(n), accuracies, color=COLORS[5])
        bars.axvline(np.nanmean(accuracies), color=COLORS[1], linestyle="--")
        bars.set(xlim=(0, 100), xlabel="accuracy (%)\ndashed: mean")
        bars.tick_params(left=False, labelleft=False)
        bars.grid(False, axis="y")
        for row, value in enumerate(accuracies):
            bars.text(2, row, "no sample" if np.isnan(value) else f"{value:.0f}", va="center")
        figure.suptitle(title, fontsize=max(10, 0.8 * side))


def _draw_lists(figure: Figure, counts: np.ndarray, accuracies: np.ndarray, classes: Sequence[str], title: str) -> None:
    """List the most frequent confusions, and the classes with the lowest accuracy."""
    mistakes = counts - np.diag(counts.diagonal())
    places = np.argsort(-mistakes, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(place, len(classes)) for place in places.tolist() if mistakes.flat[place] > 0]
    worst = [c for c in np.argsort(accuracies, kind="stable")[:LISTED].tolist() if not np.isnan(accuracies[c])]
    names = [short(name, 28) for name in classes]
    lists: Sequence[tuple[str, list[str], list[float], str]] = (
        ("images", [f"{names[a]} taken for {names[b]}" for a, b in pairs], [mistakes[pair] for pair in pairs], COLORS[1]),
        ("accuracy (%)", [names[c] for c in worst], [accuracies[c] for c in worst], COLORS[5]),
    )
    with style(font_size=9):
        figure.set_size_inches(13, 1.2 + 0.24 * LISTED)
        for axes, (unit, labels, values, color) in zip(figure.subplots(1, 2), lists, strict=True):
            axes.bar_label(axes.barh(range(len(values)), values, color=color), fmt="{:.0f}", padding=2)
            axes.set_yticks(range(len(labels)), labels)
            axes.set(xlabel=unit, xlim=(0, 1.1 * max(values, default=1)))
            axes.grid(False, axis="y")
            axes.margins(y=0.01)
            axes.invert_yaxis()
        figure.suptitle(f"{title}; the most frequent confusions, and the classes with the lowest accuracy", fontsize=10)
