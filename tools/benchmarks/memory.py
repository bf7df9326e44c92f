"""Memory: the most that training ResNet-18 holds, without the data set, beside a bare loop on one batch."""

import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tools.benchmarks import rivals
from tools.benchmarks.measure import Report, add_threads, n_cores, ratio, show
from tools.benchmarks.random_sets import write_cifar10
from tools.benchmarks.sides import Length, race
from tools.benchmarks.training import BARE, N_CIFAR, OURS, RESNET, engine

EXAMPLES = """
On a CPU it is the memory of the whole process, libraries included; on an NVIDIA GPU that of tensors. The images of the data set,
as bytes, are taken off this project's figure: the bare loop has none.

examples:
  python tools/benchmark.py memory
"""
LENGTH = Length(warm_up=1, turns=1, steps=1)
N_TEST = 10_000
BYTES_OF_IMAGE = 3 * 32 * 32


def add_command(commands: Any) -> ArgumentParser:
    command = commands.add_parser("memory", description=__doc__, epilog=EXAMPLES, help="peak memory beside a bare loop")
    add_threads(command)
    return command


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    n_train, n_test, batch_size = (1_000, 200, 16) if args.quick else (N_CIFAR, N_TEST, 256)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        job = replace(RESNET, root=write_cifar10(Path(folder) / "cifar", n_train, n_test), batch_size=batch_size)
        works = {OURS: engine(job, {}, Path(folder) / "run"), BARE: partial(rivals.bare, job)}
        peaks = {name: speed.peak_mib for name, speed in race(works, LENGTH, args.num_threads, "memory").items()}
    data_mib = (n_train + n_test) * BYTES_OF_IMAGE / 2**20
    what = f"peak memory of ResNet-18 CIFAR, batch {batch_size}, without the {data_mib:.0f} MiB of images"
    ratios = [ratio(what, BARE, "MiB", peaks[OURS] - data_mib, peaks[BARE], at_most=1.05)]
    return show(Report({"cores": n_cores(), "threads": args.num_threads}, ratios), as_json=args.json)
