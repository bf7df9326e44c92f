"""Compare the time from the command to the first training step, and of --help, with importing what every training needs."""

from functools import partial
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

from tools.benchmarks.random_sets import write_mnist
from tools.benchmarks.report import N_CORES, Options, Report, ratio, report
from tools.benchmarks.sides import run_python, take_turns

IMPORTS = "import torch, torchvision, accelerate"
DIGITS, MNIST = (f"main.py, LeNet-5 on {data}: to the first step" for data in ("digits", "MNIST"))
HELP_PAGE = "main.py --help"


def measure(options: Options) -> Report:
    mnist = write_mnist(options.folder / "data", n_train=60_000, n_test=10_000)
    of_mnist = ["-c", "configs/lenet_mnist.yaml", "--data.dataroot", str(mnist), "--data.verify", "false"]
    actions = {
        IMPORTS: partial(run_python, ["-c", IMPORTS]),
        DIGITS: partial(run_to_first_step, options.folder, []),
        MNIST: partial(run_to_first_step, options.folder, of_mnist),
        HELP_PAGE: partial(run_python, ["main.py", "--help"]),
    }
    times = take_turns(options.choose(4, 1), actions, "starts")
    seconds = {name: median(of_action[1:] or of_action) for name, of_action in times.items()}
    rival = f'python -c "{IMPORTS}"'
    ratios = [
        ratio(what, rival, "s", seconds[what], seconds[IMPORTS], at_most=at_most)
        for what, at_most in ((DIGITS, 1.5), (MNIST, 1.5), (HELP_PAGE, 0.3))
    ]
    return report({"cores": N_CORES}, ratios)


def run_to_first_step(folder: Path, words: list[str]) -> float:
    exp_dir = Path(mkdtemp(dir=folder))
    return run_python(["main.py", *words, "-e", str(exp_dir), "--train.print_freq", "1"], until=exp_dir / "metrics.jsonl")
