"""Measure a model in inference and training, by batch size, precision, layout and torch.compile; find its fastest setting."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, get_args

import torch

from engine.config import yaml12
from engine.config.errors import ConfigError
from engine.config.schema import Precision
from engine.devices.accelerator import has_bf16_instructions
from tools.benchmarks import ours
from tools.benchmarks.report import LAYOUTS, N_CORES, Options, Report, figure, ratio, report
from tools.benchmarks.sides import Length, Speed, Work, race

# Largest relative differences of a first update from that of fp32: of the loss, and of the change of the weights. In 16 bits a
# gradient is off by a third where those of the samples nearly cancel; a lost, doubled or random one is off by 1 or more.
TOLERANCE = {"fp32": (1e-4, 0.05), "tf32": (1e-3, 0.1), "bf16": (0.02, 0.5), "fp16": (0.02, 0.5)}
CLEARLY = 1.03  # times as fast, or another setting isn't worth it


@dataclass(frozen=True)
class Setting:
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    compile_mode: str = "default"
    num_threads: int = 1
    keep_memory: bool = False

    @property
    def keys(self) -> dict[str, Any]:
        """The config keys that make this setting."""
        return {f"train.{name}": value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        threads = f"{self.num_threads} thread{'s' if self.num_threads > 1 else ''}"
        compiled = "compiled" if self.compile_mode == "default" else f"compiled ({self.compile_mode})"
        kept = ["memory kept"] if self.keep_memory else []
        return ", ".join([self.precision, layout, *([compiled] if self.compile else []), threads, *kept])


def measure(options: Options) -> Report:
    path, keys, reference = options.config, options.overrides, Setting(num_threads=options.num_threads)
    config = ours.load_config(path, keys)
    if config.task != "classification":
        raise ConfigError("task", f"{config.task}: this benchmark measures models for classification only")
    if refused := sorted(keys.keys() & reference.keys.keys()):
        raise ConfigError(f"--{refused[0]}", "the benchmark sets it", "see --precisions, --layouts, --compile and --num_threads")
    precisions = options.precisions or fast_precisions()
    length = options.choose(Length(2, turns=3, seconds=1.0), Length(1, turns=1, steps=2))
    if options.tune:
        compiling = not options.quick if options.compile is None else options.compile
        return tune(config.model.name, partial(race_settings, "training", path, keys, length), reference, precisions, compiling)
    layouts, compiled = [LAYOUTS[layout] for layout in options.layouts], (False, True) if options.compile else (False,)
    settings = [Setting(*values, num_threads=options.num_threads) for values in product(precisions, layouts, compiled)]
    rows = list[dict[str, Any]]()
    for kind, size in product(("inference", "training"), options.batch_sizes or sorted({1, config.train.batch_size})):
        if (kind, size) == ("training", 1):  # BatchNorm needs more than one image
            continue
        speeds = race_settings(kind, path, {**keys, "train.batch_size": size}, length, settings)
        for setting, speed in speeds.items():
            rate, times = speed.steady, speed.steady / speeds[settings[0]].steady
            row = {"kind": kind, "batch_size": size, "setting": str(setting), "images_per_sec": rate, "ms": 1000 * size / rate}
            rows.append({**row, "peak_mib": speed.quiet[-1].peak_mib, "times": times})
    return report([], f"{config.model.name}, {options.num_threads} threads", rows=rows)


def fast_precisions() -> tuple[Precision, ...]:
    """Return the precisions that this machine has instructions for."""
    if torch.cuda.is_available():
        return get_args(Precision)
    return ("fp32", "bf16") if has_bf16_instructions() else ("fp32",)


def race_settings(kind: str, path: str | None, keys: Mapping[str, Any], length: Length, settings: Sequence[Setting]) -> Any:
    side = {"inference": ours.infer, "training": ours.update}[kind]
    works: dict[str, Work] = {str(setting): partial(side, path, {**keys, **setting.keys}) for setting in settings}
    speeds = race(works, length, settings[0].num_threads, kind)
    return {setting: speeds[str(setting)] for setting in settings}


def tune(model: str, race: Callable[..., Any], reference: Setting, precisions: Sequence[str], compiling: bool) -> Report:
    """Find the fastest setting, one kind of change after the other, and measure it once more against the reference."""
    modes = ["default", *(["reduce-overhead"] if torch.cuda.is_available() else [])]  # the second one records CUDA graphs
    stages: list[Callable[[Setting], list[Setting]]] = [
        lambda best: [replace(best, precision=p, channels_last=last) for p, last in product(precisions, LAYOUTS.values())],
        lambda best: [replace(best, compile=True, compile_mode=mode) for mode in modes] if compiling else [],
        lambda best: [replace(best, num_threads=n) for n in (max(1, N_CORES // 2), N_CORES)],
        lambda best: [] if torch.cuda.is_available() else [replace(best, keep_memory=True)],
    ]
    best, exact, tried = reference, None, dict[Setting, dict[str, Any]]()
    for stage in stages:
        if not (alternatives := stage(best)):
            continue
        speeds = race(list(dict.fromkeys([best, *alternatives])))
        exact = exact or speeds[reference].begin[-1].note
        results = {setting: compare(setting, speed, exact) for setting, speed in speeds.items()}
        tried |= {setting: result for setting, result in results.items() if setting not in tried}
        fastest = max((setting for setting in speeds if results[setting]["agrees"]), key=lambda setting: speeds[setting].steady)
        if speeds[fastest].steady > CLEARLY * speeds[best].steady:
            best = fastest
    speeds = race(list(dict.fromkeys([best, reference])))
    speedup = ratio(f"{model}, tuned: {best}", str(reference), "images/s", speeds[best].steady, speeds[reference].steady)
    rates = f"{figure(speedup.ours)} images/s instead of {figure(speedup.theirs)}"
    end = f"{speedup.ratio:.2f} times as fast as {reference}: {rates}\n\n{yaml12.dump({'train': asdict(best)}).rstrip()}"
    return report([speedup], model, rows=[*tried.values()], end=end, keys=best.keys)


def compare(setting: Setting, speed: Speed, exact: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the first update of a setting with that of the reference, by relative differences."""
    note, (most_loss, most_change) = speed.begin[-1].note, TOLERANCE[setting.precision]
    of_loss = abs(note["loss"] - exact["loss"]) / abs(exact["loss"])
    of_change = math.dist(note["change"], exact["change"]) / math.hypot(*exact["change"])
    agrees = of_loss <= most_loss and of_change <= most_change
    differences = {"loss_differs_by": of_loss, "update_differs_by": of_change, "agrees": agrees}
    return {"setting": str(setting), "images_per_sec": speed.steady, **differences}
