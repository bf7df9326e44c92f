"""Growth: whether training stays as fast, and starts as fast, with more samples and after more steps."""

import json
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

from tools.benchmarks import ours
from tools.benchmarks.data import write_jpegs
from tools.benchmarks.measure import Ratio, Report, add_threads, n_cores, ratio, show, take_turns
from tools.benchmarks.random_sets import write_mnist
from tools.benchmarks.sides import Length, Side, Speed, Work, race
from tools.benchmarks.start import until_it_ends
from tools.benchmarks.training import CONFIGS

EXAMPLES = """
LeNet-5, on random images in MNIST's files and on JPEGs in a folder: many samples beside few. The position is that of two
checkpoints, from which the training goes on side by side. It writes about 2 GB of temporary files.

examples:
  python tools/benchmark.py growth
  python tools/benchmark.py growth --quick
"""
LENET = str(CONFIGS / "lenet_mnist.yaml")
FOR_EVER = 10**9
LINES = 20  # of metrics.jsonl, at its beginning and at its end


@dataclass(frozen=True)
class Effort:
    samples: tuple[int, ...]
    steps: tuple[int, int]
    length: Length
    in_files: Length
    starts: int


FULL = Effort((1_000, 100_000, 1_000_000), (10, 10_000), Length(20, 5, 100), Length(4, 3, 8), starts=3)
QUICK = Effort((1_000, 20_000), (10, 200), Length(5, 3, 20), Length(2, 2, 2), starts=1)


def add_command(commands: Any) -> ArgumentParser:
    command = commands.add_parser("growth", description=__doc__, epilog=EXAMPLES, help="with more samples, and after more steps")
    add_threads(command)
    return command


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    effort = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = Path(folder)
        ratios = [
            *with_samples_in_memory(root / "memory", effort, args.num_threads),
            *with_samples_in_files(root / "files", effort, args.num_threads),
            *at_later_steps(root / "steps", effort, args.num_threads),
        ]
    return show(Report({"cores": n_cores(), "threads": args.num_threads}, ratios), as_json=args.json)


def with_samples_in_memory(root: Path, effort: Effort, threads: int) -> list[Ratio]:
    works = {}
    for n in effort.samples:
        data = write_mnist(root / str(n), n_train=n, n_test=100)
        works[f"{n:,}"] = partial(ours.train, LENET, keys(data, 256), root / f"run-{n}")
    return _flat("samples in memory", race(works, effort.length, threads, "samples in memory"))


def with_samples_in_files(root: Path, effort: Effort, threads: int) -> list[Ratio]:
    works = {}
    for n in effort.samples:
        data = root / str(n)
        for part, n_of_part in (("train", n), ("val", 10)):
            (data / part).mkdir(parents=True)
            write_jpegs(data / part, n_of_part)
        of_folder = {"data.name": "imagefolder", "data.img_size": 32, "dataloader.num_workers": 2, "data.verify": True}
        works[f"{n:,}"] = partial(ours.train, LENET, {**keys(data, 64), **of_folder}, root / f"run-{n}")
    return _flat("samples in a folder", race(works, effort.in_files, threads, "samples in a folder"))


def _flat(what: str, speeds: Mapping[str, Speed]) -> list[Ratio]:
    few, *more = speeds
    return [
        ratio(f"training with {many} {what}", f"with {few}", "images/s", speeds[many].steady, speeds[few].steady, at_least=0.9)
        for many in more
    ]


def at_later_steps(root: Path, effort: Effort, threads: int) -> list[Ratio]:
    data = write_mnist(root / "data", n_train=10_000, n_test=100)
    runs = {f"{n:,}": root / f"run-{n}" for n in effort.steps}
    for n, run_dir in zip(effort.steps, runs.values(), strict=True):
        until = {**keys(data, 16), "train.n_steps": n, "train.print_freq": max(1, n // 100), "train.num_threads": threads}
        options = [f"--{key}={json.dumps(value)}" for key, value in until.items()]
        until_it_ends(["main.py", "-c", LENET, "-e", str(run_dir), *options])
    lines = (runs[f"{effort.steps[1]:,}"] / "metrics.jsonl").read_bytes().splitlines()
    states = [(run_dir / "ckpt" / "latest" / "train_state.pt").stat().st_size for run_dir in runs.values()]
    works = {n: partial(ours.resume, run_dir, {"train.n_steps": FOR_EVER}) for n, run_dir in runs.items()}
    speeds = race(works, effort.length, threads, "steps")
    starts = take_turns(effort.starts, {n: partial(_seconds_to_start, n, work, threads) for n, work in works.items()}, "resuming")
    first, last = (speeds[n] for n in runs)
    first_start, last_start = (median(starts[n]) for n in runs)
    early, late = runs
    short, long = (mean(map(len, some)) for some in (lines[:LINES], lines[-LINES:]))
    return [
        ratio(f"training from step {late} on", f"from step {early} on", "images/s", last.steady, first.steady, at_least=0.9),
        ratio(f"resuming at step {late}", f"at step {early}", "s", last_start, first_start, at_most=1.1),
        ratio(f"a line of the log at step {late}", "one at the beginning", "bytes", long, short, at_most=1.1),
        ratio(f"the state in a checkpoint of step {late}", f"of step {early}", "bytes", states[1], states[0], at_most=1.01),
    ]


def _seconds_to_start(name: str, work: Work, threads: int) -> float:
    side = Side(name, work, threads)
    side.close()
    return side.start_seconds


def keys(data: Path, batch_size: int) -> dict[str, Any]:
    return {
        "data.dataroot": str(data),
        "data.verify": False,
        "data.download": False,
        "train.n_epochs": None,
        "train.n_steps": FOR_EVER,
        "train.batch_size": batch_size,
        "train.print_freq": 200,
        "train.eval_freq": FOR_EVER,
        "train.save_freq": FOR_EVER,
    }
