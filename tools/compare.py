#!/usr/bin/env python
"""Train variants, and compare runs: a table, curves, accuracy over cost, verdicts, differences, an HTML page."""

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
from tools.comparison.rows import LEVEL, as_csv, as_text, differences_as_text, rows_of
from tools.comparison.runs import RunRecord, is_run, read_runs
from tools.comparison.training import environments, find_configs, is_done, make_variants, train_all
from tools.tables import print_lines, write_text

EXAMPLES = """
A RUN is a run folder, a folder of run folders, a checkpoint, or a glob. Completed runs that differ only in their seed are one
row, with mean and deviation.

--verdict says for each pair of rows whether one is better, with an interval over seeds (two or more of each) and test images.

--train trains each config in its own process and run folder, and compares them at the end. The same command again resumes what
was interrupted, and skips what is done.

examples:
  python tools/compare.py runs/first runs/second
  python tools/compare.py runs/* --markdown table.md --csv table.csv --png runs.png --html report.html
  python tools/compare.py --diff runs/first runs/second
  python tools/compare.py --verdict runs/resnet-seed-* runs/vgg-seed-* --html report.html
  python tools/compare.py --train configs/resnet{50,101,152}_cifar10.yaml
  python tools/compare.py --train configs/vgg{11,13,16,19}_cifar10.yaml --jobs 4 --train.n_epochs 30
  python tools/compare.py --train configs/resnet{18,34}_cifar10.yaml --until-decided --max-seeds 8
  python tools/compare.py --train configs/efficientnet_b[012]_cifar10.yaml --seeds 1,2,3 -o runs/efficientnets
  python tools/compare.py --train configs/resnet18_cifar10.yaml --models resnet18,vgg11_bn,timm/convnext_atto --html report.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    usage = "%(prog)s RUN [RUN ...] [--html PATH] ...\n       %(prog)s --diff RUN RUN\n       %(prog)s --train CONFIG "
    usage += "[CONFIG ...] [-o DIR] [--models M,M] [--seeds N,N] [--jobs N] [--key.sub value ...]"
    parser = Parser(prog="compare.py", description=__doc__, epilog=EXAMPLES, usage=usage)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="compare these runs")
    parser.add_argument("--diff", nargs=2, metavar="RUN", help="print the differences between two runs")
    parser.add_argument("--train", nargs="+", metavar="CONFIG", help="train these configs (files or globs), and compare them")
    parser.add_argument("--verdict", action="store_true", help="say which is better, by how much, and how sure that is")
    parser.add_argument("--models", type=_names, help="with --train: each config with each of these models instead of its own")
    parser.add_argument("--seeds", type=_seeds, help="with --train: each of them with each of these seeds")
    parser.add_argument("--until-decided", action="store_true", help="with --train: more seeds until the verdicts are clear")
    parser.add_argument("--max-seeds", type=int, metavar="N", help="with --until-decided: at most so many of each (default: 8)")
    parser.add_argument("--jobs", type=int, metavar="N", help="with --train: N trainings at a time, each on its own device")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="with --train: run folders go here (runs/compare-...)")
    parser.add_argument("--markdown", metavar="PATH", type=Path, help="write the table as Markdown")
    parser.add_argument("--csv", metavar="PATH", type=Path, help="write the table as CSV, with unrounded numbers")
    parser.add_argument("--png", metavar="PATH", type=Path, help="draw curves, and accuracy over cost and time")
    parser.add_argument("--html", metavar="PATH", type=Path, help="write all of this as a page that needs no network")
    parser.add_argument("--x", choices=["step", "epoch", "time"], default="step", help="x-axis of the curves (default: step)")
    parser.add_argument("--mistakes", type=int, metavar="N", default=8, help="with --html: of each run; 0 for none (default: 8)")
    parser.add_argument("--show", action="store_true", help="with --png: also open a window")
    args, overrides = parser.parse_with_overrides(argv)
    _check(args, overrides)
    args.max_seeds = args.max_seeds or 8
    if args.train:
        return _train(args, overrides)
    runs = read_runs(args.runs or args.diff)
    if not args.diff:
        _report(runs, args, overrides, LEVEL if args.verdict else None)
        return 0
    if unreadable := [run for run in runs if not run.is_readable]:
        raise RunError(unreadable[0].results["why"])
    if len(runs) != 2:
        raise ConfigError(f"--diff {' '.join(args.diff)}: expected two runs, these are {len(runs)}")
    print_lines(differences_as_text(*runs))
    return 0


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in _names(text)]


def _check(args: Namespace, overrides: dict[str, Any]) -> None:
    """Reject options that don't fit together, before anything slow starts."""
    sources = {"RUN": args.runs, "--diff": args.diff, "--train": args.train}
    given = [name for name, value in sources.items() if value]
    files = [name for name in ("markdown", "csv", "png", "html") if getattr(args, name)]
    options = ("models", "seeds", "jobs", "output", "until_decided")
    for_training = [name.replace("_", "-") for name in options if getattr(args, name) not in (None, False)]
    seeds, key = args.seeds or [], next(iter(overrides), "")
    problems = (
        (len(given) != 1, f"{' and '.join(given) or 'nothing to compare'}: give one of {', '.join(sources)}"),
        (for_training and not args.train, f"--{', --'.join(for_training)} is for --train"),
        (key and not (args.train or args.html), f"--{key}: a key of the config is for --train, or for the mistakes in --html"),
        (args.diff and files, f"--{', --'.join(files)} and --diff: differences are only printed; give the runs as RUN"),
        (args.jobs is not None and args.jobs < 1, f"--jobs must be at least 1, got {args.jobs}"),
        (args.mistakes < 0, f"--mistakes must be at least 0, got {args.mistakes}"),
        (len(set(seeds)) < len(seeds), f"--seeds {','.join(map(str, seeds))}: each seed once"),
        (args.seeds and "seed" in overrides, "--seeds and --seed mean the same; give one of them"),
        (args.models and "model.name" in overrides, "--models and --model.name mean the same; give one of them"),
        (args.max_seeds is not None and not args.until_decided, "--max-seeds is for --until-decided"),
        (args.max_seeds is not None and args.max_seeds < 2, f"--max-seeds must be at least 2, got {args.max_seeds}"),
        (args.until_decided and (seeds or "seed" in overrides), "--until-decided chooses the seeds itself"),
        (args.diff and args.verdict, "--verdict and --diff: give the runs as RUN"),
        (args.show and not args.png, "--show is for --png"),
    )
    for is_wrong, message in problems:
        if is_wrong:
            raise ConfigError(message)
    if args.html:
        require_packages("bokeh", needed_by="--html")
    if args.png:
        from tools.pictures.output import check_picture_path  # this and the imports below: so that --help starts fast

        check_picture_path(args.png, "--png")


