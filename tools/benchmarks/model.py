"""A model's speed in inference and in training, by batch size, precision, layout and torch.compile; --tune finds the fastest."""

import json
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, get_args

from engine import load_config
from engine.config import yaml12
from engine.config.errors import ConfigError
from engine.config.schema import Precision
from tools.benchmarks import ours
from tools.benchmarks.measure import Ratio, add_threads, figure, n_cores, ratio
from tools.benchmarks.sides import Length, Speed, race
from tools.tables import plain

EXAMPLES = """
Images are random, of the size of the config's data set and held in memory: decoding files isn't measured. Memory is the most
that the process, or the GPU, held. Training is the engine's own update, data and optimizer included.

--tune tries precisions and layouts, then torch.compile (not with --quick), then numbers of threads. It keeps what is clearly
faster and agrees with fp32: the loss of the first update, and what that did to the weights. Its last lines go into the config.

examples:
  python tools/benchmark.py model -c configs/resnet18_cifar10.yaml
  python tools/benchmark.py model -c configs/resnet18_cifar10.yaml --batch_sizes 1 256 --compile
  python tools/benchmark.py model --model.name timm/convnext_tiny --data.img_size 64 --quick
  python tools/benchmark.py model -c configs/resnet18_cifar10.yaml --tune --train.batch_size 64
"""
LAYOUTS = {"channels first": False, "channels last": True}
# How far a first update may be from that of fp32: relative differences of the loss, and of the change of the weights. In 16 bits
# a gradient is off by a third where those of the samples nearly cancel; one that is lost, doubled or random is off by 1 or more.
TOLERANCE = {"fp32": (1e-4, 0.05), "tf32": (1e-3, 0.1), "bf16": (0.02, 0.5), "fp16": (0.02, 0.5)}
CLEARLY = 1.03  # times as fast, or it isn't worth another setting
FULL, QUICK = Length(warm_up=2, turns=3, seconds=1.0), Length(warm_up=1, turns=1, steps=2)


@dataclass(frozen=True)
class Setting:
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    num_threads: int = 1

    def keys(self) -> dict[str, Any]:
        """Of a config."""
        return {f"train.{name}": value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        threads = f"{self.num_threads} thread{'s' if self.num_threads > 1 else ''}"
        return ", ".join([self.precision, layout, *(["compiled"] if self.compile else []), threads])


@dataclass(frozen=True)
class Row:
    kind: str  # inference or training
    batch_size: int
    setting: Setting
    images_per_sec: float
    ms: float  # of a batch
    peak_mib: float
    times: float  # as fast as the first setting


def add_command(commands: Any) -> ArgumentParser:
    command = commands.add_parser("model", description=__doc__, epilog=EXAMPLES, help="a model's speed, and its fastest setting")
    command.add_argument("-c", "--config", help="a YAML of configs/; without it, LeNet on digits")
    command.add_argument("--batch_sizes", type=int, nargs="+", metavar="N", help="default: 1, and train.batch_size")
    command.add_argument("--precisions", nargs="+", choices=get_args(Precision), help="default: all that run here")
    command.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="default: both")
    command.add_argument("--compile", action=BooleanOptionalAction, help="with torch.compile too (default: with --tune alone)")
    add_threads(command)
    command.add_argument("--tune", action="store_true", help="find the setting in which training is fastest")
    return command


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    config = load_config(args.config, overrides)
    if config.task != "classification":
        raise ConfigError(f"task {config.task}: what is measured here are models for classification")
    if refused := sorted(overrides.keys() & Setting().keys()):
        raise ConfigError(
            f"--{refused[0]}: the benchmark sets it itself; see --precisions, --layouts, --compile and --num_threads"
        )
    precisions = args.precisions or precisions_here()
    length = QUICK if args.quick else FULL
    reference = Setting(num_threads=args.num_threads)
    if args.tune:
        compiling = not args.quick if args.compile is None else args.compile
        tuned = tune(args.config, overrides, reference, precisions, length, compiling=compiling)
        print(json.dumps(tuned.as_json(), indent=2) if args.json else tuned.text())
        return 0
    settings = [
        replace(reference, precision=precision, channels_last=LAYOUTS[layout], compile=compiled)
        for precision, layout, compiled in product(precisions, args.layouts, (False, True) if args.compile else (False,))
    ]
    rows = [
        row
        for kind, size in product(("inference", "training"), args.batch_sizes or sorted({1, config.train.batch_size}))
        if (kind, size) != ("training", 1)  # no batch to normalize by
        for row in measure_settings(kind, size, args.config, overrides, settings, length)
    ]
    if args.json:
        print(
            json.dumps({"model": config.model.name, "threads": args.num_threads, "rows": [asdict(row) for row in rows]}, indent=2)
        )
    else:
        print(f"{config.model.name}, {args.num_threads} threads")
        print(table(rows))
    return 0


