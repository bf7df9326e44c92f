"""Compare parts of a training with bare loops: its start, evaluation, memory, two ranks, growth, and saving."""

import json
import os
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from tempfile import mkdtemp

from tools.benchmarks import ours, rivals
from tools.benchmarks.random_sets import write_cifar10, write_jpegs, write_mnist
from tools.benchmarks.report import ROOT, Options, Ratio, Report, ratio, report
from tools.benchmarks.rivals import LENET_28, RESNET
from tools.benchmarks.sides import OURS, InEnvironment, Length, Side, Turns, Work, race, run_python, speed_ratios, take_turns

BARE, BARE_SAVE = "a bare loop on one batch", "a bare save, flushed too"
IMPORTS = "import torch, torchvision, accelerate"
N_CIFAR, N_RANKS = 50_000, 2
KEEP_ALL = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}  # freed memory of any size
LINES = 20  # of metrics.jsonl, at its beginning and at its end


def start(options: Options) -> Report:
    mnist = write_mnist(options.folder / "data", n_train=60_000, n_test=10_000)
    on_mnist = ["-c", "configs/lenet_mnist.yaml", "--data.dataroot", str(mnist), "--data.verify", "false"]
    programs = {
        (rival := f'python -c "{IMPORTS}"'): partial(run_python, ["-c", IMPORTS]),
        "main.py, LeNet-5 on digits: to the first step": partial(run_to_first_step, options.folder, []),
        "main.py, LeNet-5 on MNIST: to the first step": partial(run_to_first_step, options.folder, on_mnist),
        "main.py --help": partial(run_python, ["main.py", "--help"]),
    }
    times = take_turns(options.choose(4, 1), programs, "starts")
    seconds = {name: median(of_action[1:] or of_action) for name, of_action in times.items()}
    aims = dict(zip([*programs][1:], (1.5, 1.5, 0.3), strict=True))  # how many times as long as the imports they may take
    return report([ratio(name, rival, "s", seconds[name], seconds[rival], at_most=aim) for name, aim in aims.items()])


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
    return report(speed_ratios(f"evaluation of {n_images:,} CIFAR images, ResNet-18", bare, speeds, 0.97), options.setting)


def memory(options: Options) -> Report:
    n_train, n_test, batch_size = options.choose((N_CIFAR, 10_000, 256), (1_000, 200, 16))
    job = replace(RESNET, root=write_cifar10(options.folder / "cifar", n_train, n_test), batch_size=batch_size)
    works = {OURS: partial(ours.train, job, {}, options.folder / "run"), BARE: partial(rivals.bare, job)}
    speeds = race(works, Length(warm_up=1, turns=1), options.num_threads, "memory")
    data_mib = (n_train + n_test) * 3 * 32 * 32 / 2**20
    what = f"peak memory of ResNet-18 CIFAR, batch {batch_size}, without the {data_mib:.0f} MiB of images"
    mine, theirs = (speeds[name].quiet[-1].peak_mib for name in works)
    return report([ratio(what, BARE, "MiB", mine - data_mib, theirs, at_most=1.05), *kept_memory(options)], options.setting)


def kept_memory(options: Options) -> list[Ratio]:
    """Compare train.keep_memory with glibc's own variables, and with the default."""
    ratios = []
    large = (("sprint94", 2000), ("resnet18", 256), ("resnet18", 512))
    for config, batch_size in options.choose(large, (("resnet18", 16),)):
        path, keys = ROOT / "configs" / f"{config}_cifar10.yaml", {"train.batch_size": batch_size}
        keys |= {"train.num_threads": options.num_threads}
        kept, default = (partial(ours.update, path, {**keys, "train.keep_memory": keep}) for keep in (True, False))
        works: dict[str, Work] = {OURS: kept, "the default": default, "glibc's variables": InEnvironment(default, KEEP_ALL)}
        speeds = race(works, options.choose(Length(2, turns=3), Length(1, turns=1)), options.num_threads, config)
        what = f"updates of {config}_cifar10.yaml, batch {batch_size}, with train.keep_memory"
        for name, aim in (("glibc's variables", 0.95), ("the default", None)):
            ratios += speed_ratios(what, name, speeds, aim)
        peaks = (speeds[name].quiet[-1].peak_mib for name in (OURS, "the default"))
        ratios.append(ratio(f"{what}: peak memory", "the default", "MiB", *peaks))
    return ratios


def ranks(options: Options) -> Report:
    length, bare = options.choose(Length(2, turns=5, steps=2), Length(1, turns=1)), "a bare DDP loop on one batch"
    n_images, batch_size = options.choose((N_CIFAR, 64), (1_000, 16))
    job = replace(RESNET, root=write_cifar10(options.folder / "cifar", n_images, 100), batch_size=batch_size)
    works = {OURS: partial(ours.train, job, {}, options.folder / "run"), bare: partial(rivals.bare, job)}
    speeds = race({name: partial(_on_ranks, work) for name, work in works.items()}, length, 1, "ranks")
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


