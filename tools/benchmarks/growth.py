"""Measure whether training and its start stay as fast with more samples and after more steps."""

import json
from contextlib import closing
from dataclasses import replace
from functools import partial
from statistics import mean, median

from tools.benchmarks import ours
from tools.benchmarks.random_sets import write_jpegs, write_mnist
from tools.benchmarks.report import Options, Ratio, Report, ratio, report
from tools.benchmarks.rivals import LENET_28
from tools.benchmarks.sides import Length, Side, Work, race, run_python, speed_ratios, take_turns

SELDOM = {"train.print_freq": 200}
LINES = 20  # of metrics.jsonl, at its beginning and at its end


def measure(options: Options) -> Report:
    return report([*with_more_samples(options), *after_more_steps(options)], f"{options.num_threads} threads")


def with_more_samples(options: Options) -> list[Ratio]:
    in_files = {"data.name": "imagefolder", "data.img_size": 32, "dataloader.num_workers": 2, "data.verify": True, **SELDOM}
    memory: dict[str, Work] = {}
    files: dict[str, Work] = {}
    for n in options.choose((1_000, 100_000, 1_000_000), (1_000, 20_000)):
        root = options.folder / str(n)
        job = replace(LENET_28, root=write_mnist(root / "mnist", n_train=n, n_test=100))
        memory[f"{n:,}"] = partial(ours.train, job, SELDOM, root / "memory-run")
        for part, n_of_part in (("train", n), ("val", 10)):
            write_jpegs(root / "folder" / part, n_of_part)
        job = replace(LENET_28, root=root / "folder", batch_size=64)
        files[f"{n:,}"] = partial(ours.train, job, in_files, root / "folder-run")
    ratios = list[Ratio]()
    for where, works, length in (
        ("in memory", memory, options.choose(Length(20, 5, 100), Length(5, 3, 20))),
        ("in a folder", files, options.choose(Length(4, 3, 8), Length(2, 2, 2))),
    ):
        speeds = race(works, length, options.num_threads, f"samples {where}")
        few, *more = speeds
        speeds = {f"with {few}": speeds[few], **speeds}
        for many in more:
            ratios += speed_ratios(f"training with {many} samples {where}", f"with {few}", speeds, 0.9, ours=many)
    return ratios


def after_more_steps(options: Options) -> list[Ratio]:
    root, threads = options.folder, options.num_threads
    job = replace(LENET_28, root=write_mnist(root / "data", n_train=10_000, n_test=100), batch_size=16)
    steps = options.choose((10, 10_000), (10, 200))
    run_dirs = [root / f"run-{n}" for n in steps]
    for n, run_dir in zip(steps, run_dirs, strict=True):
        keys = {**ours.keys_of(job), "train.n_steps": n, "train.print_freq": max(1, n // 100), "train.num_threads": threads}
        options_of_main = [f"--{key}={json.dumps(value)}" for key, value in keys.items()]
        run_python(["main.py", "-c", str(ours.config_of(job)), "-e", str(run_dir), *options_of_main])
    lines = (run_dirs[1] / "metrics.jsonl").read_bytes().splitlines()
    short, long = (mean(map(len, some)) for some in (lines[:LINES], lines[-LINES:]))
    early_bytes, late_bytes = ((run_dir / "ckpt" / "latest" / "train_state.pt").stat().st_size for run_dir in run_dirs)
    works: dict[str, Work] = {
        f"step {n:,}": partial(ours.train, job, {}, run_dir, resume=True) for n, run_dir in zip(steps, run_dirs, strict=True)
    }
    early, late = works
    speeds = race(works, options.choose(Length(20, 5, 100), Length(5, 3, 20)), threads, "steps")
    resumptions = {name: partial(_seconds_to_start, name, work, threads) for name, work in works.items()}
    starts = take_turns(options.choose(3, 1), resumptions, "resuming")
    speeds = {f"from {early} on": speeds[early], **speeds}
    return [
        *speed_ratios(f"training from {late} on", f"from {early} on", speeds, 0.9, ours=late),
        ratio(f"resuming at {late}", f"at {early}", "s", median(starts[late]), median(starts[early]), at_most=1.1),
        ratio(f"a line of the log at {late}", "one at the beginning", "bytes", long, short, at_most=1.1),
        ratio(f"the state in a checkpoint of {late}", f"of {early}", "bytes", late_bytes, early_bytes, at_most=1.01),
    ]


def _seconds_to_start(name: str, work: Work, threads: int) -> float:
    with closing(Side(name, work, threads)) as side:
        return side.start.seconds
