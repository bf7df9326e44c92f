"""Compare training by the engine with a bare loop, a plain script, and the trainers of other packages, with the same model."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from tools.benchmarks import ours, rivals
from tools.benchmarks.loops import BARE, N_CIFAR
from tools.benchmarks.random_sets import write_cifar10, write_mnist
from tools.benchmarks.report import Options, Ratio, Report, report
from tools.benchmarks.rivals import LENET, LENET_28, RESNET, Job
from tools.benchmarks.sides import OURS, Length, Work, race, speed_ratio

TUNED = "this project, tuned"
RESNET_BATCH = (64, 16)  # full and quick
PACKAGES = {"lightning": "Lightning's Trainer", "transformers": "transformers' Trainer", "timm": "timm's train loop"}


def measure(options: Options) -> Report:
    n_images, ratios = options.choose(N_CIFAR, 5_000), []
    cifar10 = write_cifar10(options.folder / "cifar", n_images, 100)
    if options.only != "resnet":
        length = options.choose(Length(50, turns=9, steps=50), Length(5, turns=3, steps=10))
        mnist = write_mnist(options.folder / "mnist", n_train=n_images, n_test=100)
        job = replace(LENET_28, root=mnist)
        works: dict[str, Work] = {OURS: partial(ours.train, job, {}, options.folder / "loop"), BARE: partial(rivals.bare, job)}
        speeds = race(works, length, options.num_threads, "LeNet-5 28x28")
        ratios.append(speed_ratio(f"LeNet-5 28x28, batch {job.batch_size}: the loop", BARE, speeds, at_least=0.9))
        ratios += from_files("LeNet-5 3x32x32", replace(LENET, root=cifar10), length, options, 2.3, 1.0)
    if options.only != "lenet":
        length = options.choose(Length(2, turns=7, steps=4), Length(1, turns=1, steps=1))
        job = replace(RESNET, root=cifar10, batch_size=options.choose(*RESNET_BATCH))
        ratios += from_files("ResNet-18 CIFAR", job, length, options, 0.98, 0.98, loop_at_least=0.97, tuned=options.overrides)
    left_out = [f"{name}, which is not installed" for name in PACKAGES if find_spec(name) is None]
    return report(ratios, left_out, threads=options.num_threads)


def from_files(
    what: str,
    job: Job,
    length: Length,
    options: Options,
    script_at_least: float,
    package_at_least: float,
    *,
    loop_at_least: float | None = None,
    tuned: Mapping[str, Any] | None = None,
) -> list[Ratio]:
    """Measure trainings that read the files. With `loop_at_least`, a bare loop is measured too."""
    what = f"{what}, batch {job.batch_size}"
    steady, cold = f"{what}: steady", f"{what}: cold, {length.warm_up + length.turns * length.steps} steps"
    runs, threads = options.folder / job.model, options.num_threads

    scripts = {f"a plain script, {n} workers": replace(job, workers=n) for n in (0, 2)}
    works: dict[str, Work] = {OURS: partial(ours.train, job, {}, runs / "a")}
    if tuned:
        works[TUNED] = partial(ours.train, job, tuned, runs / "tuned")
    if loop_at_least is not None:
        works[BARE] = partial(rivals.bare, job)
    works |= {name: partial(rivals.plain_script, script) for name, script in scripts.items()}
    speeds = race(works, length, threads, what)
    best = max(scripts, key=lambda name: speeds[name].steady)
    ratios = [speed_ratio(f"{what}: the loop", BARE, speeds, loop_at_least)] if BARE in speeds else []
    ratios.append(speed_ratio(steady, best, speeds, script_at_least))
    if tuned:
        ratios.append(speed_ratio(f"{what}: tuned", best, speeds, 1.5, ours=TUNED))
    ratios.append(speed_ratio(cold, best, speeds, cold=True))

    job = scripts[best]
    sides: dict[str, Work] = {
        "lightning": partial(rivals.lightning, job),
        "transformers": partial(rivals.hf_trainer, job, runs / "hf"),
        "timm": partial(rivals.timm_loop, job),
    }
    packages = {PACKAGES[name]: work for name, work in sides.items() if find_spec(name)}
    if packages:
        speeds = race({OURS: partial(ours.train, job, {}, runs / "b"), **packages}, length, threads, what)
    for name in packages:
        ratios.append(speed_ratio(steady, name, speeds, package_at_least))
        ratios.append(speed_ratio(cold, name, speeds, package_at_least, cold=True))
    return ratios
