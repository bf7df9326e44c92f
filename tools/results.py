#!/usr/bin/env python
"""Train the rows of docs/results.yaml, one seed at a time, and keep what each reached in docs/measured/results/."""

import datetime
import hashlib
import json
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, from any folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.config import yaml12
from engine.config.command_line import parse_overrides, run_tool
from engine.config.errors import ConfigError, RunError
from engine.config.schema import Config, flatten, to_dict
from engine.plugins import Parser
from tools.comparison.runs import RunRecord, read_run
from tools.comparison.training import Variant, is_done, train_all
from tools.tables import duration, markdown, print_lines, write_text, writing

EXAMPLES = """
A row is a config, further options, and seeds. A seed that has been measured with this config, on this machine and with this
version of torch, is not trained again; one that was interrupted is resumed. A row whose data is missing is named, and the others
are trained.

examples:
  python tools/results.py --list
  python tools/results.py lenet_digits
  python tools/results.py lenet_mnist --data MNIST=~/data/MNIST
  python tools/results.py resnet18_short --seed 1 --data "CIFAR10=~/data/CIFAR-10:pixels from JPEGs"
"""
SHORT = ("model", "data", "recipe", "result", "seeds", "time")
WIDE = ("model", "data", "result", "seeds", "time", "aim", "epochs", "ECE", "machine", "command")
ROOT = Path(__file__).resolve().parent.parent
ROWS, MEASURED = ROOT / "docs" / "results.yaml", ROOT / "docs" / "measured" / "results"


@dataclass(frozen=True)
class Row:
    name: str
    config: str
    seeds: list[int]
    args: str = ""
    table: str = "classification"
    aim: float | None = None
    split: str = "valid"  # of the monitored metric in the log; valid_ema for averaged weights


@dataclass(frozen=True)
class Measured:
    """The content of a file in docs/measured/results/: one training."""

    row: str
    seed: int
    model: str
    data: str
    data_note: str
    command: str
    config_digest: str
    fingerprint: dict[str, Any]
    machine: str
    torch: str
    commit: str
    date: str
    metric: str
    value: float  # of the last evaluation; of the test split, if the config has a separate validation split
    n_epochs: float
    wall_time: float
    params: int
    last: dict[str, float]
    history: list[list[float]] = field(repr=False)  # epoch, seconds, metric

    @property
    def where(self) -> str:
        return f"{self.machine}, torch {self.torch}"

    @property
    def file(self) -> Path:
        machine = hashlib.sha256(self.where.encode()).hexdigest()[:6]
        return MEASURED / f"{self.row}-seed-{self.seed}-{machine}.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="results.py", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names in docs/results.yaml (default: all)")
    parser.add_argument("--seed", type=int, action="append", help="only this seed; may be repeated")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=FOLDER[:NOTE]", help="where the data is, read as it is"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), metavar="FOLDER", help="default: runs/results")
    parser.add_argument("--list", action="store_true", help="list the rows and what has been measured, and exit")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the metric of all rows over time, and exit")
    args = parser.parse_args(argv)
    rows = read_rows()
    if unknown := set(args.rows) - {row.name for row in rows}:
        raise ConfigError(f"no row {', '.join(sorted(unknown))} in {ROWS.name}; there are {', '.join(row.name for row in rows)}")
    rows = [row for row in rows if not args.rows or row.name in args.rows]
    if args.list:
        for row in rows:
            seeds = {run.seed for run in read_measured() if run.row == row.name}
            missing = [str(seed) for seed in row.seeds if seed not in seeds]
            status = f"{len(seeds)} of {len(row.seeds)} seeds measured" + (f", missing {', '.join(missing)}" if missing else "")
            print_lines(f"{row.name}: {status}")
        return 0
    if args.picture:
        draw([row for row in rows if row.table != "ablation"], args.picture)
        return 0
    jobs = [(row, seed) for row in rows for seed in row.seeds if not args.seed or seed in args.seed]
    if not jobs:
        raise ConfigError(
            f"--seed {args.seed[0]}: the rows have the seeds {sorted({seed for row in rows for seed in row.seeds})}"
        )
    return _train_all(jobs, data_folders(args.data), args.runs)


def read_rows() -> list[Row]:
    return [Row(name, **values) for name, values in yaml12.parse(ROWS.read_text()).items()]


