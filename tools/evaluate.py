#!/usr/bin/env python
"""Evaluate a run, or one of its checkpoints, on a split of its data set."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.command_line import Parser, run_tool

EXAMPLES = """
A run folder stands for its best checkpoint.

examples:
  python tools/evaluate.py runs/first
  python tools/evaluate.py runs/first/ckpt/latest --split test
  python tools/evaluate.py runs/first --split train --json --data.dataroot /somewhere/else
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="evaluate.py",
        description=__doc__,
        epilog=EXAMPLES,
        usage="%(prog)s RUN_OR_CHECKPOINT [--split SPLIT] [--json] [--key.sub value ...]",
    )
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--split", default="valid", choices=["train", "valid", "test"], help="default: valid")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a line")
    args, overrides = parser.parse_with_overrides(argv)

    from engine.trained import load_trained

    trained = load_trained(Path(args.path), overrides)
    metrics = trained.evaluate(args.split)
    if not trained.accelerator.is_main_process:
        return 0
    if args.json:
        print(json.dumps({"checkpoint": str(trained.checkpoint), "step": trained.step, "split": args.split, **metrics}))
        return 0
    said = ", ".join(
        f"{name} {100 * value:.2f} %"
        if name.startswith("acc")
        else f"{name} {value:,}"
        if name == "count"
        else f"{name} {value:.4f}"
        for name, value in metrics.items()
    )
    print(f"{args.split}: {said} ({trained.checkpoint})")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
