"""Loss, accuracy and learning rate of one run or several, as their metrics.jsonl has them."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import load_config
from engine.config.errors import ConfigError, RunError
from tools.pictures.output import add_output, deliver, new_figure
from tools.pictures.subject import told_apart

EXAMPLES = """
One run: training and validation in two colors, and the losses of auxiliary heads where there are any, as in GoogLeNet.
Several runs: a color for each; by epoch or by time, runs of different batches can be compared. Time is that of the training,
without the pauses of a run that was resumed.

examples:
  python tools/visualize.py curves runs/first
  python tools/visualize.py curves runs/first runs/second --x epoch -o both.png
  python tools/visualize.py curves runs/* --x time --smooth 0.6
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "curves",
        help="loss and accuracy of one run or several",
        description=__doc__,
        epilog=EXAMPLES,
        usage="%(prog)s RUN [RUN ...] [--x step|epoch|time] [--smooth WEIGHT] [-o PATH.png] [--show]",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--x", default="step", choices=("step", "epoch", "time"), help="default: step")
    parser.add_argument(
        "--smooth", type=float, default=0.0, metavar="WEIGHT", help="from 0 to below 1, as in TensorBoard (default: 0)"
    )
    add_output(parser, "curves.png, in figures/ of a single run")
    parser.set_defaults(run=run)


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    from engine.plots.curves import draw_curves

    if overrides:
        raise ConfigError(f"--{next(iter(overrides))}: curves are of what was logged, and take no key of the config")
    if not 0 <= args.smooth < 1:
        raise ConfigError(f"--smooth must be at least 0 and below 1, got {args.smooth:g}")
    runs = {name: Path(path).expanduser() for name, path in told_apart(args.runs)}
    histories = {name: history_of(path) for name, path in runs.items()}
    draw_curves(figure := new_figure(args), histories, x=args.x, smoothing=args.smooth, title=_title(list(runs.values())))
    deliver({"curves": figure}, args, next(iter(runs.values())) if len(runs) == 1 else None)
    return 0


def history_of(run_dir: Path) -> list[dict[str, Any]]:
    from engine.run.metrics import read_metrics

    if not (run_dir / "metrics.jsonl").is_file():
        raise RunError(f"{run_dir} is no run folder (it has no metrics.jsonl)")
    try:
        history = read_metrics(run_dir)
    except ValueError as error:
        raise RunError(f"{run_dir / 'metrics.jsonl'} is damaged: {error}") from error
    if not history:
        raise RunError(f"{run_dir / 'metrics.jsonl'} is empty: nothing was logged yet")
    return history


def _title(runs: Sequence[Path]) -> str | None:
    if len(runs) > 1 or not (runs[0] / "config.yaml").is_file():
        return None
    config = load_config(runs[0] / "config.yaml")
    return f"{config.model.name} on {config.data.name}"