def data_folders(words: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the folder and the note of each dataset in NAME=FOLDER:NOTE."""
    from datasets import list_datasets  # imports torch, which --list needn't

    folders = {}
    for word in words:
        name, _, rest = word.partition("=")
        folder, _, note = rest.partition(":")
        if not folder or name not in list_datasets():
            raise ConfigError(f"--data {word}: expected NAME=FOLDER or NAME=FOLDER:NOTE, with NAME one of {list_datasets()}")
        folders[name] = (str(Path(folder).expanduser().absolute()), note)
    return folders


# Training


def _train_all(jobs: Sequence[tuple[Row, int]], folders: Mapping[str, tuple[str, str]], runs: Path) -> int:
    """Train one seed after the other. A failure doesn't stop the others, a signal does."""
    failures = []
    for row, seed in jobs:
        signum, failure = train(row, seed, folders, runs)
        if signum:
            print_lines(f"interrupted: {failure}; the same command continues", file=sys.stderr)
            return 128 + signum
        failures += [failure] if failure else []
    if failures:
        raise RunError("not measured: " + "; ".join(failures))
    return 0


def train(row: Row, seed: int, folders: Mapping[str, tuple[str, str]], runs: Path) -> tuple[int, str | None]:
    """Train one seed of a row, unless it has been measured here, and keep the result. Return the signal that ended it, and why
    there is no result."""
    from engine import load_config  # imports torch

    path = ROOT / "configs" / f"{row.config}.yaml"
    overrides = {**parse_overrides(shlex.split(row.args)), "seed": seed}
    config = load_config(path, overrides)
    data, digest = config.data.name, digest_of(flatten(to_dict(config)))
    folder, note = folders.get(data, ("", ""))
    command = f"python main.py -c configs/{row.config}.yaml {row.args}".rstrip() + f" --seed {seed}"
    same = [run for run in read_measured() if (run.row, run.seed, run.config_digest) == (row.name, seed, digest)]
    if any(run.where == _here() for run in same):
        print_lines(f"{row.name}, seed {seed}: measured before")
        return 0, None
    if folder:
        overrides |= {"data.dataroot": folder, "data.verify": False, "data.download": False}
    variant = Variant(f"{row.name}-seed-{seed}", path, overrides, runs / f"{row.name}-seed-{seed}")
    signum, incomplete = train_all([] if is_done(variant) else [variant], [{}], [])
    if signum or incomplete:
        return signum, f"{row.name}, seed {seed}: {incomplete.get(variant.name)}"
    result = measured_in(read_run(variant.folder, variant.name), row, data, note, command)
    write_text(result.file, json.dumps(vars(result)) + "\n")
    print_lines(f"{row.name}, seed {seed}: {100 * result.value:.2f} % {result.metric} after {duration(result.wall_time)}")
    return 0, None


def _here() -> str:
    import torch

    return f"{_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')}, torch {_public(torch.__version__)}"


def _machine(device: str) -> str:
    """Return the name of a GPU, or of the processor and how many of its cores may be used."""
    if not device.startswith("cpu"):
        return device
    from datasets.pipeline.cores import usable_cores

    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return f"{usable_cores()} cores of {named[1] if named else platform.machine()}"


def _public(version: str) -> str:
    return version.partition("+")[0]


def measured_in(run: RunRecord, row: Row, data: str, note: str, command: str) -> Measured:
    """Return what a completed run reached. The metric is that of the test split if another split chose the checkpoint."""
    tag = f"{row.split}/{run.monitor}"
    history = [[line["epoch"], line["elapsed"], line[tag]] for line in run.history if line.get(tag) is not None]
    reached = run.results["test"] or run.results["last"]
    value = run.test if run.test is not None else history[-1][2] if history else None
    if value is None:
        raise RunError(f"{run.path} has no {tag}")
    return Measured(
        row=row.name,
        seed=run.config["seed"],
        model=run.config["model.name"],
        data=data,
        data_note=note,
        command=command,
        config_digest=digest_of(run.config),
        fingerprint=run.environment["data"],
        machine=_machine(run.environment["device"]),
        torch=_public(run.environment["packages"]["torch"]),
        commit=run.environment["git_commit"] or "",
        date=datetime.date.today().isoformat(),
        metric=run.monitor,
        value=value,
        n_epochs=round(run.history[-1]["epoch"], 3),
        wall_time=run.results["wall_time"],
        params=run.results["params"],
        last={key.partition("/")[2]: round(number, 6) for key, number in reached.items() if "/" in key and number is not None},
        history=[[round(epoch, 3), round(seconds, 1), round(number, 5)] for epoch, seconds, number in history],
    )


def digest_of(config: Mapping[str, Any]) -> str:
    """Return a digest of what a config says beyond the defaults, so that a new key changes it only where it is used."""
    values = {**config, "train.precision": config["train.precision"] or "fp32"}  # as a run on a CPU enters it
    defaults = {**flatten(to_dict(Config())), "train.precision": "fp32"}
    elsewhere = ("data.dataroot", "data.verify", "data.download", "seed")
    own = {
        key: value for key, value in values.items() if key not in elsewhere and (key not in defaults or value != defaults[key])
    }
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


# Tables


@cache
def _parsed(path: Path, _modified: int) -> Measured:
    try:
        return Measured(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def read_measured() -> list[Measured]:
    return [_parsed(path, path.stat().st_mtime_ns) for path in sorted(MEASURED.glob("*.json"))]


def groups(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Measured]]]:
    """Yield each row with its seeds, once for each machine, version of torch, config and data that it was measured with."""
    measured = read_measured()
    for row in rows:
        runs = [run for run in measured if run.row == row.name]
        for key in dict.fromkeys(map(_comparable, runs)):
            yield row, [run for run in runs if _comparable(run) == key]


