#!/usr/bin/env python
"""How fast this project is, each time beside what people would use otherwise, measured in the same run."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.plugins import Parser
from tools.benchmarks import checkpoint, data, evaluation, everything, growth, memory, model, ranks, start, training

EXAMPLES = """
What is compared takes turns, and the median counts. Whatever else the machine does falls on all of them.
`benchmark.py WHAT --help` says what each of them measures and takes.

examples:
  python tools/benchmark.py all --quick                                       what `make bench` takes 20 minutes for
  python tools/benchmark.py model -c configs/resnet18_cifar10.yaml --tune     the fastest precision, layout, compile, threads
  python tools/benchmark.py training --num_threads 1
  python tools/benchmark.py data --num_workers 2 --num_threads 1 --json
"""
BENCHMARKS = (everything, model, training, data, start, evaluation, memory, ranks, growth, checkpoint)
TAKE_KEYS = ("model", "training")  # of a config


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmark.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for benchmark in BENCHMARKS:
        command = benchmark.add_command(commands)
        command.set_defaults(run=benchmark.run)
        command.add_argument("--quick", action="store_true", help="seconds instead of minutes; the figures are then rough")
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in TAKE_KEYS:
        args = parser.parse_args(argv)
        return args.run(args, {})
    args, overrides = commands.choices[argv[0]].parse_with_overrides(argv[1:])
    return args.run(args, overrides)


if __name__ == "__main__":
    sys.exit(run_tool(main))
