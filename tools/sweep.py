#!/usr/bin/env python
"""Search for the config values that train best: on a grid, at random, or by learning from the earlier trials (TPE)."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import load_config
from engine.config.command_line import require_packages, run_tool
from engine.config.errors import ConfigError, RunError
from engine.config.layers import DEFAULT_CONFIG
from engine.config.schema import flatten, to_dict
from engine.plugins import Parser
from tools.comparison.training import WITHOUT_EFFECT_ON_RESULTS, Variant, as_option
from tools.sweeps.space import Dimension, grid_points, read_space
from tools.tables import print_lines, write_text

# torch, matplotlib and Optuna are imported inside functions, so that --help starts fast.

EXAMPLES = """
--space defines the values that a key may have; give it once for each key:
  KEY=a,b,c                 one of these values
  KEY=low..high             a number in this range; an integer if both ends are
  KEY=low..high..step       a number in this range, in steps
  KEY=log:low..high         a number in this range, sampled on a log scale

Each trial is a run in its own folder, DIR/trial-0000 and so on. All other options are passed to every trial. The same command
continues an interrupted sweep, up to --trials in all. If it is started several times, on one machine or on several that share
DIR, the processes share the work. A trial that is worse than the others were at the same step is stopped early, unless
--no_prune is given.

examples:
  python tools/sweep.py -c configs/lenet_digits.yaml --space train.optim.lr=log:0.001..1 --trials 20 -o runs/sweep
  python tools/sweep.py --search grid --space train.optim.type=SGD,AdamW --space train.optim.lr=0.01,0.1 -o runs/grid
  python tools/sweep.py -c configs/resnet18_cifar10.yaml --space train.optim.lr=log:0.01..1 --space augment.cutout=0..16..4 \\
      --train.n_epochs 20 -o runs/sweep-resnet
"""


def main(argv: Sequence[str] | None = None) -> int:
    usage = "%(prog)s [-c CONFIG] --space KEY=VALUES [--space ...] [--search tpe|random|grid] [--trials N] [-o DIR] "
    usage += "[--metric NAME [--minimize]] [--no_prune] [--key.sub value ...]"
    parser = Parser(prog="sweep.py", description=__doc__, epilog=EXAMPLES, usage=usage)
    parser.add_argument("-c", "--config", type=Path, default=DEFAULT_CONFIG, help="default: LeNet on digits")
    parser.add_argument("--space", action="append", default=[], metavar="KEY=VALUES", help="a key and its possible values")
    parser.add_argument("--search", choices=("tpe", "random", "grid"), default="tpe", help="how to choose values (default: tpe)")
    parser.add_argument("--trials", type=int, metavar="N", help="total number of trials (default: 20; the whole grid)")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/sweep"), metavar="DIR", help="default: runs/sweep")
    parser.add_argument("--metric", help="the metric to maximize, as in metrics.jsonl (default: the one that the task monitors)")
    parser.add_argument("--minimize", action="store_true", help="minimize the metric, e.g. valid/loss")
    parser.add_argument("--no_prune", action="store_true", help="train hopeless trials to the end")
    parser.add_argument("--markdown", metavar="PATH", type=Path, help="write the table as Markdown")
    parser.add_argument("--csv", metavar="PATH", type=Path, help="write the table as CSV, with unrounded numbers")
    args, overrides = parser.parse_with_overrides(argv)
    space = read_space(args.space)
    if not space:
        raise ConfigError("--space KEY=VALUES says what to search; see --help")
    if args.trials is not None and args.trials < 1:
        raise ConfigError(f"--trials must be at least 1, got {args.trials}")
    if args.minimize and args.metric is None:
        raise ConfigError("--minimize needs --metric: the metric that a task monitors is to be maximized")
    for dimension in space:  # find mistakes before the first trial
        if dimension.key in overrides:
            raise ConfigError(f"--space {dimension.key} and --{dimension.key}: a key is searched, or given; remove one of them")
        for value in dimension.values or (dimension.low, dimension.high):
            load_config(args.config, {**overrides, dimension.key: value})
    n_grid = sum(1 for _ in grid_points(space)) if args.search == "grid" else None
    require_packages("optuna", needed_by="sweep.py")
    try:
        return _sweep(args, space, overrides, args.trials or n_grid or 20)
    except OSError as error:
        raise RunError(f"{args.output} can't be written ({error.strerror}); the same command continues the sweep") from error


def _sweep(args: Any, space: Sequence[Dimension], overrides: dict[str, Any], n_trials: int) -> int:
    """Run trials until there are enough, then report; return the exit code."""
    from engine.plots.style import new_figure
    from tools.pictures.output import save_picture
    from tools.sweeps.history import History
    from tools.sweeps.study import open_study, run_trial, suggested, take_trial, trial_name

    config = load_config(args.config, overrides)
    values = flatten(to_dict(config))
    definition = {"search": args.search, "space": sorted(args.space), "metric": args.metric, "minimize": args.minimize}
    definition["config"] = {key: value for key, value in values.items() if not key.startswith(WITHOUT_EFFECT_ON_RESULTS)}
    study = open_study(args.output, definition, space)
    while (taken := take_trial(study, args.output, n_trials, config.seed)) is not None:
        trial, run, lock = taken
        with lock:
            values = suggested(trial, space)
            print_lines(f"{run.name}: {_as_options(values)}", flush=True)
            variant = Variant(run.name, args.config, {**overrides, **values}, run)
            signum = run_trial(study, trial, variant, args.metric, args.plugin, may_prune=not args.no_prune)
        if signum:
            print("interrupted; the same command continues the sweep", file=sys.stderr)
            return 128 + signum
        history = History(study, space, args.metric, args.output)
        print_lines(f"{run.name}: {history.outcome(trial.number)}", flush=True)

    history = History(study, space, args.metric, args.output)
    print_lines(f"\n{history.as_text()}")
    if args.markdown is not None:
        write_text(args.markdown, history.as_text(as_markdown=True))
    if args.csv is not None:
        write_text(args.csv, history.as_csv())
    if (best := history.best) is None:
        raise RunError(f"no trial of {args.output} was completed, so there is no best one")
    history.draw(figure := new_figure())
    save_picture(figure, args.output / "history.png")
    print_lines(f"best: {trial_name(best.number)}, {history.metric} {history.formatted(best.value)}")
    config_option = "" if args.config == DEFAULT_CONFIG else f"-c {args.config} "
    options = _as_options({**overrides, **{key: best.params[key] for key in history.keys}})
    print_lines(f"  python main.py {config_option}{options}")
    return 0


def _as_options(values: dict[str, Any]) -> str:
    return shlex.join(word for key, value in values.items() for word in (f"--{key}", as_option(value)))


if __name__ == "__main__":
    sys.exit(run_tool(main))
