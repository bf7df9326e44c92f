"""Compare parts of a training with bare loops: its start, evaluation, memory, two ranks, and saving."""

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

from tools.benchmarks import ours, rivals
from tools.benchmarks.random_sets import write_cifar10, write_mnist
from tools.benchmarks.report import Options, Report, ratio, report
from tools.benchmarks.rivals import RESNET
from tools.benchmarks.sides import OURS, Length, Turns, race, run_python, speed_ratios, take_turns

BARE = "a bare loop on one batch"
BARE_SAVE = "a bare save, flushed too"
IMPORTS = "import torch, torchvision, accelerate"
N_CIFAR, N_RANKS = 50_000, 2


def start(options: Options) -> Report:
    mnist = write_mnist(options.folder / "data", n_train=60_000, n_test=10_000)
    on_mnist = ["-c", "configs/lenet_mnist.yaml", "--data.dataroot", str(mnist), "--data.verify", "false"]
    programs = {  # -> how many times as long as the imports they may take, and how to run them
        "main.py, LeNet-5 on digits: to the first step": (1.5, partial(run_to_first_step, options.folder, [])),
        "main.py, LeNet-5 on MNIST: to the first step": (1.5, partial(run_to_first_step, options.folder, on_mnist)),
        "main.py --help": (0.3, partial(run_python, ["main.py", "--help"])),
    }
    actions = {IMPORTS: partial(run_python, ["-c", IMPORTS]), **{name: action for name, (_, action) in programs.items()}}
    times = take_turns(options.choose(4, 1), actions, "starts")
    seconds = {name: median(of_action[1:] or of_action) for name, of_action in times.items()}
    rival = f'python -c "{IMPORTS}"'
    return report([ratio(name, rival, "s", seconds[name], seconds[IMPORTS], at_most=aim) for name, (aim, _) in programs.items()])


def run_to_first_step(folder: Path, words: list[str]) -> float:
    exp_dir = Path(mkdtemp(dir=folder))
    return run_python(["main.py", *words, "-e", str(exp_dir), "--train.print_freq", "1"], until=exp_dir / "metrics.jsonl")


def evaluation(options: Options) -> Report:
    length, bare = options.choose(Length(1, turns=5, steps=10), Length(1, turns=2, steps=1)), "a bare loop on preloaded batches"
    job = replace(RESNET, root=options.folder, batch_size=200)
    n_images = length.turns * length.steps * job.batch_size
    write_cifar10(job.root, 1_000, n_images)
    works = {OURS: partial(ours.evaluate, job), bare: partial(rivals.bare_evaluation, job, n_images)}
    speeds = race(works, length, options.num_threads, "evaluation", options.busy)
    what = f"evaluation of {n_images:,} CIFAR images, ResNet-18"
    return report(speed_ratios(what, bare, speeds, 0.97), f"{options.num_threads} threads, {options.busy} busy processes")


def memory(options: Options) -> Report:
    n_train, n_test, batch_size = options.choose((N_CIFAR, 10_000, 256), (1_000, 200, 16))
    job = replace(RESNET, root=write_cifar10(options.folder / "cifar", n_train, n_test), batch_size=batch_size)
    works = {OURS: partial(ours.train, job, {}, options.folder / "run"), BARE: partial(rivals.bare, job)}
    speeds = race(works, Length(warm_up=1, turns=1), options.num_threads, "memory")
    data_mib = (n_train + n_test) * 3 * 32 * 32 / 2**20
    what = f"peak memory of ResNet-18 CIFAR, batch {batch_size}, without the {data_mib:.0f} MiB of images"
    mine, theirs = (speeds[name].quiet[-1].peak_mib for name in (OURS, BARE))
    return report([ratio(what, BARE, "MiB", mine - data_mib, theirs, at_most=1.05)], f"{options.num_threads} threads")


def ranks(options: Options) -> Report:
    length, bare = options.choose(Length(2, turns=5, steps=2), Length(1, turns=1)), "a bare DDP loop on one batch"
    n_images, batch_size = options.choose((N_CIFAR, 64), (1_000, 16))
    job = replace(RESNET, root=write_cifar10(options.folder / "cifar", n_images, 100), batch_size=batch_size)
    works = {
        OURS: partial(_on_ranks, partial(ours.train, job, {}, options.folder / "run")),
        bare: partial(_on_ranks, partial(rivals.bare, job)),
    }
    speeds = race(works, length, 1, "ranks")
    what = f"ResNet-18 CIFAR on {N_RANKS} ranks, batch {batch_size} over both: the loop"
    return report(speed_ratios(what, bare, speeds, 0.97), "1 thread on each rank")


def _on_ranks(work: Callable[[Turns | None], None], turns: Turns | None, rank: int = 0, port: int = 0) -> None:
    """Run rank 0 in this process, and start the others, which have no turns, as they can't go on without it."""
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for other in range(1, N_RANKS):
            get_context("spawn").Process(target=_on_ranks, args=(work, None, other, port)).start()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(N_RANKS))
    work(turns)


def checkpoint(options: Options) -> Report:
    saves = measure_saves(options)
    batch_size, length = ours.DEFAULT_BATCH_SIZE, Length(warm_up=1, turns=options.choose(3, 1))
    keys = {"train.batch_size": batch_size, "train.num_threads": options.num_threads}
    update = partial(ours.update, ours.config_of(RESNET), keys)
    rate = race({OURS: update}, length, options.num_threads, "updates")[OURS].steady
    seconds, epoch = saves["ms"] / 1000, N_CIFAR // batch_size * batch_size / rate
    bare = ratio("a checkpoint of ResNet-18, verified", BARE_SAVE, "ms", saves["ms"], saves["bare_ms"], at_most=2.0)
    what = "checkpoints of ResNet-18, one per epoch of CIFAR-10"
    return report([bare, ratio(what, "the run's time", "s", seconds, epoch + seconds, at_most=0.02)], **saves)


def measure_saves(options: Options) -> dict[str, Any]:
    """Return the median milliseconds of both sides, and the size of a checkpoint."""
    folder = options.folder
    works = {OURS: partial(ours.save, folder, 3), BARE_SAVE: partial(rivals.bare_saves, folder / "bare", 3)}
    speeds = race(works, Length(warm_up=1, turns=options.choose(31, 1)), options.num_threads, "saving")
    ms, bare_ms = (1000 / speeds[name].steady for name in works)  # an "image" is a save
    megabytes = sum(file.stat().st_size for file in (folder / "ckpt" / "latest").iterdir()) / 1e6
    return {"megabytes": megabytes, "ms": ms, "bare_ms": bare_ms, "times": ms / bare_ms}
