"""Compare training by the engine with a bare loop, a plain script, and the trainers of other packages, with the same model."""

from dataclasses import replace
from functools import partial

from tools.benchmarks import ours, rivals
from tools.benchmarks.loops import BARE, N_CIFAR
from tools.benchmarks.random_sets import write_cifar10
from tools.benchmarks.report import RESNET_BATCH, Options, Ratio, Report, report
from tools.benchmarks.rivals import LENET, RESNET, Job
from tools.benchmarks.sides import OURS, Length, Work, cold_ratio, installed, race, speed_ratios

TUNED = "this project, tuned"
MODULES = {"Lightning's Trainer": "lightning", "transformers' Trainer": "transformers", "timm's train loop": "timm"}
AIMS = {"lenet": (0.9, 2.3, 1.0), "resnet": (0.97, 0.98, 0.98)}  # beside a bare loop, a script, and the packages


def measure(options: Options) -> Report:
    root = write_cifar10(options.folder / "cifar", options.choose(N_CIFAR, 5_000), 100)
    lenet, resnet = replace(LENET, root=root), replace(RESNET, root=root, batch_size=options.choose(*RESNET_BATCH))
    trainings = {
        "lenet": ("LeNet-5", lenet, options.choose(Length(50, turns=5, steps=50), Length(5, turns=3, steps=10))),
        "resnet": ("ResNet-18", resnet, options.choose(Length(2, turns=5, steps=4), Length(1, turns=1, steps=1))),
    }
    ratios, left_out = list[Ratio](), list[str]()
    for name, training in trainings.items():
        if options.only in (name, None):
            left_out = compare(*training, *AIMS[name], options, ratios)
    return report(ratios, options.setting, left_out)


def compare(
    model: str,
    job: Job,
    length: Length,
    loop_aim: float,
    script_aim: float,
    package_aim: float,
    options: Options,
    ratios: list[Ratio],
) -> list[str]:
    """Add the ratios of one model's trainings, and return the packages that are not installed."""
    what, runs, threads = f"{model}, batch {job.batch_size}", options.folder / job.model, options.num_threads
    steady, cold = f"{what}: steady", f"{what}: cold, {length.warm_up + length.turns * length.steps} steps"
    scripts = {f"a plain script, {n} workers": replace(job, workers=n) for n in (0, 2)}
    works: dict[str, Work] = {OURS: partial(ours.train, job, {}, runs / "a"), BARE: partial(rivals.bare, job)}
    works |= {name: partial(rivals.plain_script, script) for name, script in scripts.items()}
    if options.overrides and job.model == RESNET.model:
        works[TUNED] = partial(ours.train, job, options.overrides, runs / "tuned")
    speeds = race(works, length, threads, what, options.busy)
    best = max(scripts, key=lambda name: speeds[name].steady)
    ratios += speed_ratios(f"{what}: the loop", BARE, speeds, loop_aim, kept=True)
    ratios += [*speed_ratios(steady, best, speeds, script_aim), cold_ratio(cold, best, speeds)]
    if TUNED in works:
        ratios += speed_ratios(f"{what}: tuned", best, speeds, 1.5, ours=TUNED)

    job = scripts[best]
    trainers = (partial(rivals.lightning, job), partial(rivals.hf_trainer, job, runs / "hf"), partial(rivals.timm_loop, job))
    packages, left_out = installed(dict(zip(MODULES, trainers, strict=True)), MODULES)
    if packages:
        speeds = race({OURS: partial(ours.train, job, {}, runs / "b"), **packages}, length, threads, what)
    for name in packages:
        ratios += [*speed_ratios(steady, name, speeds, package_aim), cold_ratio(cold, name, speeds, package_aim)]
    return left_out
