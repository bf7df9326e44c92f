#!/usr/bin/env python
"""Evaluate a trained model on a split of its dataset. A run's folder keeps the score of each sample, for compare.py --verdict."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config.command_line import run_tool
from engine.plots.metrics import IN_PERCENT
from engine.plugins import Parser
from tools.pictures.output import SOURCE_HELP, add_source, add_split
from tools.tables import print_lines

# With other overrides, the scores of the samples are not the run's, and aren't kept.
WITHOUT_EFFECT = ("data.dataroot", "data.verify", "data.download", "dataloader.", "eval.batch_size", "train.num_threads")
EXAMPLES = """
examples:
  python tools/evaluate.py runs/first
  python tools/evaluate.py runs/first/ckpt/latest --split test
  python tools/evaluate.py runs/first --split train --json --data.dataroot /somewhere/else
  python tools/evaluate.py runs/first --per_class --eval.tta flip
  python tools/evaluate.py timm/resnet18 --data.dataroot ~/data/ImageNet
  python tools/evaluate.py lenet -c configs/lenet_digits.yaml --model.pretrained weights.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    usage = "%(prog)s RUN_OR_MODEL [--split SPLIT] [--per_class] [--json [--confusion]] [-c CONFIG] [--ema] [--key.sub value ...]"
    parser = Parser(prog="evaluate.py", description=__doc__, epilog=SOURCE_HELP + EXAMPLES, usage=usage)
    add_source(parser)
    add_split(parser)
    parser.add_argument("--per_class", action="store_true", help="also the accuracy, overlap or precision of each class")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a line")
    parser.add_argument("--confusion", action="store_true", help="with --json: counts of true classes (rows) and predicted ones")
    args, overrides = parser.parse_with_overrides(argv)
    if args.confusion and not args.json:
        parser.error("--confusion needs --json")

    from tools.pictures.subject import open_source  # imports torch, unlike --help

    trained = open_source(args, overrides)
    tables = [name for name in ("per_class", "confusion") if getattr(args, name)]
    trained = replace(trained, task=trained.task.with_tables(*tables, "samples"))  # its data are read once, also for `_keep`
    metrics = trained.evaluate(args.split)
    samples = metrics.pop("samples", None)
    if not trained.accelerator.is_main_process:
        return 0
    if samples is not None and trained.run_dir and not args.ema and all(key.startswith(WITHOUT_EFFECT) for key in overrides):
        _keep(trained, args.split if args.split in trained.data.splits else "valid", *samples)
    if args.json:
        source: dict[str, Any] = {"weights": trained.weights}
        if trained.checkpoint:
            source = {"checkpoint": str(trained.checkpoint), "step": trained.step}
        print(json.dumps({**source, "split": args.split, **metrics}))
        return 0
    per_class = metrics.pop("per_class", {})
    print_lines(f"{args.split}: {', '.join(_format(name, value) for name, value in metrics.items())} ({trained.weights})")
    width = max(map(len, per_class), default=0)
    for name, accuracy in per_class.items():
        print_lines(f"  {name:<{width}}  {'no sample' if accuracy is None else f'{100 * accuracy:6.2f} %'}")
    return 0


def _keep(trained: Any, split: str, metric: str, scores: Any) -> None:
    """Write the scores of the samples to the run folder if it has none: data other than the run's may have been given."""
    from engine.build import start_fingerprint
    from engine.run.samples import SampleScores, read_samples, samples_path, write_samples

    try:
        read_samples(samples_path(trained.run_dir, split, trained.step))
    except OSError:  # there are none, or they are damaged
        fingerprint = start_fingerprint(trained.data).result()[split]
        try:
            write_samples(trained.run_dir, SampleScores(split, trained.step, metric, scores.numpy(), fingerprint))
        except OSError as error:
            print_lines(f"warning: the scores of the samples can't be kept: {error}", file=sys.stderr)


def _format(name: str, value: float) -> str:
    if name in IN_PERCENT:
        return f"{name} {100 * value:.2f} %"
    return f"{name} {value:,}" if name == "count" else f"{name} {value:.4f}"


if __name__ == "__main__":
    sys.exit(run_tool(main))
