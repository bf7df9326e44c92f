"""Evaluation: 10,000 images of CIFAR-10's size by ResNet-18, beside a bare loop on batches that are there already."""

import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmarks import ours, rivals
from tools.benchmarks.measure import Report, add_threads, n_cores, ratio, show
from tools.benchmarks.random_sets import write_cifar10
from tools.benchmarks.sides import Length, race
from tools.benchmarks.training import OURS, RESNET, config_of, keys_of

EXAMPLES = """
The engine reads CIFAR-10's files, normalizes the images, and counts losses, top-1 and top-5; the loop only calls the model.

examples:
  python tools/benchmark.py evaluation
"""
FULL, QUICK = Length(warm_up=1, turns=10, steps=5), Length(warm_up=1, turns=2, steps=1)
BATCH = 200


def add_command(commands: Any) -> ArgumentParser:
    command = commands.add_parser("evaluation", description=__doc__, epilog=EXAMPLES, help="evaluation beside a bare loop")
    add_threads(command)
    return command


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    length = QUICK if args.quick else FULL
    n_images = length.turns * length.steps * BATCH
    bare = "a bare loop on preloaded batches"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        job = replace(RESNET, root=write_cifar10(Path(folder), 1_000, n_images), batch_size=BATCH)
        works = {
            OURS: partial(ours.evaluate, config_of(job), {**keys_of(job), "eval.batch_size": BATCH}),
            bare: partial(rivals.bare_evaluation, job, n_images),
        }
        speeds = race(works, length, args.num_threads, "evaluation")
    what = f"evaluation of {n_images:,} CIFAR images, ResNet-18"
    ratios = [ratio(what, bare, "images/s", speeds[OURS].steady, speeds[bare].steady, at_least=0.97)]
    return show(Report({"cores": n_cores(), "threads": args.num_threads}, ratios), as_json=args.json)
