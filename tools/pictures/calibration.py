"""The reliability diagram of Guo, Pleiss, Sun, Weinberger (2017)."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from engine.plots.style import COLORS, WRONG, new_figure, style
from tools.pictures.output import save_pictures
from tools.pictures.subject import evaluate_with, model_title, open_classifier


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    trained = open_classifier(args, overrides)
    metrics = evaluate_with(trained, args.split, "bins")
    title = f"{model_title(trained)}, {args.split}: ECE {100 * metrics['ece']:.2f} %, accuracy {100 * metrics['acc@1']:.2f} %"
    draw(figure := new_figure(show=args.show), metrics["bins"], title)
    save_pictures({"calibration": figure}, args, trained.run_dir, trained.step)


def draw(figure: Figure, bins: Sequence[Mapping[str, float] | None], title: str) -> None:
    """Draw the accuracy in each bin of confidence, its gap to the mean confidence and, below, the share of images."""
    width = 100 / len(bins)
    filled = [(i * width, values) for i, values in enumerate(bins) if values is not None]
    left = [at for at, _ in filled]
    accuracy, confidence = ([100 * values[name] for _, values in filled] for name in ("acc@1", "confidence"))
    gaps = [sure - right for sure, right in zip(confidence, accuracy, strict=True)]
    n = sum(values["count"] for _, values in filled)
    bar: dict[str, Any] = {"width": width, "align": "edge", "linewidth": 0.6}
    hatched = {"label": "gap to the confidence", "facecolor": "none", "edgecolor": WRONG, "hatch": "///", **bar}
    with style():
        figure.set_size_inches(5.6, 6.4)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.bar(left, accuracy, color=COLORS[5], edgecolor="white", label="accuracy", **bar)
        above.bar(left, gaps, bottom=accuracy, **hatched)
        above.plot([0, 100], [0, 100], color="black", linestyle="--", linewidth=1, label="perfectly calibrated")
        above.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, 100))
        below.bar(left, [100 * values["count"] / n for _, values in filled], color="gray", edgecolor="white", **bar)
        below.set(xlabel="confidence (%)", ylabel="images (%)")
        figure.legend(loc="outside lower center", ncols=3)
        figure.suptitle(title, fontsize=10)
