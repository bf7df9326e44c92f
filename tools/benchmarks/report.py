"""Options of the benchmark commands and the report that each of them returns. Importing it needs no torch."""

import json
import os
import platform
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.tables import markdown, write_text

Rows = Sequence[Mapping[str, Any]]  # each value by the head of its column

ROOT = Path(__file__).resolve().parents[2]
N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
RESNET_BATCH = (64, 16)  # full and quick
LAYOUTS = {"channels first": False, "channels last": True}  # train.channels_last


class Options(Namespace):
    """A parsed command line. A command may have more options."""

    quick: bool
    num_threads: int  # of torch
    busy: int = 0  # processes
    overrides: dict[str, Any]  # config keys
    folder: Path  # temporary, removed after the command

    @property
    def setting(self) -> str:
        return f"threads: {self.num_threads}" + (f", quiet and beside busy processes: {self.busy}" if self.busy else "")

    def choose(self, full: Any, quick: Any) -> Any:
        """Return how much to measure: `quick` with --quick, else `full`."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Ratio:
    """A figure of this project, the same figure of a rival measured in the same run, and the aim for their ratio."""

    what: str
    rival: str
    unit: str
    ours: float
    theirs: float
    ratio: float  # ours / theirs, but for CPU time theirs / ours: how many times as fast
    at_least: float | None = None
    at_most: float | None = None
    images_per_sec: Sequence[float] = ()  # by the clock: ours, theirs, and the ratio

    @property
    def row(self) -> dict[str, str]:
        """Return the row of a table."""
        row = {"what": self.what, "beside": self.rival, "this project": figure(self.ours), "the other": figure(self.theirs)}
        row |= {"unit": self.unit, "ratio": f"{self.ratio:.3g}", "aim": "", "": ""}
        for word, aim, reached in (("least", self.at_least, float.__ge__), ("most", self.at_most, float.__le__)):
            if aim is not None:
                row |= {"aim": f"at {word} {aim:g}", "": "reached" if reached(self.ratio, float(aim)) else "missed"}
        return row | {
            "images/s by the clock": "{} / {} = {}".format(*map(figure, self.images_per_sec)) if self.images_per_sec else ""
        }


def ratio(what: str, rival: str, unit: str, ours: float, theirs: float, **aim: Any) -> Ratio:
    return Ratio(what, rival, unit, ours, theirs, ours / theirs, **aim)


def figure(value: float) -> str:
    """Format three digits, or all before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Report:
    """The result of a command, for programs and for people."""

    json: dict[str, Any]
    text: str

    def show(self, what: str, *, as_json: bool, folder: Path | None) -> None:
        """Print the report, or write both forms into `folder`."""
        dumped = json.dumps(self.json, indent=2)
        if folder is not None:
            write_text(folder / f"{what}.md", self.text + "\n")
            write_text(folder / f"{what}.json", dumped + "\n")
        else:
            print(dumped if as_json else self.text)


def report(
    ratios: Sequence[Ratio], setting: str = "", left_out: Sequence[str] = (), rows: Rows = (), end: str = "", **results: Any
) -> Report:
    """Report the ratios, or other rows, as a table; `results` are only in the JSON."""
    import torch  # here, as --help needs this module

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = (f"{name} {version(name)}" for name in ("torch", "torchvision", "accelerate"))
    machine = ", ".join([f"{N_CORES} cores ({platform.machine()})", device, *packages, time.strftime("%Y-%m-%d")])
    table = rows or [ratio.row for ratio in ratios]
    cells = [[figure(value) if isinstance(value, float) else str(value) for value in row.values()] for row in table]
    lines = [[name.replace("_", " ") for name in table[0]], *cells]
    missing = "\n".join(f"Left out: {name}." for name in left_out)
    parts = (f"{machine}{setting and ', '}{setting}:", missing, markdown(lines, () if rows else (2, 3, 5)), end)
    text = "\n\n".join(filter(None, parts))
    found = {"machine": machine, "setting": setting, "left_out": [*left_out], "ratios": [asdict(ratio) for ratio in ratios]}
    return Report({**found, "rows": rows, **results}, text)
