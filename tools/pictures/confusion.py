"""The confusion matrix of a split, and the accuracy of each class."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tools.pictures.output import add_output, deliver, new_figure
from tools.pictures.subject import SOURCE, USAGE, add_source, add_split, expect_classes, name_of, open_source

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from engine.inference.trained import Trained

EXAMPLES = """
A row is what an image shows, a column what it is taken for; the shade is the part of the row, the number how many images.
`tools/evaluate.py RUN --json --confusion --per_class` prints the numbers.

examples:
  python tools/visualize.py confusion runs/first
  python tools/visualize.py confusion runs/first --split test -o confusion.pdf
  python tools/visualize.py confusion resnet50 -c configs/resnet50_imagenet.yaml
"""
MOST_NUMBERED, MOST_IN_PERCENT = 120, 20  # classes, of which each cell has room for the number, and for the part
LISTED = 30  # where a matrix would be too large


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "confusion",
        help="the confusion matrix and the accuracy of each class",
        description=__doc__,
        epilog=SOURCE + EXAMPLES,
        usage="%(prog)s RUN_OR_MODEL [--split SPLIT] " + USAGE,
    )
    add_source(parser)
    add_split(parser)
    add_output(parser, "confusion.png, in figures/ of a run")
    parser.set_defaults(run=run)


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    trained = open_source(args, overrides)
    expect_classes(trained.task, trained.config, "confusion")
    counts, metrics = confusion(trained, args.split)
    title = f"{name_of(trained)}, {args.split}: accuracy {100 * metrics['acc@1']:.2f} % of {metrics['count']:,} images"
    draw(figure := new_figure(args), counts, trained.classes, title)
    deliver({"confusion": figure}, args, trained.run_dir, trained.step)
    return 0


def confusion(trained: "Trained", split: str) -> "tuple[np.ndarray, dict[str, Any]]":
    """How often each class (row) is taken for each other, and the other metrics."""
    import numpy as np

    metrics = replace(trained, task=trained.task.with_tables("confusion")).evaluate(split)
    return np.array(metrics["confusion"]), metrics


def draw(figure: "Figure", counts: "np.ndarray", classes: Sequence[str], title: str) -> None:
    if len(classes) > MOST_NUMBERED:
        _draw_lists(figure, counts, classes, title)
        return
    from engine.plots.style import style

    n = len(classes)
    side = max(4.5, min(0.62 * n, 6 + 0.16 * n))  # of the matrix, in inches
    with style(font_size=min(9, 33 * side / n), label_size=max(9, 0.6 * side)):
        figure.set_size_inches(1.3 * side + 2.2, side + 1.4)
        matrix, bars = figure.subplots(1, 2, width_ratios=(4, 1), sharey=True)
        _draw_matrix(figure, matrix, counts, classes)
        _draw_accuracies(bars, counts)
        figure.suptitle(title, fontsize=max(10, 0.8 * side))


def accuracies(counts: "np.ndarray") -> "np.ndarray":
    """Of each class, in percent; NaN where it has no image."""
    import numpy as np

    totals = counts.sum(1)
    return np.where(totals > 0, 100 * counts.diagonal() / np.maximum(totals, 1), np.nan)


def _draw_lists(figure: "Figure", counts: "np.ndarray", classes: Sequence[str], title: str) -> None:
    """The most frequent confusions, and the classes that are recognized least."""
    import numpy as np

    from engine.plots.images import short
    from engine.plots.style import COLORS, style

    others = counts - np.diag(counts.diagonal())
    pairs = np.dstack(np.unravel_index(np.argsort(-others, axis=None, kind="stable")[:LISTED], others.shape))[0]
    pairs = [pair for pair in pairs if others[tuple(pair)] > 0]
    of_class = accuracies(counts)
    worst = [c for c in np.argsort(of_class, kind="stable")[:LISTED] if not np.isnan(of_class[c])]
    confused = [f"{short(classes[true], 28)} taken for {short(classes[said], 28)}" for true, said in pairs]
    lists = (
        ("images", confused, [others[tuple(pair)] for pair in pairs], COLORS[1]),
        ("accuracy (%)", [short(classes[c], 28) for c in worst], of_class[worst], COLORS[5]),
    )
    with style(font_size=9):
        figure.set_size_inches(13, 1.2 + 0.24 * LISTED)
        for axes, (unit, names, values, color) in zip(figure.subplots(1, 2), lists, strict=True):
            axes.bar_label(axes.barh(range(len(values)), values, color=color), fmt="{:.0f}", padding=2)
            axes.set_yticks(range(len(names)), names)
            axes.set(xlabel=unit, xlim=(0, 1.1 * max(values, default=1)))
            axes.grid(False, axis="y")
            axes.margins(y=0.01)
            axes.invert_yaxis()
        figure.suptitle(f"{title}; the most frequent confusions, and the classes that are recognized least", fontsize=10)


def _draw_matrix(figure: "Figure", axes: "Axes", counts: "np.ndarray", classes: Sequence[str]) -> None:
    import numpy as np

    from engine.plots.images import short
    from engine.plots.style import INK

    n = len(classes)
    of_row = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(of_row, cmap=INK, vmin=0, vmax=100, aspect="auto")
    figure.colorbar(image, ax=axes, label="% of the true class", fraction=0.04, pad=0.01)
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    names = [short(name) for name in classes]
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    for row, column in zip(*(place.tolist() for place in np.nonzero(counts)), strict=True):
        color = "white" if of_row[row, column] > 55 else "black"
        said = f"{counts[row, column]}" + (f"\n{of_row[row, column]:.0f} %" if n <= MOST_IN_PERCENT else "")
        axes.text(column, row, said, ha="center", va="center", color=color)


def _draw_accuracies(axes: "Axes", counts: "np.ndarray") -> None:
    import numpy as np

    from engine.plots.style import COLORS

    of_class = accuracies(counts)
    axes.barh(range(len(of_class)), of_class, color=COLORS[5])
    axes.axvline(np.nanmean(of_class), color=COLORS[1], linestyle="--")
    axes.set(xlim=(0, 100), xlabel="accuracy (%)\ndashed: mean")
    axes.tick_params(left=False, labelleft=False)
    axes.grid(False, axis="y")
    for row, value in enumerate(of_class):
        axes.text(2, row, "no sample" if np.isnan(value) else f"{value:.0f}", va="center")