def precisions_here() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return list(get_args(Precision))
    return ["fp32", "bf16"]


def measure_settings(
    kind: str, size: int, config: str | None, overrides: Mapping[str, Any], settings: Sequence[Setting], length: Length
) -> list[Row]:
    speeds = race_settings(kind, {**overrides, "train.batch_size": size}, config, settings, length)
    first = speeds[settings[0]].steady
    return [
        Row(kind, size, setting, speed.steady, 1000 * size / speed.steady, speed.peak_mib, speed.steady / first)
        for setting, speed in speeds.items()
    ]


def race_settings(
    kind: str, overrides: Mapping[str, Any], config: str | None, settings: Sequence[Setting], length: Length
) -> dict[Setting, Speed]:
    work = {"inference": ours.infer, "training": ours.update}[kind]
    works = {str(setting): partial(work, config, {**overrides, **setting.keys()}) for setting in settings}
    speeds = race(works, length, settings[0].num_threads, kind)
    return {setting: speeds[str(setting)] for setting in settings}


@dataclass(frozen=True)
class Tried:
    setting: Setting
    images_per_sec: float
    of_loss: float  # relative difference from the reference
    of_change: float
    agrees: bool


@dataclass(frozen=True)
class Tuned:
    setting: Setting
    speedup: Ratio
    tried: list[Tried]

    def as_json(self) -> dict[str, Any]:
        return {
            "keys": self.setting.keys(),
            "tried": [asdict(one) for one in self.tried],
            "ratios": [asdict(self.speedup)],
            "left_out": [],
        }

    def text(self) -> str:
        rows = [("setting", "images/s", "loss differs by", "update differs by", "")]
        for one in self.tried:
            said = "" if one.agrees else "does not agree"
            rows.append((str(one.setting), figure(one.images_per_sec), f"{one.of_loss:.1e}", f"{one.of_change:.1e}", said))
        said = f"{self.speedup.ratio:.2f} times as fast as {self.speedup.rival}: "
        said += f"{figure(self.speedup.ours)} images/s instead of {figure(self.speedup.theirs)}"
        return "\n".join([plain(rows, right=(1, 2, 3)), "", said, "", yaml12.dump({"train": asdict(self.setting)}).rstrip()])


def tune(
    config: str | None,
    overrides: Mapping[str, Any],
    reference: Setting,
    precisions: Sequence[str],
    length: Length,
    *,
    compiling: bool = True,
) -> Tuned:
    best, exact, tried = reference, None, []
    for alternatives in (partial(_numbers, precisions), *((_compiled,) if compiling else ()), _threads):
        settings = [best, *(setting for setting in alternatives(best) if setting != best)]
        speeds = race_settings("training", overrides, config, settings, length)
        exact = exact or speeds[reference].note
        of_this_stage = [_tried(setting, speed, exact) for setting, speed in speeds.items()]
        tried += [one for one in of_this_stage if one.setting not in {known.setting for known in tried}]
        fastest = max((one for one in of_this_stage if one.agrees), key=lambda one: one.images_per_sec)
        if fastest.images_per_sec > CLEARLY * speeds[best].steady:
            best = fastest.setting
    settings = list(dict.fromkeys([best, reference]))
    speeds = race_settings("training", overrides, config, settings, length)
    what = f"{load_config(config, overrides).model.name}, tuned: {best}"
    return Tuned(best, ratio(what, str(reference), "images/s", speeds[best].steady, speeds[reference].steady), tried)


def _numbers(precisions: Sequence[str], best: Setting) -> list[Setting]:
    return [replace(best, precision=p, channels_last=last) for p, last in product(precisions, LAYOUTS.values())]


def _compiled(best: Setting) -> list[Setting]:
    return [replace(best, compile=True)]


def _threads(best: Setting) -> list[Setting]:
    return [replace(best, num_threads=n) for n in sorted({max(1, n_cores() // 2), n_cores()})]


def _tried(setting: Setting, speed: Speed, exact: Mapping[str, Any]) -> Tried:
    of_loss = abs(speed.note["loss"] - exact["loss"]) / abs(exact["loss"])
    of_change = _distance(speed.note["change"], exact["change"]) / _distance(exact["change"], [0.0] * len(exact["change"]))
    most_loss, most_change = TOLERANCE[setting.precision]
    return Tried(setting, speed.steady, of_loss, of_change, of_loss <= most_loss and of_change <= most_change)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def table(rows: Sequence[Row]) -> str:
    head = ("", "batch", "setting", "images/s", "ms", "peak MiB", "times")
    body = [
        (
            r.kind,
            str(r.batch_size),
            str(r.setting),
            figure(r.images_per_sec),
            figure(r.ms),
            f"{r.peak_mib:,.0f}",
            f"{r.times:.2f}",
        )
        for r in rows
    ]
    return plain([head, *body], right=(1, 3, 4, 5, 6))
