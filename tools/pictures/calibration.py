"""The reliability diagram: how often a model is right, among predictions of which it is about equally sure.

Guo, Pleiss, Sun, Weinberger (2017): On Calibration of Modern Neural Networks. https://arxiv.org/abs/1706.04599
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tools.pictures.output import add_output, deliver, new_figure
from tools.pictures.subject import SOURCE, USAGE, add_source, add_split, expect_classes, name_of, open_source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engine.inference.trained import Trained

EXAMPLES = """
A model is well calibrated where the bars end on the diagonal: of the predictions of which it is 80 % sure, 80 % are right. The
expected calibration error (ECE) is the mean distance from it, and the number that evaluate.py and a training report.

examples:
  python tools/visualize.py calibration runs/first
  python tools/visualize.py calibration runs/first --split test -o calibration.pdf
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "calibration",
        help="the reliability diagram",
        description=__doc__,
        epilog=SOURCE + EXAMPLES,
        usage="%(prog)s RUN_OR_MODEL [--split SPLIT] " + USAGE,
    )
    add_source(parser)
    add_split(parser)
    add_output(parser, "calibration.png, in figures/ of a run")
    parser.set_defaults(run=run)


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    trained = open_source(args, overrides)
    expect_classes(trained.task, trained.config, "calibration")
    metrics = reliability(trained, args.split)
    title = f"{name_of(trained)}, {args.split}: ECE {100 * metrics['ece']:.2f} %, accuracy {100 * metrics['acc@1']:.2f} %"
    draw(figure := new_figure(args), metrics["bins"], title)
    deliver({"calibration": figure}, args, trained.run_dir, trained.step)
    return 0


def reliability(trained: "Trained", split: str) -> dict[str, Any]:
    """The metrics of an evaluation, with its `bins`."""
    return replace(trained, task=trained.task.with_tables("bins")).evaluate(split)


def draw(figure: "Figure", bins: Sequence[Mapping[str, float] | None], title: str) -> None:
    """Above, the accuracy in each bin of confidence, and how far it is from the mean confidence there; below, its images."""
    from engine.plots.style import COLORS, WRONG, style

    width = 100 / len(bins)
    filled = [(i * width, found) for i, found in enumerate(bins) if found is not None]
    left = [at for at, _ in filled]
    accuracy, confidence = ([100 * found[name] for _, found in filled] for name in ("acc@1", "confidence"))
    n = sum(found["count"] for _, found in filled)
    how = {"width": width, "align": "edge", "edgecolor": "white", "linewidth": 0.6}
    with style():
        figure.set_size_inches(5.6, 6.4)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.bar(left, accuracy, color=COLORS[5], label="accuracy", **how)
        gaps = [sure - right for sure, right in zip(confidence, accuracy, strict=True)]
        above.bar(
            left,
            gaps,
            bottom=accuracy,
            label="gap to the confidence",
            **{**how, "facecolor": "none", "edgecolor": WRONG, "hatch": "///"},
        )
        above.plot([0, 100], [0, 100], color="black", linestyle="--", linewidth=1, label="perfectly calibrated")
        above.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, 100))
        below.bar(left, [100 * found["count"] / n for _, found in filled], color="gray", **how)
        below.set(xlabel="confidence (%)", ylabel="images (%)")
        figure.legend(loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=10)
