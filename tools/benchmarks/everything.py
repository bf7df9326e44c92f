"""Run every benchmark in a process and write one table."""

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import torch

from engine.config.errors import RunError
from tools.benchmarks.report import N_CORES, NUMBERS, ROOT, Options, Ratio, Report, ratio_rows
from tools.benchmarks.training import RESNET_BATCH
from tools.tables import markdown

TUNE = ["model", "--tune", "-c", "configs/resnet18_cifar10.yaml", "--train.batch_size"]
OTHERS = ("start", "evaluation", "memory", "ranks", "growth", "checkpoint", "data")


def measure(options: Options) -> Report:
    begin = time.time()
    tuned = _measured([*TUNE, str(options.choose(*RESNET_BATCH))], quick=options.quick)
    keys = [word for key, value in tuned["keys"].items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    measured = {"model": tuned, "training": _measured(["training", *keys], quick=options.quick)}
    measured |= {name: _measured([name], quick=options.quick) for name in OTHERS}
    minutes = (time.time() - begin) / 60
    ratios = [Ratio(**row) for results in measured.values() for row in results["ratios"]]
    left_out = sorted({name for results in measured.values() for name in results["left_out"]})
    lines = [f"{machine()}, in {minutes:.0f} minutes{', roughly (--quick)' if options.quick else ''}:", ""]
    lines += [*(f"Left out: {name}." for name in left_out), *([""] if left_out else [])]
    text = "\n".join([*lines, markdown(ratio_rows(ratios), NUMBERS)])
    return Report({"machine": machine(), "minutes": minutes, "quick": options.quick, "measured": measured}, text)


def _measured(words: list[str], *, quick: bool) -> dict[str, Any]:
    argv = [sys.executable, "tools/benchmark.py", *words, "--json", *(["--quick"] if quick else [])]
    print(f"{' '.join(words)} ...", file=sys.stderr, flush=True)
    finished = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise RunError(f"`{' '.join(argv[1:])}` failed")
    return json.loads(finished.stdout)


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "accelerate"))
    return f"{N_CORES} cores ({platform.machine()}), {device}, {packages}, {time.strftime('%Y-%m-%d')}"
