"""Starting: from the command to the first training step, and --help, beside importing what every training needs."""

import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from engine.config.errors import RunError
from tools.benchmarks.measure import Report, n_cores, ratio, show, take_turns
from tools.benchmarks.random_sets import write_mnist

EXAMPLES = """
The first step is over when its line is in metrics.jsonl. The first round, which finds cold files, isn't counted, but for --quick.

examples:
  python tools/benchmark.py start
  python tools/benchmark.py start --quick --json
"""
ROOT = Path(__file__).resolve().parent.parent.parent
IMPORTS = "import torch, torchvision, accelerate"
ROUNDS, TIMEOUT = 3, 300.0


def add_command(commands: Any) -> ArgumentParser:
    return commands.add_parser("start", description=__doc__, epilog=EXAMPLES, help="the first step beside the imports")


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = Path(folder)
        mnist = write_mnist(root / "data", n_train=60_000, n_test=10_000)
        keys = ["--data.dataroot", str(mnist), "--data.verify", "false"]
        actions = {
            "imports": partial(until_it_ends, ["-c", IMPORTS]),
            "digits": partial(until_first_step, root, []),
            "MNIST": partial(until_first_step, root, ["-c", "configs/lenet_mnist.yaml", *keys]),
            "help": partial(until_it_ends, ["main.py", "--help"]),
        }
        taken = take_turns(1 if args.quick else 1 + ROUNDS, actions, "starts")
    seconds = {name: median(times[1:] or times) for name, times in taken.items()}
    rival, imports = f'python -c "{IMPORTS}"', seconds["imports"]
    ratios = [
        ratio("main.py, LeNet-5 on digits: to the first step", rival, "s", seconds["digits"], imports, at_most=1.5),
        ratio("main.py, LeNet-5 on MNIST: to the first step", rival, "s", seconds["MNIST"], imports, at_most=1.5),
        ratio("main.py --help", rival, "s", seconds["help"], imports, at_most=0.3),
    ]
    return show(Report({"cores": n_cores()}, ratios), as_json=args.json)


def until_it_ends(words: list[str]) -> float:
    """Seconds of a program in Python."""
    begin = time.perf_counter()
    finished = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RunError(f"python {' '.join(words)} failed:\n{finished.stderr}")
    return time.perf_counter() - begin


def until_first_step(root: Path, words: list[str]) -> float:
    exp_dir = Path(tempfile.mkdtemp(dir=root))
    argv = [sys.executable, "main.py", *words, "-e", str(exp_dir), "--train.print_freq", "1"]
    metrics, output = exp_dir / "metrics.jsonl", exp_dir.with_suffix(".out")
    with output.open("w") as file:
        begin = time.perf_counter()
        process = subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=file)
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None or time.perf_counter() - begin > TIMEOUT:
                    raise RunError(f"{' '.join(argv)} came to no first step:\n{output.read_text()}")
                time.sleep(0.005)
            return time.perf_counter() - begin
        finally:
            process.kill()
            process.wait()
