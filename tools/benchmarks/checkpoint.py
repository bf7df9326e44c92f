"""Saving: a verified, committed checkpoint of ResNet-18 with its momentum, beside a bare save of the same tensors."""

import json
import os
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from tools.benchmarks.measure import take_turns

SAVES = 15


def add_command(commands: Any) -> ArgumentParser:
    return commands.add_parser("checkpoint", description=__doc__, help="a checkpoint beside a bare save")


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    saves = measure_saves(1 if args.quick else SAVES)
    print(json.dumps(saves, indent=2) if args.json else table(saves))
    return 0


def measure_saves(rounds: int) -> dict[str, float]:
    """Milliseconds, medians; the first save of each isn't counted."""
    import torch
    from safetensors.torch import save_file

    from engine.checkpoint import Checkpoints
    from models import create_model

    model = create_model("resnet18", n_classes=10, in_channels=3, img_size=32, first_block="cifar10")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        run_dir, steps = Path(folder), count()
        checkpoints = Checkpoints(run_dir, keep_last=3)

        def ours() -> None:
            step = next(steps)
            checkpoints.save(step, model.state_dict(), {"optimizer": optimizer.state_dict(), "step": step}, best_step=None)

        def bare() -> None:
            save_file(model.state_dict(), run_dir / "model.safetensors")
            torch.save({"optimizer": optimizer.state_dict(), "step": 0}, run_dir / "state.pt")
            for name in ("model.safetensors", "state.pt"):
                with (run_dir / name).open("rb+") as file:
                    os.fsync(file.fileno())

        times = take_turns(1 + rounds, {"ours": lambda: _milliseconds(ours), "bare": lambda: _milliseconds(bare)}, "saving")
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
