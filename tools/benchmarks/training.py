"""Compare training by the engine with a bare loop, a plain script, and the trainers of other packages, with the same model."""

from dataclasses import replace
from functools import partial

from tools.benchmarks import ours, rivals
from tools.benchmarks.loops import BARE, N_CIFAR
from tools.benchmarks.random_sets import write_cifar10, write_mnist
from tools.benchmarks.report import Options, Ratio, Report, report
from tools.benchmarks.rivals import LENET, LENET_28, RESNET, Job
from tools.benchmarks.sides import OURS, Length, Work, cold_ratio, installed, race, speed_ratios

TUNED = "this project, tuned"
RESNET_BATCH = (64, 16)  # full and quick
MODULES = {"Lightning's Trainer": "lightning", "transformers' Trainer": "transformers", "timm's train loop": "timm"}


def measure(options: Options) -> Report:
    n_images, ratios, left_out = options.choose(N_CIFAR, 5_000), list[Ratio](), list[str]()
    cifar10 = write_cifar10(options.folder / "cifar", n_images, 100)
    if options.only != "resnet":
        length = options.choose(Length(50, turns=5, steps=50), Length(5, turns=3, steps=10))
        job = replace(LENET_28, root=write_mnist(options.folder / "mnist", n_train=n_images, n_test=100))
        works: dict[str, Work] = {OURS: partial(ours.train, job, {}, options.folder / "loop"), BARE: partial(rivals.bare, job)}
        speeds = race(works, length, options.num_threads, "LeNet-5 28x28", options.busy)
        ratios += speed_ratios(f"LeNet-5 28x28, batch {job.batch_size}: the loop", BARE, speeds, 0.9, kept=True)
        left_out = from_files(ratios, "LeNet-5 3x32x32", replace(LENET, root=cifar10), length, options, 2.3, 1.0)
    if options.only != "lenet":
        length = options.choose(Length(2, turns=5, steps=4), Length(1, turns=1, steps=1))
        job = replace(RESNET, root=cifar10, batch_size=options.choose(*RESNET_BATCH))
        left_out = from_files(ratios, "ResNet-18 CIFAR", job, length, options, 0.98, 0.98)
    return report(ratios, f"{options.num_threads} threads, {options.busy} busy processes", left_out)


def from_files(
    ratios: list[Ratio], what: str, job: Job, length: Length, options: Options, script_at_least: float, package_at_least: float
) -> list[str]:
    """Measure trainings that read the files, and for a ResNet a bare loop and the tuned setting; return what isn't installed."""
    what, is_resnet = f"{what}, batch {job.batch_size}", job.model == RESNET.model
    steady, cold = f"{what}: steady", f"{what}: cold, {length.warm_up + length.turns * length.steps} steps"
    runs, threads = options.folder / job.model, options.num_threads
    scripts = {f"a plain script, {n} workers": replace(job, workers=n) for n in (0, 2)}
    works: dict[str, Work] = {OURS: partial(ours.train, job, {}, runs / "a")}
    works |= {name: partial(rivals.plain_script, script) for name, script in scripts.items()}
    if is_resnet:
        works[BARE] = partial(rivals.bare, job)
    if is_resnet and options.overrides:
        works[TUNED] = partial(ours.train, job, options.overrides, runs / "tuned")
    speeds = race(works, length, threads, what, options.busy)
    best = max(scripts, key=lambda name: speeds[name].steady)
    if is_resnet:
        ratios += speed_ratios(f"{what}: the loop", BARE, speeds, 0.97, kept=True)
    ratios += speed_ratios(steady, best, speeds, script_at_least, kept=not is_resnet)
    if TUNED in speeds:
        ratios += speed_ratios(f"{what}: tuned", best, speeds, 1.5, ours=TUNED)
    ratios.append(cold_ratio(cold, best, speeds))

    job = scripts[best]
    trainers = (partial(rivals.lightning, job), partial(rivals.hf_trainer, job, runs / "hf"), partial(rivals.timm_loop, job))
    packages, left_out = installed(dict(zip(MODULES, trainers, strict=True)), MODULES)
    if packages:
        speeds = race({OURS: partial(ours.train, job, {}, runs / "b"), **packages}, length, threads, what)
    for name in packages:
        ratios += [*speed_ratios(steady, name, speeds, package_at_least), cold_ratio(cold, name, speeds, package_at_least)]
    return left_out
