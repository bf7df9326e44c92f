#!/usr/bin/env python
"""Train variants, and compare runs: a table, curves, accuracy over cost, what differs, a page."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import require_packages, run_tool
from engine.config.errors import ConfigError, RunError
from engine.plugins import Parser
from tools.comparison.differences import say_differences
from tools.comparison.runs import RunRecord, is_run, read_runs
from tools.comparison.table import as_csv, as_markdown, as_text, rows_of
from tools.comparison.training import environments, train_all
from tools.comparison.variants import find_configs, is_done, make_variants
from tools.tables import write_text

EXAMPLES = """
A RUN is the folder of a run, a folder of such folders, a checkpoint, or a glob. Completed runs that differ in their seed only are
one row, with mean and deviation.

--train trains each config, in a process and a run folder of its own, and compares them at the end. The same command again goes on
with what was cut off, and leaves alone what is done.

examples:
  python tools/compare.py runs/first runs/second
  python tools/compare.py runs/* --markdown table.md --csv table.csv --png runs.png --html report.html
  python tools/compare.py --diff runs/first runs/second
  python tools/compare.py --train configs/resnet{50,101,152}_cifar10.yaml
  python tools/compare.py --train configs/vgg{11,13,16,19}_cifar10.yaml --jobs 4 --train.n_epochs 30
  python tools/compare.py --train configs/efficientnet_b[012]_cifar10.yaml --seeds 1,2,3 -o runs/efficientnets
  python tools/compare.py --train configs/resnet18_cifar10.yaml --models resnet18,vgg11_bn,timm/convnext_atto --html report.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="compare.py",
        description=__doc__,
        epilog=EXAMPLES,
        usage="%(prog)s RUN [RUN ...] [--html PATH] ...\n"
        "       %(prog)s --diff RUN RUN\n"
        "       %(prog)s --train CONFIG [CONFIG ...] [-o DIR] [--models M,M] [--seeds N,N] [--jobs N] [--key.sub value ...]",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="compare these")
    parser.add_argument("--diff", nargs=2, metavar="RUN", help="print what differs between two runs")
    parser.add_argument(
        "--train", nargs="+", metavar="CONFIG", help="train these configs, or those that globs mean; compare them"
    )
    parser.add_argument("--models", type=_words, help="with --train: each config with each of these models instead of its own")
    parser.add_argument("--seeds", type=_seeds, help="with --train: each of them with each of these seeds")
    parser.add_argument("--jobs", type=int, metavar="N", help="with --train: so many at a time, each on a device of its own")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="with --train: of the run folders (runs/compare-...)")
    parser.add_argument("--markdown", metavar="PATH", type=Path, help="write the table as Markdown")
    parser.add_argument("--csv", metavar="PATH", type=Path, help="write the table as CSV, with unrounded numbers")
    parser.add_argument("--png", metavar="PATH", type=Path, help="draw the curves, and accuracy over cost and time")
    parser.add_argument("--html", metavar="PATH", type=Path, help="write a page of all this, which needs no network")
    parser.add_argument("--x", choices=["step", "epoch", "time"], default="step", help="of the curves (default: step)")
    parser.add_argument("--mistakes", type=int, metavar="N", default=8, help="with --html: of each run; 0 for none (default: 8)")
    parser.add_argument("--show", action="store_true", help="with --png: open a window, too")
    args, overrides = parser.parse_with_overrides(argv)
    _check(args, overrides)
    if args.diff:
        return _diff(*args.diff)
    return _train(args, overrides) if args.train else _report(read_runs(args.runs), args, overrides)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _seeds(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _check(args: Namespace, overrides: dict[str, Any]) -> None:
    asked = {"RUN": args.runs, "--diff": args.diff, "--train": args.train}
    given = [name for name, words in asked.items() if words]
    if len(given) != 1:
        raise ConfigError(f"{' and '.join(given) or 'nothing to compare'}: give one of {', '.join(asked)}")
    for name in ("models", "seeds", "jobs", "output"):
        if getattr(args, name) is not None and not args.train:
            raise ConfigError(f"--{name} is for --train")
    if overrides and not (args.train or args.html):
        raise ConfigError(f"--{next(iter(overrides))}: a key of the config is for --train, or for the mistakes in --html")
    for name in ("markdown", "csv", "png", "html"):
        if args.diff and getattr(args, name):
            raise ConfigError(f"--{name} and --diff: what differs is only printed; --{name} is for several runs, given as RUN")
    for name, least in (("jobs", 1), ("mistakes", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")
    seeds = args.seeds or []
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {','.join(map(str, seeds))}: each seed once")
    for option, key in (("seeds", "seed"), ("models", "model.name")):
        if getattr(args, option) and key in overrides:
            raise ConfigError(f"--{option} and --{key} say the same thing; give one of them")
    if args.show and not args.png:
        raise ConfigError("--show is for --png")
    if args.html:
        require_packages("bokeh", needed_by="--html")
    if args.png:
        from tools.pictures.output import expect_picture

        expect_picture(args.png, "--png")


def _diff(a: str, b: str) -> int:
    runs = read_runs([a, b])
    if len(runs) != 2:
        raise ConfigError(f"--diff {a} {b}: expected two runs, these are {len(runs)}")
    print(say_differences(*runs))
    return 0


def _train(args: Namespace, overrides: dict[str, Any]) -> int:
    variants = make_variants(find_configs(args.train), args.models or [], args.seeds or [], overrides, args.output)
    devices = environments(args.jobs or 1)
    done = [variant for variant in variants if is_done(variant)]
    for variant in done:
        print(f"{variant.name}: is done already")
    outcome = train_all([variant for variant in variants if variant not in done], devices, args.plugin)
    there = [str(variant.folder) for variant in variants if is_run(variant.folder)]
    if outcome.signum:
        said = ", ".join(f"{name} {why}" for name, why in outcome.incomplete.items())
        print(f"interrupted: {said}; the same command goes on", file=sys.stderr)
        return 128 + outcome.signum
    if there:
        _report(read_runs(there), args, {})
    if outcome.incomplete:
        said = "; ".join(f"{name} {why}" for name, why in outcome.incomplete.items())
        raise RunError(f"{len(outcome.incomplete)} of {len(variants)} variants are not complete: {said}")
    return 0


def _report(runs: Sequence[RunRecord], args: Namespace, overrides: dict[str, Any]) -> int:
    rows = rows_of(runs)
    print(as_text(rows))
    for path, text in ((args.markdown, as_markdown), (args.csv, as_csv)):
        if path is not None:
            write_text(path, text(rows))
    if args.png:
        from tools.comparison.charts import draw_comparison
        from tools.pictures.output import deliver, new_figure

        draw_comparison(figure := new_figure(args), rows, args.x)
        deliver({"comparison": figure}, Namespace(output=args.png, show=args.show))
    if args.html:
        from tools.comparison.page import make_page

        write_text(args.html, make_page(rows, args.mistakes, overrides))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
