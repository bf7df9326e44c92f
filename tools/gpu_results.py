#!/usr/bin/env python
"""Train on a GPU: airbench94 as often as two minutes allow, a run that is killed and resumed, and ten models on CIFAR-10."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from safetensors.torch import load_file
from torch import nn

from engine import load_config, train
from engine.build import build_model, described_data
from engine.config.command_line import run_tool
from engine.config.errors import RunError
from engine.config.resolve import ResolvedConfig
from tools.document import MEASURED, ROOT
from tools.gpu_speed import measure, open_device, parse
from tools.results import data_folders

EXAMPLES = """
The tests that need a GPU run first. `make docs` copies the table to docs/measured/gpu.md and docs/results.md.

examples:
  python tools/gpu_results.py --data "CIFAR-10=~/data/CIFAR-10:pixels from JPEGs"
  python tools/gpu_results.py --device cpu --quick -o results.json     a trial of this program: a few updates of each
"""
HEAD = ["what", "acc@1", "seconds", "images/s", "MB", "details"]
TESTS = ("tests/engine/test_precision.py", "tests/engine/test_many_gpus.py")
COMPILED = ("resnet18", "preactresnet18", "se_resnet18", "vgg19_bn")  # three times as fast with CUDA graphs, at batch 256
SECONDS = {"resnet18": 50, "vgg11": 50, "mobilenet": 70, "vit_tiny": 110, "preactresnet18": 50, "vgg19_bn": 50}  # on an H100
SECONDS |= {"se_resnet18": 60, "cbam_resnet18": 120, "shufflenet_1_0x_g8": 120, "resnext29_32x4d": 250}


def main(argv: Sequence[str] | None = None) -> int:
    data = "--data", {"default": "", "metavar": "CIFAR-10=FOLDER[:NOTE]", "help": "where the data is, read as it is"}
    args = parse("gpu_results.py", __doc__, EXAMPLES, MEASURED / "gpu-results.json", argv, data)
    folder, note = data_folders([args.data] if args.data else []).get("CIFAR-10", ("", ""))
    options: dict[str, Any] = {"data.dataroot": folder, "data.verify": False} if folder else {}
    if args.quick:
        options |= {"train.n_steps": 4, "train.n_epochs": None, "train.batch_size": 32, "eval.tta": None}
    card = open_device(args.device)
    return measure(HEAD, parts(options, args.quick), args, f"{card}, {note}" if note else card)


def parts(options: dict[str, Any], quick: bool) -> dict[str, tuple[int, Callable[[Path], list[str]]]]:
    """Return each part with the seconds that it takes on an H100, the most wanted first."""
    compiled = {} if quick else {"train.compile": True, "train.compile_mode": "reduce-overhead"}
    chosen: dict[str, tuple[int, Callable[[Path], list[str]]]] = {
        "tests that need a GPU": (40, run_tests),
        "airbench94, 8 epochs, compiled": (120, partial(airbench, 0 if quick else 120, {**options, **compiled})),
        "ResNet-18 with --deterministic true, killed and resumed": (50, partial(killed_and_resumed, options, quick)),
    }
    graphs = {} if quick else {"train.compile": True, "train.compile_mode": "reduce-overhead"}
    for name, seconds in SECONDS.items():
        length = {"train.n_epochs": 30, "train.n_steps": None, "train.sched.eta_min": 0.0, "train.print_freq": 500}
        speed = {"train.precision": "bf16", "train.channels_last": True, "train.eval_freq": 2000, "eval.batch_size": 1000}
        config = {**length, **speed, **options, **(graphs if name in COMPILED else {})}
        chosen[f"{name}, 30 epochs"] = seconds, partial(of_model, f"{name}_cifar10", config)
    return chosen


def run_tests(folder: Path) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", str(folder / "tests"), *TESTS]
    return ["", "", "", "", call(command)]


def call(command: list[str]) -> str:
    """Return the last line that a command prints; if it fails, that is the error."""
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    last = ended.stdout.strip().rpartition("\n")[2].strip("= ")
    if ended.returncode:
        raise RunError(last)
    return last


def trained(config: ResolvedConfig, folder: Path, network: nn.Module | None = None) -> tuple[float, float, dict[str, Any]]:
    """Return the last accuracy, the seconds of training and evaluation, and results.json of a run."""
    result = train(config, exp_dir=folder, model=network)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if result.exit_code:
        raise RunError(f"{config.model.name} ended with exit code {result.exit_code}")
    return lines[-1]["valid/acc@1"], lines[-1]["elapsed"], json.loads((folder / "results.json").read_text())


def config_of(name: str, options: dict[str, Any]) -> ResolvedConfig:
    return load_config(ROOT / "configs" / f"{name}.yaml", options)


def fresh_model(config: ResolvedConfig) -> nn.Module:
    return build_model(config, described_data(config, list("0123456789")))


def airbench(at_most: float, options: dict[str, Any], folder: Path) -> list[str]:
    """Train one seed after the other, all in the same network, which only the first compiles; the times leave that one out."""
    accuracies: list[float] = []
    seconds: list[float] = []
    start, slowest = time.monotonic(), 0.0
    network = fresh_model(config_of("sprint94_cifar10", options))
    while len(seconds) < 2 or time.monotonic() - start + slowest < at_most:
        began, seed = time.monotonic(), len(seconds) + 1
        config = config_of("sprint94_cifar10", {**options, "seed": seed})
        network.load_state_dict(fresh_model(config).state_dict())
        accuracy, elapsed, results = trained(config, folder / str(seed), network)
        accuracies.append(100 * accuracy)
        seconds.append(elapsed)
        slowest = max(slowest, time.monotonic() - began) if seed > 1 else 0.0
    first, others = seconds[0], seconds[1:]
    spread = f"{min(others):.2f} to {max(others):.2f}"
    details = f"{len(seconds)} seeds; the first compiles, in {first:.0f} s, the others take {spread} s with the evaluation"
    accuracy_cell = f"{mean(accuracies):.2f} ± {stdev(accuracies):.2f} %"
    return [accuracy_cell, f"{mean(others):.2f}", *speed_and_memory(results), details]


def of_model(name: str, options: dict[str, Any], folder: Path) -> list[str]:
    config = config_of(name, options)
    accuracy, seconds, results = trained(config, folder)
    details = f"batch {config.train.batch_size}, bf16, channels_last" + (", CUDA graphs" if config.train.compile else "")
    return [f"{100 * accuracy:.2f} %", f"{seconds:.0f}", *speed_and_memory(results), details]


def speed_and_memory(results: dict[str, Any]) -> list[str]:
    return [f"{results['images_per_sec']:,.0f}", f"{results['peak_memory_mb']:,.0f}"]


def killed_and_resumed(options: dict[str, Any], quick: bool, folder: Path) -> list[str]:
    """Compare the weights of a run that SIGKILL ended after its first checkpoint with those of a run that was left alone."""
    n_steps, batch_size = (6, 8) if quick else (300, 128)
    keys = {"deterministic": True, **options, "train.n_steps": n_steps, "train.batch_size": batch_size, "train.print_freq": 1}
    keys |= {"train.save_freq": n_steps // 3, "train.eval_freq": 100_000}
    words = [word for key, value in keys.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    command = [sys.executable, str(ROOT / "main.py")]
    begin = [*command, "-c", str(ROOT / "configs" / "resnet18_cifar10.yaml"), *words, "-e"]
    whole, cut = folder / "1", folder / "2"
    call([*begin, str(whole)])
    with subprocess.Popen([*begin, str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(cut.glob("ckpt/step-*/manifest.json")):
            time.sleep(0.02)
        process.kill()
    if process.returncode != -signal.SIGKILL:
        raise RunError(f"the run ended with {process.returncode} before it was killed")
    killed_at = max(path.name for path in cut.glob("ckpt/step-*"))
    call([*command, "-e", str(cut), "-r", "latest"])
    ours, theirs = (load_file(run / "ckpt" / "latest" / "model.safetensors") for run in (whole, cut))
    differing = [name for name, tensor in ours.items() if not tensor.equal(theirs[name])]
    alike = f"{len(differing)} of {len(ours)} tensors differ" if differing else f"all {len(ours)} tensors are equal, bit for bit"
    return ["", "", "", "", f"fp32, {n_steps} updates of {batch_size} images, killed after {killed_at}: {alike}"]


if __name__ == "__main__":
    sys.exit(run_tool(main))