def _comparable(run: Measured) -> tuple[str, ...]:
    """Return what the seeds of a row must have in common. Which images are held out may depend on the seed, but not how many."""
    counts = [f"{split} {content['images']}" for split, content in run.fingerprint.items()]
    return run.where, run.config_digest, run.data_note, *counts


def value_of(runs: Sequence[Measured]) -> str:
    values = [100 * run.value for run in runs]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} %"


def _cells(row: Row, runs: Sequence[Measured]) -> dict[str, str]:
    """Return all that a table may show of a row."""
    first, mean = runs[0], statistics.mean(run.value for run in runs)
    return {
        "model": first.model,
        "data": f"{first.data}, {first.data_note}" if first.data_note else first.data,
        "recipe": row.config,
        "result": f"{value_of(runs)} {first.metric}",
        "seeds": str(len(runs)),
        "time": duration(statistics.mean(run.wall_time for run in runs)),
        "aim": "" if row.aim is None else f"{100 * row.aim:g} %, {'reached' if mean >= row.aim else 'missed'}",
        "epochs": f"{first.n_epochs:g}",
        "ECE": f"{statistics.mean(run.last['ece'] for run in runs):.3f}" if "ece" in first.last else "",
        "machine": f"{first.where}, {first.date}",
        "command": first.command.rpartition(" --seed")[0],
    }


def _shown(lines: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    right = [i for i, name in enumerate(columns) if name in ("seeds", "time", "epochs", "ECE", "difference")]
    table = markdown([columns, *([line[name] for name in columns] for line in lines)], right)
    return f"{table if lines else 'Not measured yet.'}\n"


def table(kind: str, *, short: bool = False) -> str:
    """Return the Markdown table of the rows of one kind; `short` for the README."""
    lines = [_cells(row, runs) for row, runs in groups([row for row in read_rows() if row.table == kind])]
    return _shown(lines, SHORT if short else WIDE)


def ablation() -> str:
    """Return the Markdown table of the ablation: the first row is the recipe, the others add options to it."""
    rows = [row for row in read_rows() if row.table == "ablation"]
    lines, recipe = list[dict[str, str]](), dict[Any, float]()
    for row, runs in groups(rows):
        mean, (where, _, *data) = statistics.mean(run.value for run in runs), _comparable(runs[0])
        if row is rows[0]:
            recipe[(where, *data)] = mean
        base = recipe.get((where, *data))
        change = {"change": row.args.removeprefix(rows[0].args).strip() or "none"}
        change["difference"] = "" if base is None or row is rows[0] else f"{100 * (mean - base):+.2f}"
        lines.append({**_cells(row, runs), **change})
    return _shown(lines, ("change", "result", "difference", "seeds", "time", "machine", "command"))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the metric of each row's first seed over time."""
    from engine.plots.style import line_style, new_figure, save_figure, style

    with style(), writing(path):
        figure = new_figure()
        figure.set_size_inches(9, 5)
        axes = figure.subplots()
        for i, (row, runs) in enumerate(groups(rows)):
            first = runs[0]
            times, values = zip(*[(seconds / 60, 100 * value) for _, seconds, value in first.history], strict=True)
            axes.plot(times, values, label=f"{row.name} ({first.data})", marker=".", **line_style(i))
        axes.set(xscale="log", xlabel="minutes", ylabel="metric on the validation split in %")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        figure.legend(loc="outside right upper")
        save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(run_tool(main))