def growth(options: Options) -> Report:
    return report([*with_more_samples(options), *after_more_steps(options)], options.setting)


def with_more_samples(options: Options) -> list[Ratio]:
    seldom = {"train.print_freq": 200}
    in_files = {"data.name": "imagefolder", "data.img_size": 32, "dataloader.num_workers": 2, "data.verify": True, **seldom}
    memory, files, ratios = dict[str, Work](), dict[str, Work](), list[Ratio]()
    for n in options.choose((1_000, 100_000, 1_000_000), (1_000, 20_000)):
        root = options.folder / str(n)
        job = replace(LENET_28, root=write_mnist(root / "mnist", n_train=n, n_test=100))
        memory[f"with {n:,}"] = partial(ours.train, job, seldom, root / "memory-run")
        for part, n_of_part in (("train", n), ("val", 10)):
            write_jpegs(root / "folder" / part, n_of_part)
        job = replace(LENET_28, root=root / "folder", batch_size=64)
        files[f"with {n:,}"] = partial(ours.train, job, in_files, root / "folder-run")
    lengths = options.choose((Length(20, 5, 100), Length(4, 3, 8)), (Length(5, 3, 20), Length(2, 2, 2)))
    for where, works, length in zip(("in memory", "in a folder"), (memory, files), lengths, strict=True):
        few, *more = speeds = race(works, length, options.num_threads, f"samples {where}")
        for many in more:
            ratios += speed_ratios(f"training {many} samples {where}", few, speeds, 0.9, ours=many)
    return ratios


def after_more_steps(options: Options) -> list[Ratio]:
    root, threads = options.folder, options.num_threads
    job = replace(LENET_28, root=write_mnist(root / "data", n_train=10_000, n_test=100), batch_size=16)
    works, run_dirs = dict[str, Work](), [root / "early", root / "late"]
    for n, run_dir in zip(options.choose((10, 10_000), (10, 200)), run_dirs, strict=True):
        keys = {**ours.keys_of(job), "train.n_steps": n, "train.print_freq": max(1, n // 100), "train.num_threads": threads}
        words = [f"--{key}={json.dumps(value)}" for key, value in keys.items()]
        run_python(["main.py", "-c", str(ours.config_of(job)), "-e", str(run_dir), *words])
        works[f"from step {n:,} on"] = partial(ours.train, job, {}, run_dir, resume=True)
    lines = (run_dirs[1] / "metrics.jsonl").read_bytes().splitlines()
    short, long = (mean(map(len, some)) for some in (lines[:LINES], lines[-LINES:]))
    early_bytes, late_bytes = ((run_dir / "ckpt" / "latest" / "train_state.pt").stat().st_size for run_dir in run_dirs)
    early, late = works
    speeds = race(works, options.choose(Length(20, 5, 100), Length(5, 3, 20)), threads, "steps")
    resuming = {name: partial(_seconds_to_start, name, work, threads) for name, work in works.items()}
    starts = take_turns(options.choose(3, 1), resuming, "resuming")
    return [
        *speed_ratios(f"training {late}", early, speeds, 0.9, ours=late),
        ratio(f"resuming {late}", early, "s", median(starts[late]), median(starts[early]), at_most=1.1),
        ratio(f"a line of the log, {late}", "one at the beginning", "bytes", long, short, at_most=1.1),
        ratio(f"the state in a checkpoint, {late}", early, "bytes", late_bytes, early_bytes, at_most=1.01),
    ]


def _seconds_to_start(name: str, work: Work, threads: int) -> float:
    with closing(Side(name, work, threads)) as side:
        return side.start.seconds


def checkpoint(options: Options) -> Report:
    folder, threads, batch_size = options.folder, options.num_threads, ours.DEFAULT_BATCH_SIZE
    works = {OURS: partial(ours.save, folder, 3), BARE_SAVE: partial(rivals.bare_saves, folder / "bare", 3)}
    saves = race(works, Length(1, options.choose(31, 1)), threads, "saving")
    ms, bare_ms = (1000 / saves[name].steady for name in works)  # an "image" is a save
    update = partial(ours.update, ours.config_of(RESNET), {"train.batch_size": batch_size, "train.num_threads": threads})
    rate = race({OURS: update}, Length(1, options.choose(3, 1)), threads, "updates")[OURS].steady
    epoch = N_CIFAR // batch_size * batch_size / rate
    bare = ratio("a checkpoint of ResNet-18, verified", BARE_SAVE, "ms", ms, bare_ms, at_most=2.0)
    what, s = "checkpoints of ResNet-18, one per epoch of CIFAR-10", ms / 1000
    megabytes = sum(file.stat().st_size for file in (folder / "ckpt" / "latest").iterdir()) / 1e6
    ratios = [bare, ratio(what, "the run's time", "s", s, epoch + s, at_most=0.02)]
    return report(ratios, f"{options.setting}, {megabytes:.0f} MB", megabytes=megabytes)