def _train(args: Namespace, overrides: dict[str, Any]) -> int:
    if not args.until_decided:
        return _train_seeds(args, overrides, args.seeds or [None], LEVEL if args.verdict else None)[0]
    from tools.comparison.verdict import spent_at

    for n in range(2, args.max_seeds + 1):
        code, is_decided = _train_seeds(args, overrides, range(1, n + 1), spent_at(n - 1, args.max_seeds - 1))
        if code or is_decided:
            return code
    print_lines(f"{args.max_seeds} seeds of each don't decide all pairs")
    return 0


def _train_seeds(
    args: Namespace, overrides: dict[str, Any], seeds: Sequence[int | None], level: float | None
) -> tuple[int, bool]:
    """Train each variant with these seeds, and compare them. Return the exit code, and whether every verdict is clear."""
    variants = make_variants(find_configs(args.train), args.models or [None], seeds, overrides, args.output)
    if args.until_decided and len(variants) == len(seeds):
        raise ConfigError("--until-decided: give two configs or models; this is one")
    slots = environments(args.jobs or 1)
    done = [variant for variant in variants if is_done(variant)]
    for variant in done:
        print_lines(f"{variant.name}: is done already")
    signum, incomplete = train_all([variant for variant in variants if variant not in done], slots, args.plugin)
    reasons = "; ".join(f"{name} {why}" for name, why in incomplete.items())
    if signum:
        print_lines(f"interrupted: {reasons}; the same command goes on", file=sys.stderr)
        return 128 + signum, False
    folders = [str(variant.folder) for variant in variants if is_run(variant.folder)]
    is_decided = _report(read_runs(folders), args, {}, None if incomplete else level) if folders else True
    if incomplete:
        raise RunError(f"{len(incomplete)} of {len(variants)} variants are not complete: {reasons}")
    return 0, is_decided


def _report(runs: Sequence[RunRecord], args: Namespace, overrides: dict[str, Any], level: float | None) -> bool:
    """Print and write the comparison, with verdicts at this level; return whether every verdict is clear."""
    rows, verdicts = rows_of(runs), list[Any]()
    if level is not None:
        from tools.comparison.verdict import judge

        rows, verdicts = judge([row for row in rows if row.first.is_readable], level)
    print_lines(as_text(rows, *verdicts))
    if n_unreadable := sum(not run.is_readable for run in runs):
        print_lines(f"warning: {n_unreadable} of {len(runs)} runs can't be read", file=sys.stderr)
    if args.markdown:
        write_text(args.markdown, as_text(rows, *verdicts, as_markdown=True))
    if args.csv:
        write_text(args.csv, as_csv(rows))
    if args.png:
        from engine.plots.style import new_figure
        from tools.comparison.figure import draw_comparison
        from tools.pictures.output import save_pictures

        draw_comparison(figure := new_figure(show=args.show), rows, args.x)
        save_pictures({"comparison": figure}, Namespace(output=args.png, show=args.show))
    if args.html:
        from tools.comparison.page import make_page

        write_text(args.html, make_page(rows, args.mistakes, overrides, verdicts))
    return all(verdict.is_decided for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(run_tool(main))
