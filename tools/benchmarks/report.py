"""Options of the benchmark commands and the report that each of them returns. Importing it needs no torch."""

import json
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tools.tables import plain, write_text

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LAYOUTS = {"channels first": False, "channels last": True}  # train.channels_last
NUMBERS = (2, 3, 5)  # right-aligned columns of `ratio_rows`


class Options(Namespace):
    """A parsed command line. A command may have more options."""

    quick: bool
    num_threads: int
    overrides: dict[str, Any]  # config keys
    folder: Path  # temporary, removed after the command

    def choose(self, full: T, quick: T) -> T:
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
    ratio: float
    at_least: float | None = None
    at_most: float | None = None


def ratio(what: str, rival: str, unit: str, ours: float, theirs: float, **aim: float | None) -> Ratio:
    return Ratio(what, rival, unit, ours, theirs, ours / theirs, **aim)


def ratio_rows(ratios: Sequence[Ratio]) -> list[Sequence[str]]:
    """Return the rows of a table, head first."""
    rows: list[Sequence[str]] = [("what", "beside", "this project", "the other", "unit", "ratio", "aim", "")]
    for r in ratios:
        aim = verdict = ""
        if r.at_least is not None:
            aim, verdict = f"at least {r.at_least:g}", "reached" if r.ratio >= r.at_least else "missed"
        elif r.at_most is not None:
            aim, verdict = f"at most {r.at_most:g}", "reached" if r.ratio <= r.at_most else "missed"
        rows.append((r.what, r.rival, figure(r.ours), figure(r.theirs), r.unit, f"{r.ratio:.3g}", aim, verdict))
    return rows


def figure(value: float) -> str:
    """Format three digits, or all before the decimal point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Report:
    """The result of a command, for programs and for people."""

    json: dict[str, Any]
    text: str

    def show(self, *, as_json: bool, folder: Path | None) -> None:
        """Print the report, or write both forms into `folder`."""
        dumped = json.dumps(self.json, indent=2)
        if folder is not None:
            write_text(folder / "benchmark.md", self.text + "\n")
            write_text(folder / "benchmark.json", dumped + "\n")
        else:
            print(dumped if as_json else self.text)


def report(ratios: Iterable[Ratio], left_out: Sequence[str] = (), text: str | None = None, **setting: Any) -> Report:
    """Report the ratios and the setting that they were measured in; `text` replaces the table."""
    ratios, setting = list(ratios), {"cores": N_CORES, **setting}
    if text is None:
        values = {name: figure(value) if isinstance(value, float) else value for name, value in setting.items()}
        head = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
        text = "\n".join([head, *(f"left out: {name}" for name in left_out), plain(ratio_rows(ratios), NUMBERS)])
    return Report({**setting, "left_out": list(left_out), "ratios": [asdict(r) for r in ratios]}, text)
