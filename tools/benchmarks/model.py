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
from tools.benchmarks import ours
from tools.benchmarks.report import LAYOUTS, N_CORES, Options, Report, figure, ratio, report
from tools.benchmarks.sides import Length, Speed, Work, race
from tools.tables import plain

# Largest relative differences of a first update from that of fp32: of the loss, and of the change of the weights. In 16 bits a
# gradient is off by a third where those of the samples nearly cancel; a lost, doubled or random one is off by 1 or more.
TOLERANCE = {"fp32": (1e-4, 0.05), "tf32": (1e-3, 0.1), "bf16": (0.02, 0.5), "fp16": (0.02, 0.5)}
CLEARLY = 1.03  # times as fast, or another setting isn't worth it


@dataclass(frozen=True)
class Setting:
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    num_threads: int = 1

    @property
    def keys(self) -> dict[str, Any]:
        """The config keys that make this setting."""
        return {f"train.{name}": value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        threads = f"{self.num_threads} thread{'s' if self.num_threads > 1 else ''}"
        return ", ".join([self.precision, layout, *(["compiled"] if self.compile else []), threads])


@dataclass(frozen=True)
class Tried:
    """A setting that --tune tried, with the relative differences of its first update from that of the reference."""

    setting: Setting
    images_per_sec: float
    of_loss: float
    of_change: float
    agrees: bool


def measure(options: Options) -> Report:
    path, keys, reference = options.config, options.overrides, Setting(num_threads=options.num_threads)
    config = ours.load_config(path, keys)
    if config.task != "classification":
        raise ConfigError(f"task {config.task}: this benchmark measures models for classification only")
    if refused := sorted(keys.keys() & reference.keys.keys()):
        raise ConfigError(f"--{refused[0]}: the benchmark sets it; see --precisions, --layouts, --compile and --num_threads")
    precisions = options.precisions or (get_args(Precision) if torch.cuda.is_available() else ("fp32", "bf16"))
    length = options.choose(Length(2, turns=3, seconds=1.0), Length(1, turns=1, steps=2))
    if options.tune:
        compiling = not options.quick if options.compile is None else options.compile
        return tune(config.model.name, partial(race_settings, "training", path, keys, length), reference, precisions, compiling)
    layouts, compiled = [LAYOUTS[layout] for layout in options.layouts], (False, True) if options.compile else (False,)
    settings = [
        replace(reference, precision=precision, channels_last=last, compile=c)
        for precision, last, c in product(precisions, layouts, compiled)
    ]
    rows = []
    for kind, size in product(("inference", "training"), options.batch_sizes or sorted({1, config.train.batch_size})):
        if (kind, size) == ("training", 1):  # BatchNorm needs more than one image
            continue
        speeds = race_settings(kind, path, {**keys, "train.batch_size": size}, length, settings)
        for setting, speed in speeds.items():
            row = {"kind": kind, "batch_size": size, "setting": asdict(setting), "images_per_sec": speed.steady}
            row |= {"ms": 1000 * size / speed.steady, "peak_mib": speed.turns[-1].peak_mib}
            rows.append(row | {"times": speed.steady / speeds[settings[0]].steady})
    head = f"{config.model.name}, {options.num_threads} threads"
    return Report({"model": config.model.name, "threads": options.num_threads, "rows": rows}, f"{head}\n{table(rows)}")


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("", "batch", "setting", "images/s", "ms", "peak MiB", "times")
    formats: tuple[Callable[[Any], str], ...]
    formats = (str, str, lambda setting: str(Setting(**setting)), figure, figure, "{:,.0f}".format, "{:.2f}".format)
    body = [[to_text(value) for to_text, value in zip(formats, row.values(), strict=True)] for row in rows]
    return plain([head, *body], right=(1, 3, 4, 5, 6))


def race_settings(
    kind: str, path: str | None, keys: Mapping[str, Any], length: Length, settings: Sequence[Setting]
) -> dict[Setting, Speed]:
    side = {"inference": ours.infer, "training": ours.update}[kind]
    works: dict[str, Work] = {str(setting): partial(side, path, {**keys, **setting.keys}) for setting in settings}
    speeds = race(works, length, settings[0].num_threads, kind)
    return {setting: speeds[str(setting)] for setting in settings}


def tune(
    model: str,
    race: Callable[[Sequence[Setting]], Mapping[Setting, Speed]],
    reference: Setting,
    precisions: Sequence[str],
    compiling: bool,
) -> Report:
    """Find the fastest setting, one kind of change after the other, and measure it once more against the reference."""
    stages: list[Callable[[Setting], list[Setting]]] = [
        lambda best: [replace(best, precision=p, channels_last=last) for p, last in product(precisions, LAYOUTS.values())],
        lambda best: [replace(best, compile=True)] if compiling else [],
        lambda best: [replace(best, num_threads=n) for n in (max(1, N_CORES // 2), N_CORES)],
    ]
    best, exact, tried = reference, None, dict[Setting, Tried]()
    for stage in stages:
        if not (alternatives := stage(best)):
            continue
        speeds = race(list(dict.fromkeys([best, *alternatives])))
        exact = exact or speeds[reference].note
        results = {setting: judge(setting, speed, exact) for setting, speed in speeds.items()}
        tried |= {setting: result for setting, result in results.items() if setting not in tried}
        fastest = max((result for result in results.values() if result.agrees), key=lambda result: result.images_per_sec)
        if fastest.images_per_sec > CLEARLY * speeds[best].steady:
            best = fastest.setting
    speeds = race(list(dict.fromkeys([best, reference])))
    speedup = ratio(f"{model}, tuned: {best}", str(reference), "images/s", speeds[best].steady, speeds[reference].steady)
    rows = [("setting", "images/s", "loss differs by", "update differs by", "")]
    for t in tried.values():
        verdict = "" if t.agrees else "does not agree"
        rows.append((str(t.setting), figure(t.images_per_sec), f"{t.of_loss:.1e}", f"{t.of_change:.1e}", verdict))
    summary = (
        f"{speedup.ratio:.2f} times as fast as {reference}: {figure(speedup.ours)} images/s instead of {figure(speedup.theirs)}"
    )
    lines = yaml12.dump({"train": asdict(best)}).rstrip()  # of a config
    text = "\n\n".join([plain(rows, right=(1, 2, 3)), summary, lines])
    return report({"keys": best.keys, "tried": [asdict(t) for t in tried.values()]}, [speedup], text=text)


def judge(setting: Setting, speed: Speed, exact: Mapping[str, Any]) -> Tried:
    """Compare the first update of a setting with that of the reference."""
    of_loss = abs(speed.note["loss"] - exact["loss"]) / abs(exact["loss"])
    of_change = math.dist(speed.note["change"], exact["change"]) / math.hypot(*exact["change"])
    most_loss, most_change = TOLERANCE[setting.precision]
    return Tried(setting, speed.steady, of_loss, of_change, of_loss <= most_loss and of_change <= most_change)
