"""Two ranks: the engine beside a bare loop of DistributedDataParallel, with a thread for each rank on a CPU."""

import os
import socket
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tools.benchmarks import rivals
from tools.benchmarks.measure import Report, n_cores, ratio, show
from tools.benchmarks.random_sets import write_cifar10
from tools.benchmarks.sides import Length, Turns, race
from tools.benchmarks.training import N_CIFAR, OURS, RESNET, engine

EXAMPLES = """
examples:
  python tools/benchmark.py ranks
"""
FULL, QUICK = Length(warm_up=2, turns=5, steps=2), Length(warm_up=1, turns=1, steps=1)
N_RANKS = 2

RankWork = Callable[[Turns | None], None]


def add_command(commands: Any) -> ArgumentParser:
    return commands.add_parser("ranks", description=__doc__, epilog=EXAMPLES, help="two ranks beside a bare DDP loop")


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    length, n_images, batch_size = (QUICK, 1_000, 16) if args.quick else (FULL, N_CIFAR, 64)
    bare = "a bare DDP loop on one batch"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        job = replace(RESNET, root=write_cifar10(Path(folder) / "cifar", n_images, 100), batch_size=batch_size)
        works = {OURS: engine(job, {}, Path(folder) / "run"), bare: partial(rivals.bare_ddp, job)}
        works = {name: partial(_on_ranks, work) for name, work in works.items()}
        speeds = race(works, length, 1, "ranks")
    what = f"ResNet-18 CIFAR on {N_RANKS} ranks, batch {batch_size} over both: the loop"
    ratios = [ratio(what, bare, "images/s", speeds[OURS].steady, speeds[bare].steady, at_least=0.97)]
    return show(Report({"cores": n_cores(), "threads_of_each_rank": 1}, ratios), as_json=args.json)


def _on_ranks(work: RankWork, turns: Turns) -> None:
    """This process is rank 0, which alone has turns: the others can't go on without it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(1, N_RANKS):
        get_context("spawn").Process(target=_rank, args=(work, rank, port, None)).start()
    _rank(work, 0, port, turns)


def _rank(work: RankWork, rank: int, port: int, turns: Turns | None) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(N_RANKS))
    work(turns)
