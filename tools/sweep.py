#!/usr/bin/env python
"""Search for the values of config keys with which a training ends best: a grid, at random, or by what was found so far (TPE)."""

import shlex
import sys
from argparse import Namespace
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
from tools.comparison.training import as_option
from tools.comparison.variants import HARMLESS
from tools.sweeps.space import Dimension, grid_of, read_space
from tools.tables import write_text

EXAMPLES = """
--space says which values a key may have; it is given once for each key:
  KEY=a,b,c                 one of these
  KEY=low..high             a number between the two; a whole one where both are whole
  KEY=low..high..step       in such steps
  KEY=log:low..high         a number whose logarithm is drawn evenly

Each trial is a run in a folder of its own, -o DIR/trial-0000 and so on, and every other option is given to all of them. The same
command again goes on with what was cut off, up to --trials in all; typed on several machines or for several devices that share
DIR, they share the work. A trial that is worse than the others were at the same step is ended early, unless --no_prune is given.

examples:
  python tools/sweep.py -c configs/lenet_digits.yaml --space train.optim.lr=log:0.001..1 --trials 20 -o runs/sweep
  python tools/sweep.py --search grid --space train.optim.type=SGD,AdamW --space train.optim.lr=0.01,0.1 -o runs/grid
  python tools/sweep.py -c configs/resnet18_cifar10.yaml --space train.optim.lr=log:0.01..1 --space augment.cutout=0..16..4 \\
      --train.n_epochs 20 -o runs/sweep-resnet
"""
SEARCHES = ("tpe", "random", "grid")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="sweep.py",
        description=__doc__,
        epilog=EXAMPLES,
        usage="%(prog)s [-c CONFIG] --space KEY=VALUES [--space ...] [--search tpe|random|grid] [--trials N] [-o DIR] "
        "[--metric NAME [--minimize]] [--no_prune] [--key.sub value ...]",
    )
    parser.add_argument("-c", "--config", type=Path, default=DEFAULT_CONFIG, help="without it, LeNet on digits")
    parser.add_argument(
        "--space", action="append", default=[], metavar="KEY=VALUES", help="a key, and the values that it may have"
    )
    parser.add_argument("--search", choices=SEARCHES, default="tpe", help="how values are chosen (default: tpe)")
    parser.add_argument("--trials", type=int, metavar="N", help="how many in all (default: 20; of a grid, all of it)")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/sweep"), metavar="DIR", help="default: runs/sweep")
    parser.add_argument("--metric", help="what is to be high, as metrics.jsonl names it (default: what the task monitors)")
    parser.add_argument("--minimize", action="store_true", help="the metric is to be low, as valid/loss")
    parser.add_argument("--no_prune", action="store_true", help="let hopeless trials go on to their end")
    parser.add_argument("--markdown", metavar="PATH", type=Path, help="write the table as Markdown")
    parser.add_argument("--csv", metavar="PATH", type=Path, help="write the table as CSV, with unrounded numbers")
    args, overrides = parser.parse_with_overrides(argv)
    space = read_space(args.space)
    _check(args, space, overrides)
    require_packages("optuna", needed_by="sweep.py")
    try:
        return sweep(args, space, overrides)
    except OSError as error:
        raise RunError(f"{args.output} can't be written ({error.strerror}); the same command goes on") from error


def _check(args: Namespace, space: Sequence[Dimension], overrides: dict[str, Any]) -> None:
    """Mistakes are found before the first trial: each end of a range, and each value, must be one that the config takes."""

    if not space:
        raise ConfigError("--space KEY=VALUES says what to search; --help has its forms")
    if args.trials is not None and args.trials < 1:
        raise ConfigError(f"--trials must be at least 1, got {args.trials}")
    if args.minimize and args.metric is None:
        raise ConfigError("--minimize: what a task monitors is better the higher it is; --metric names something else")
    for dimension in space:
        if dimension.key in overrides:
            raise ConfigError(
                f"--space {dimension.key} and --{dimension.key}: a key is searched, or given; leave one of them out"
            )
        for value in dimension.ends:
            load_config(args.config, {**overrides, dimension.key: value})


def sweep(args: Namespace, space: Sequence[Dimension], overrides: dict[str, Any]) -> int:
    from tools.sweeps.history import history_of
    from tools.sweeps.study import open_study, take_trial
    from tools.sweeps.trial import metric_in, pruner_of, run_trial

    config = load_config(args.config, overrides)
    meaning = {"search": args.search, "space": sorted(args.space), "metric": args.metric, "minimize": args.minimize}
    meaning["config"] = {key: value for key, value in flatten(to_dict(config)).items() if not key.startswith(HARMLESS)}
    study = open_study(args.output, meaning, space)
    n_trials = args.trials or (sum(1 for _ in grid_of(space)) if args.search == "grid" else 20)
    signum = 0
    while not signum and (taken := take_trial(study, args.output, n_trials, config.seed)) is not None:
        values = {dimension.key: dimension.draw(taken.trial) for dimension in space}
        print(f"{taken.folder.name}: {_as_options(values)}", flush=True)
        options, study.pruner = {**overrides, **values}, pruner_of(study, args.output)
        signum = run_trial(study, taken, args.config, options, args.metric, args.plugin, may_prune=not args.no_prune)
        if not signum:
            history = history_of(study, space, metric_in(args.output, args.metric), args.output)
            print(f"{taken.folder.name}: {history.said_end(taken.trial.number)}", flush=True)
        taken.lock.close()
    if signum:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + signum
    return _report(study, args, space, overrides)


def _report(study: Any, args: Namespace, space: Sequence[Dimension], overrides: dict[str, Any]) -> int:
    from engine.plots.style import new_figure
    from tools.pictures.output import write
    from tools.sweeps.history import as_csv, as_markdown, as_text, draw, history_of
    from tools.sweeps.study import name_of
    from tools.sweeps.trial import metric_in

    history = history_of(study, space, metric_in(args.output, args.metric), args.output)
    print(f"\n{as_text(history)}")
    for path, text in ((args.markdown, as_markdown), (args.csv, as_csv)):
        if path is not None:
            write_text(path, text(history))
    if history.best is None:
        raise RunError(f"no trial of {args.output} was completed, so there is nothing to choose from")
    draw(figure := new_figure(), history)
    write(figure, args.output / "history.png")
    best = {dimension.key: history.best.params[dimension.key] for dimension in space}
    print(f"best: {name_of(history.best.number)}, {history.metric} {history.said(history.best.value)}")
    config = "" if args.config == DEFAULT_CONFIG else f"-c {args.config} "
    print(f"  python main.py {config}{_as_options({**overrides, **best})}")
    return 0


def _as_options(values: dict[str, Any]) -> str:
    return shlex.join(word for key, value in values.items() for word in (f"--{key}", as_option(value)))


if __name__ == "__main__":
    sys.exit(run_tool(main))
