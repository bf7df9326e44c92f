#!/usr/bin/env python
"""Pictures: of data, of how a training went, of what a model has learned, and of what a config asks for."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.plugins import Parser
from tools.pictures import (
    calibration,
    confusion,
    curves,
    data,
    embeddings,
    features,
    gradcam,
    model,
    predictions,
    schedule,
)
from tools.pictures.output import expect_picture

EXAMPLES = """
`visualize.py WHAT --help` says what each of them takes. A picture of a run is written into its folder figures/, and shown in its
TensorBoard; any other one is written here. -o names another file, and --show opens a window too.

examples:
  python tools/visualize.py curves runs/first runs/second --x time --smooth 0.6
  python tools/visualize.py predictions runs/first --wrong
  python tools/visualize.py gradcam resnet50 photos/ -o where.png
  python tools/visualize.py schedule -c configs/resnet18_cifar10.yaml
"""
PICTURES = (data, curves, predictions, features, embeddings, gradcam, confusion, calibration, schedule, model)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="visualize.py", description=__doc__, epilog=EXAMPLES)
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for picture in PICTURES:
        picture.add_command(commands)

    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in commands.choices:
        parser.parse_args(argv[:1])  # answers --help, and refuses everything else
    args, overrides = commands.choices[argv[0]].parse_with_overrides(argv[1:])
    if argv[0] != "model":  # which can be a table
        expect_picture(args.output)
    return args.run(args, overrides)


if __name__ == "__main__":
    sys.exit(run_tool(main))
