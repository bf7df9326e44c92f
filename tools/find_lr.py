#!/usr/bin/env python
"""Find a learning rate: train a few updates with a rising rate, and find the lowest loss before it diverges.

Smith (2017): Cyclical Learning Rates for Training Neural Networks. https://arxiv.org/abs/1506.01186
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.config.errors import ConfigError, RunError
from engine.plugins import Parser
from tools.pictures.output import add_output, check_picture_path, save_pictures
from tools.tables import print_lines

if TYPE_CHECKING:  # functions import what needs torch, so that --help doesn't
    from matplotlib.figure import Figure

    from engine.build import Run

EXAMPLES = """
Everything else comes from the config: optimizer, batch, augmentation, precision. Only the picture is saved.

examples:
  python tools/find_lr.py -c configs/lenet_digits.yaml
  python tools/find_lr.py -c configs/resnet18_cifar10.yaml --train.optim.type AdamW --lowest 1e-7 --highest 1 -o adamw.png
"""
SMOOTHING = 0.9  # of the loss, by an exponential moving average
DIVERGED = 4.0  # times the lowest loss so far
SAFETY = 10.0  # the suggestion is the rate of the lowest loss divided by this, as is usual
FEWEST = 20  # updates of a meaningful curve


@dataclass(frozen=True)
class Curve:
    rates: list[float]
    losses: list[float]  # smoothed

    @property
    def lowest(self) -> float:
        """The rate with the lowest loss, a little below the rates that diverge."""
        return self.rates[min(range(len(self.losses)), key=self.losses.__getitem__)]

    @property
    def suggestion(self) -> float:
        """A rate at a safe distance."""
        return self.lowest / SAFETY


def main(argv: Sequence[str] | None = None) -> int:
    usage = "%(prog)s [-c CONFIG] [--lowest LR] [--highest LR] [--n_updates N] [-o PATH.png] [--show] [--key.sub value ...]"
    parser = Parser(prog="find_lr.py", description=__doc__, epilog=EXAMPLES, usage=usage)
    parser.add_argument("-c", "--config", help="a YAML of configs/; default: LeNet on digits")
    parser.add_argument("--lowest", type=float, default=1e-5, metavar="LR", help="the first rate (default: 1e-5)")
    highest = "the last rate, unless the loss diverges before (default: 10)"
    parser.add_argument("--highest", type=float, default=10.0, metavar="LR", help=highest)
    parser.add_argument("--n_updates", type=int, default=200, metavar="N", help="default: 200")
    add_output(parser, "find_lr.png")
    args, overrides = parser.parse_with_overrides(argv)
    if not 0 < args.lowest < args.highest:
        raise ConfigError(f"--lowest {args.lowest:g} and --highest {args.highest:g}: expected 0 < lowest < highest")
    if args.n_updates < FEWEST:
        raise ConfigError(f"--n_updates {args.n_updates}: at least {FEWEST} are needed for a curve")

    from engine import load_config
    from engine.build import build
    from engine.devices.accelerator import make_accelerator
    from engine.plots.style import new_figure
    from engine.run.log import set_up_terminal

    check_picture_path(args.output)
    config = load_config(args.config, overrides)
    set_up_terminal(is_main=True)
    run = build(config, make_accelerator(config.train, deterministic=config.deterministic))
    curve = sweep(run, args.lowest, args.highest, args.n_updates)
    if curve.lowest == curve.rates[0]:
        raise RunError(f"the loss doesn't fall at any rate from {args.lowest:g} up; a lower --lowest may help")
    title = f"{config.model.name} on {run.data.spec.name}, {config.train.optim.type}"
    draw(figure := new_figure(show=args.show), curve, title)
    save_pictures({"find_lr": figure}, args)
    print(f"the loss is lowest at a learning rate of {curve.lowest:.2g}; a tenth of it is a good start:")
    scale = config.train.batch_size / config.train.scale_lr if config.train.scale_lr else 1  # that train.scale_lr multiplies by
    print_lines(f"  --train.optim.lr {curve.suggestion / scale:.2g}")
    return 0


def sweep(run: "Run", lowest: float, highest: float, n_updates: int) -> Curve:
    """Train with rates that rise by a constant factor, until the loss has clearly diverged."""
    from tqdm import tqdm

    from engine.train import train_batches

    rates = [lowest * (highest / lowest) ** (i / (n_updates - 1)) for i in range(n_updates)]
    run.n_steps = n_updates
    run.update.schedule = lambda step, lr: rates[step]
    run.model.train()
    losses: list[float] = []
    average = 0.0
    batches = tqdm(train_batches(run, 0), total=n_updates, unit="step", leave=False, disable=not sys.stderr.isatty())
    for step, batch in enumerate(batches):
        run.update(run.state, batch, measure=False)
        if not run.state.window:  # an update that was skipped
            break
        loss = float(run.state.window["loss"] / run.state.window["weight"])
        run.state.window.clear()
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        losses.append(average / (1 - SMOOTHING ** (step + 1)))
        if not math.isfinite(loss) or losses[-1] > DIVERGED * min(losses):
            break
    finite = [loss for loss in losses if math.isfinite(loss)]
    return Curve(rates[: len(finite)], finite)


def draw(figure: "Figure", curve: Curve, title: str) -> None:
    from engine.plots.style import TRAIN, VALID, style

    with style():
        figure.set_size_inches(7, 4.2)
        axes = figure.subplots()
        axes.plot(curve.rates, curve.losses, color=TRAIN, label="training loss, smoothed")
        axes.axvline(curve.suggestion, color=VALID, linestyle="--", label=f"suggestion: {curve.suggestion:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title=title)
        low, first = min(curve.losses), curve.losses[0]
        axes.set_ylim(low - 0.1 * (first - low) - 0.01, first + 0.5 * (first - low) + 0.01)
        axes.legend()


if __name__ == "__main__":
    sys.exit(run_tool(main))
