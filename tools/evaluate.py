#!/usr/bin/env python
"""Evaluate a run, or one of its checkpoints, on a split of its data set."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
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
  python tools/evaluate.py runs/first --per_class --eval.tta flip
"""

IN_PERCENT = ("acc@1", "acc@5", "balanced_acc", "ece", "mIoU", "pixel_acc", "mean_acc")
IN_PERCENT += ("mAP", "mAP@50", "mAP@75", "mAR@100")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="evaluate.py",
        description=__doc__,
        epilog=EXAMPLES,
        usage="%(prog)s RUN_OR_CHECKPOINT [--split SPLIT] [--per_class] [--json [--confusion]] [--key.sub value ...]",
    )
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--split", default="valid", choices=["train", "valid", "test"], help="default: valid")
    parser.add_argument("--per_class", action="store_true", help="also the accuracy, overlap or precision of each class")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a line")
    parser.add_argument(
        "--confusion", action="store_true", help="with --json: how often each class (row) is taken for each other"
    )
    parser.add_argument("--ema", action="store_true", help="with the averaged weights of train.ema")
    args, overrides = parser.parse_with_overrides(argv)
    if args.confusion and not args.json:
        parser.error("--confusion needs --json")

    from engine.trained import load_trained

    trained = load_trained(Path(args.path), overrides, averaged=args.ema)
    tables = [name for name in ("per_class", "confusion") if getattr(args, name)]
    metrics = replace(trained, task=trained.task.with_tables(*tables)).evaluate(args.split)
    if not trained.accelerator.is_main_process:
        return 0
    if args.json:
        print(json.dumps({"checkpoint": str(trained.checkpoint), "step": trained.step, "split": args.split, **metrics}))
        return 0
    per_class = metrics.pop("per_class", {})
    print(f"{args.split}: {', '.join(_say(name, value) for name, value in metrics.items())} ({trained.checkpoint})")
    width = max(map(len, per_class), default=0)
    for name, accuracy in per_class.items():
        print(f"  {name:<{width}}  {'no sample' if accuracy is None else f'{100 * accuracy:6.2f} %'}")
    return 0


def _say(name: str, value: float) -> str:
    if name in IN_PERCENT:
        return f"{name} {100 * value:.2f} %"
    return f"{name} {value:,}" if name == "count" else f"{name} {value:.4f}"


if __name__ == "__main__":
    sys.exit(run_tool(main))
