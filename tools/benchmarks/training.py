"""Compare training by the engine with a bare loop, a plain script, and the trainers of other packages, with the same model."""

from dataclasses import replace
from functools import partial

from tools.benchmarks import ours, rivals
from tools.benchmarks.loops import BARE, N_CIFAR
from tools.benchmarks.random_sets import write_cifar10
from tools.benchmarks.report import RESNET_BATCH, Options, Ratio, Report, report
from tools.benchmarks.rivals import LENET, RESNET, Job
from tools.benchmarks.sides import OURS, Length, Work, installed, race, speed_ratio, speed_ratios

TUNED = "this project, tuned"
MODULES = {"Lightning's Trainer": "lightning", "transformers' Trainer": "transformers", "timm's train loop": "timm"}


def measure(options: Options) -> Report:
    root, ratios, left_out = options.folder / "cifar", list[Ratio](), list[str]()
    write_cifar10(root, options.choose(N_CIFAR, 5_000), 100)
    if options.only != "resnet":
        length = options.choose(Length(50, turns=5, steps=50), Length(5, turns=3, steps=10))
        left_out = compare("LeNet-5", replace(LENET, root=root), length, (0.9, 2.3, 1.0), options, ratios)
    if options.only != "lenet":
        job, length = replace(RESNET, root=root, workers=2), options.choose(Length(2, turns=5, steps=4), Length(1, turns=1))
        job = replace(job, batch_size=options.choose(*RESNET_BATCH))
        left_out = compare("ResNet-18", job, length, (0.97, 0.98, 0.98), options, ratios)
    return report(ratios, options.setting, left_out)


def compare(
    model: str, job: Job, length: Length, aims: tuple[float, float, float], options: Options, ratios: list[Ratio]
) -> list[str]:
    """Add the ratios to a bare loop, a script and the packages; return the packages that are not installed."""
    runs, keys, (loop_aim, script_aim, package_aim) = options.folder / job.model, options.overrides, aims
    scripts = {f"a plain script, {n} workers": partial(rivals.plain_script, replace(job, workers=n)) for n in (0, 2)}
    trainers = (partial(rivals.lightning, job), partial(rivals.hf_trainer, job, runs / "hf"), partial(rivals.timm_loop, job))
    packages, left_out = installed(dict(zip(MODULES, trainers, strict=True)), MODULES)
    works: dict[str, Work] = {
        OURS: partial(ours.train, job, {}, runs / "a"),
        BARE: partial(rivals.bare, job),
        **scripts,
        **packages,
    }
    if keys and job.model == RESNET.model:
        works[TUNED] = partial(ours.train, job, keys, runs / "tuned")
    speeds = race(works, length, options.num_threads, model, options.busy)
    best = max(scripts, key=lambda name: speeds[name].steady)
    what, n_steps = f"{model}, CIFAR-sized, batch {job.batch_size}", length.warm_up + len(speeds[OURS].quiet) * length.steps
    ratios += speed_ratios(f"{what}: the loop", BARE, speeds, loop_aim, kept=True)
    for name, aim, cold_aim in ((best, script_aim, None), *((name, package_aim, package_aim) for name in packages)):
        ratios += speed_ratios(f"{what}: steady", name, speeds, aim)
        ratios.append(speed_ratio(f"{what}: cold, {n_steps} steps", name, speeds[OURS].cold, speeds[name].cold, cold_aim))
    if TUNED in works:
        ratios += speed_ratios(f"{what}: tuned", best, speeds, 1.5, ours=TUNED)
    return left_out
