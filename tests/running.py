"""Run the program: in this process if that is equivalent, otherwise as a command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from engine.config.command_line import run_tool
from main import main

ROOT = Path(__file__).resolve().parent.parent


def run_main(*argv: object) -> int:
    """Run main.py in this process and return its exit code."""
    return run_tool(lambda: main([str(word) for word in argv]))


def run_command(*argv: object, timeout: float = 300, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Run a command in a separate process, with the Python interpreter of the tests."""
    words = [sys.executable if word == "python" else str(word) for word in argv]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words, cwd=cwd, env={**os.environ, "PATH": path, **env}, capture_output=True, text=True, timeout=timeout, check=False
    )


def run_on_two_ranks(*argv: object, timeout: float = 300) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "main.py", *argv]
    return run_command("python", *command, timeout=timeout)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Remove the times, which differ between any two runs."""
    return [{k: v for k, v in line.items() if k not in ("elapsed", "train/images_per_sec")} for line in lines]


def results(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "results.json").read_text())


def weights(run_dir: Path, which: str = "latest") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / "ckpt" / which / "model.safetensors")


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, {different[0]} first"


def stop_ignoring_signals() -> None:
    """Take back what a process in the background or under nohup inherits: trainings would ignore Ctrl-C or a closed terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
