"""Every benchmark, each in a process of its own, as one table."""

import json
import platform
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.config.errors import RunError
from tools.benchmarks import training
from tools.benchmarks.measure import Ratio, n_cores, rows_of
from tools.tables import markdown, write_text

EXAMPLES = """
`make bench` writes docs/measured/benchmark.md and benchmark.json with it; README shows the table.

examples:
  python tools/benchmark.py all --quick
  python tools/benchmark.py all --output docs/measured
"""
TUNE = ["model", "--tune", "-c", "configs/resnet18_cifar10.yaml", "--train.batch_size"]
OTHERS = ("start", "evaluation", "memory", "ranks", "growth", "checkpoint", "data")
ROOT = Path(__file__).resolve().parent.parent.parent


def add_command(commands: Any) -> ArgumentParser:
    command = commands.add_parser("all", description=__doc__, epilog=EXAMPLES, help="all of the others, as one table")
    command.add_argument("--output", type=Path, metavar="FOLDER", help="write benchmark.md and benchmark.json there")
    return command


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    begin = time.time()
    effort = training.QUICK if args.quick else training.FULL
    tuned = _measured([*TUNE, str(effort.resnet_batch)], quick=args.quick)
    keys = [word for key, value in tuned["keys"].items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    measured = {"model": tuned, "training": _measured(["training", *keys], quick=args.quick)}
    measured |= {name: _measured([name], quick=args.quick) for name in OTHERS}
    report = {"machine": machine(), "minutes": (time.time() - begin) / 60, "quick": args.quick, "measured": measured}
    as_json, as_table = json.dumps(report, indent=2) + "\n", text(report)
    if args.output is not None:
        write_text(args.output / "benchmark.md", as_table)
        write_text(args.output / "benchmark.json", as_json)
    else:
        print(as_json if args.json else as_table, end="")
    return 0


def _measured(words: list[str], *, quick: bool) -> dict[str, Any]:
    argv = [sys.executable, "tools/benchmark.py", *words, "--json", *(["--quick"] if quick else [])]
    print(f"{' '.join(words)} ...", file=sys.stderr, flush=True)
    finished = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise RunError(f"`{' '.join(argv[1:])}` failed")
    return json.loads(finished.stdout)


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "accelerate"))
    return f"{n_cores()} cores ({platform.machine()}), {device}, {packages}, {time.strftime('%Y-%m-%d')}"


def text(report: dict[str, Any]) -> str:
    """As README has it."""
    measured = report["measured"].values()
    ratios = [Ratio(**row) for benchmark in measured for row in benchmark["ratios"]]
    left_out = sorted({name for benchmark in measured for name in benchmark["left_out"]})
    lines = [f"{report['machine']}, in {report['minutes']:.0f} minutes{', roughly (--quick)' if report['quick'] else ''}:", ""]
    lines += [*(f"Left out: {name}." for name in left_out), *([""] if left_out else [])]
    return "\n".join([*lines, markdown(rows_of(ratios), right=(2, 3, 5))]) + "\n"
