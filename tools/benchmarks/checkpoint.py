"""Saving: a verified, committed checkpoint of ResNet-18 with its momentum, beside a bare save, and its share of a run."""

import json
import os
import shutil
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from engine.config.schema import TrainConfig
from tools.benchmarks import ours
from tools.benchmarks.measure import Ratio, add_threads, ratio, take_turns
from tools.benchmarks.sides import Length, race
from tools.benchmarks.training import CONFIGS, N_CIFAR, OURS

SAVES, KEPT = 31, 3
FULL, QUICK = Length(warm_up=1, turns=3, steps=1), Length(warm_up=1, turns=1, steps=1)


def add_command(commands: Any) -> ArgumentParser:
    command = commands.add_parser("checkpoint", description=__doc__, help="a checkpoint beside a bare save, and beside a run")
    add_threads(command)
    return command


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    saves = measure_saves(1 if args.quick else SAVES)
    share = share_of_a_run(saves["ms"] / 1000, QUICK if args.quick else FULL, args.num_threads)
    if args.json:
        what = "a checkpoint of ResNet-18, verified"
        ratios = [ratio(what, "a bare save, flushed too", "ms", saves["ms"], saves["bare_ms"], at_most=2.0), share]
        print(json.dumps({**saves, "left_out": [], "ratios": [asdict(one) for one in ratios]}, indent=2))
    else:
        print(table(saves))
        print(
            f"{100 * share.ratio:.2f} % of the time of a training on CIFAR-10, with one per epoch of {share.theirs:,.0f} seconds"
        )
    return 0


def share_of_a_run(seconds: float, length: Length, threads: int) -> Ratio:
    """Of a checkpoint for each epoch, as is the default; the epoch's time is that of some of its updates."""
    config, batch_size = str(CONFIGS / "resnet18_cifar10.yaml"), TrainConfig().batch_size
    update = partial(ours.update, config, {"train.batch_size": batch_size, "train.num_threads": threads})
    rate = race({OURS: update}, length, threads, "updates")[OURS].steady
    epoch = N_CIFAR // batch_size * batch_size / rate
    return ratio(
        "checkpoints of ResNet-18, one per epoch of CIFAR-10", "the run's time", "s", seconds, epoch + seconds, at_most=0.02
    )


def measure_saves(rounds: int) -> dict[str, float]:
    """Milliseconds, medians; the first save of each isn't counted. Both write new files and keep the last few: a disk may take
    longer for places that it never wrote to."""
    import torch
    from safetensors.torch import save_file

    from engine.run.checkpoint import Checkpoints
    from models import create_model

    model = create_model("resnet18", n_classes=10, in_channels=3, img_size=32, first_block="cifar10")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        run_dir, steps, bare_steps = Path(folder), count(), count()
        checkpoints = Checkpoints(run_dir, keep_last=KEPT)

        def verified() -> None:
            step = next(steps)
            checkpoints.save(step, model.state_dict(), {"optimizer": optimizer.state_dict(), "step": step}, best_step=None)

        def bare() -> None:
            step = next(bare_steps)
            new = run_dir / "bare" / str(step)
            new.mkdir(parents=True)
            save_file(model.state_dict(), new / "model.safetensors")
            torch.save({"optimizer": optimizer.state_dict(), "step": step}, new / "state.pt")
            for path in new.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(run_dir / "bare" / str(step - KEPT), ignore_errors=True)

        times = take_turns(1 + rounds, {"ours": lambda: _milliseconds(verified), "bare": lambda: _milliseconds(bare)}, "saving")
        megabytes = sum(file.stat().st_size for file in (run_dir / "ckpt" / "latest").iterdir()) / 1e6
    ms, bare_ms = median(times["ours"][1:]), median(times["bare"][1:])
    return {"megabytes": megabytes, "ms": ms, "bare_ms": bare_ms, "times": ms / bare_ms}


def _milliseconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - begin)


def table(saves: dict[str, float]) -> str:
    return (
        f"a checkpoint of {saves['megabytes']:.0f} MB, verified and committed   {saves['ms']:7.0f} ms\n"
        f"a bare save of the same tensors, flushed too    {saves['bare_ms']:7.0f} ms\n"
        f"{saves['times']:.2f} times as long"
    )
