"""Training: the engine beside a bare loop, a plain script, and the trainers of other packages, of the same model."""

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.benchmarks import ours, rivals
from tools.benchmarks.measure import Ratio, Report, add_threads, n_cores, ratio, show
from tools.benchmarks.random_sets import write_cifar10, write_mnist
from tools.benchmarks.rivals import Job
from tools.benchmarks.sides import Length, Turns, Work, race

EXAMPLES = """
All train the same model on the same random images in CIFAR-10's (or MNIST's) files, by SGD with momentum and a cosine, each in a
process of its own. "steady" counts neither the start nor the first steps; "cold" is everything from the start of the process on.
This project does all that it does by default: augmentation, metrics, lines, TensorBoard. The plain script has 0 or 2 workers in
its DataLoader; the faster one counts, and the packages get that number too. Keys of a config are the setting that `model --tune`
found for ResNet-18; it is then measured as well.

examples:
  python tools/benchmark.py training
  python tools/benchmark.py training --only lenet --num_threads 1
  python tools/benchmark.py training --train.precision bf16 --train.channels_last true
"""
OURS, TUNED, BARE = "this project", "this project, tuned", "a bare loop on one batch"
CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
N_CIFAR, N_MNIST = 50_000, 60_000
RESNET = Job("resnet18", {"first_block": "cifar10"})
LENET = Job("lenet", batch_size=256, lr=0.01)
LENET_28 = replace(LENET, channels=1, img_size=28)


@dataclass(frozen=True)
class Effort:
    lenet: Length
    resnet: Length
    resnet_batch: int
    n_images: int


FULL = Effort(Length(warm_up=50, turns=9, steps=50), Length(warm_up=2, turns=7, steps=4), 64, N_CIFAR)
QUICK = Effort(Length(warm_up=5, turns=3, steps=10), Length(warm_up=1, turns=1, steps=1), 16, 5_000)


def add_command(commands: Any) -> ArgumentParser:
    command = commands.add_parser("training", description=__doc__, epilog=EXAMPLES, help="training beside loops and trainers")
    add_threads(command)
    command.add_argument("--only", choices=["lenet", "resnet"], help="one of the models (default: both)")
    return command


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    effort = QUICK if args.quick else FULL
    left_out = [f"{name}, which is not installed" for name in rivals.RIVALS if find_spec(name) is None]
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        root = Path(folder)
        write_cifar10(root / "cifar", effort.n_images, 100)
        if args.only != "resnet":
            write_mnist(root / "mnist", n_train=effort.n_images, n_test=100)
            ratios += loop_of_lenet(root, effort.lenet, args.num_threads)
            ratios += whole("LeNet-5 3x32x32", LENET, root, effort.lenet, args.num_threads, 2.3, 1.0)
        if args.only != "lenet":
            job = replace(RESNET, batch_size=effort.resnet_batch)
            ratios += whole("ResNet-18 CIFAR", job, root, effort.resnet, args.num_threads, 0.98, 0.98, tuned=overrides)
    return show(Report({"cores": n_cores(), "threads": args.num_threads}, ratios, left_out), as_json=args.json)


def loop_of_lenet(root: Path, length: Length, threads: int) -> list[Ratio]:
    job = replace(LENET_28, root=root / "mnist")
    works = {OURS: engine(job, {}, root / "loop"), BARE: partial(rivals.bare, job)}
    speeds = race(works, length, threads, "LeNet-5 28x28")
    what = f"LeNet-5 28x28, batch {job.batch_size}: the loop"
    return [ratio(what, BARE, "images/s", speeds[OURS].steady, speeds[BARE].steady, at_least=0.9)]


def whole(
    what: str,
    job: Job,
    root: Path,
    length: Length,
    threads: int,
    than_script: float,
    than_package: float,
    tuned: Mapping[str, Any] | None = None,
) -> list[Ratio]:
    """From the files to the weights."""
    job = replace(job, root=root / "cifar")
    what = f"{what}, batch {job.batch_size}"
    runs = root / what.replace(" ", "-")
    scripts = {f"a plain script, {n} workers": replace(job, workers=n) for n in (0, 2)}
    is_resnet = job.model == RESNET.model
    works: dict[str, Work] = {OURS: engine(job, {}, runs / "a")}
    if tuned:
        works[TUNED] = engine(job, tuned, runs / "tuned")
    if is_resnet:
        works[BARE] = partial(rivals.bare, job)
    works |= {name: partial(rivals.plain_script, of) for name, of in scripts.items()}
    speeds = race(works, length, threads, what)
    best = max(scripts, key=lambda name: speeds[name].steady)
    ratios = []
    if is_resnet:
        ratios.append(ratio(f"{what}: the loop", BARE, "images/s", speeds[OURS].steady, speeds[BARE].steady, at_least=0.97))
    ratios.append(ratio(f"{what}: steady", best, "images/s", speeds[OURS].steady, speeds[best].steady, at_least=than_script))
    if tuned:
        ratios.append(ratio(f"{what}: tuned", best, "images/s", speeds[TUNED].steady, speeds[best].steady, at_least=1.5))
    ratios.append(_cold(what, best, length, speeds))
    return ratios + _packages(what, scripts[best], runs, length, threads, than_package)


def _packages(what: str, job: Job, runs: Path, length: Length, threads: int, at_least: float) -> list[Ratio]:
    offered: dict[str, Work] = {
        "lightning": partial(rivals.lightning, job),
        "transformers": partial(rivals.hf_trainer, job, runs / "hf"),
        "timm": partial(rivals.timm_loop, job),
    }
    there = {rivals.RIVALS[name]: work for name, work in offered.items() if find_spec(name)}
    if not there:
        return []
    speeds = race({OURS: engine(job, {}, runs / "b"), **there}, length, threads, what)
    mine, ratios = speeds[OURS], []
    for name in there:
        ratios.append(ratio(f"{what}: steady", name, "images/s", mine.steady, speeds[name].steady, at_least=at_least))
        ratios.append(_cold(what, name, length, speeds, at_least=at_least))
    return ratios


def _cold(what: str, name: str, length: Length, speeds: Mapping[str, Any], **aim: float) -> Ratio:
    return ratio(f"{what}: cold, {length.n_steps} steps", name, "images/s", speeds[OURS].cold, speeds[name].cold, **aim)


def engine(job: Job, overrides: Mapping[str, Any], runs: Path) -> Work:
    """This project's side of a training."""
    return partial(_in_new_folder, config_of(job), {**keys_of(job), **overrides}, runs)


def config_of(job: Job) -> str:
    name = "lenet_mnist" if job.channels == 1 else f"{job.model}_cifar10"
    return str(CONFIGS / f"{name}.yaml")


def keys_of(job: Job) -> dict[str, Any]:
    """What the other sides are told too; it neither evaluates nor saves while it is measured."""
    return {
        "data.verify": False,
        "data.download": False,
        "data.dataroot": str(job.root),
        "train.n_epochs": None,
        "train.n_steps": rivals.N_STEPS,
        "train.batch_size": job.batch_size,
        "train.eval_freq": rivals.N_STEPS,
        "train.save_freq": rivals.N_STEPS,
    }


def _in_new_folder(config: str, keys: Mapping[str, Any], runs: Path, turns: Turns | None) -> None:
    runs.mkdir(parents=True, exist_ok=True)
    ours.train(config, keys, Path(tempfile.mkdtemp(dir=runs)), turns)
