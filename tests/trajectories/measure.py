"""Measure what the bands find: bugs that are planted, and no alarm on other machines."""

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tests.trajectories import record
from tests.trajectories.bugs import BUGS
from tests.trajectories.curves import excess, first_outside, train_curve
from tests.trajectories.machines import CLEAN, FOR_BAND, on_all
from tests.trajectories.recipes import RECIPES


def tables() -> str:
    recorded: dict[str, Any] = {name: record.read(name) for name in RECIPES}
    versions = sorted({machine for one in recorded.values() for machine in one["deviations"] if machine.startswith("torch ")})
    with ThreadPoolExecutor(1) as pool:  # the other machines are processes
        on_others = pool.submit(clean_rows, recorded)
        found, alarms = bug_rows(recorded), on_others.result()
    n_found, n_alarms = sum("not found" not in row for row in found), sum("ALARM" in row for row in alarms)
    text = [
        f"torch {torch.__version__}, {date.today()}: {n_found} of {len(found)} planted bugs found, {n_alarms} alarms on "
        f"{len(alarms)} other machines.",
        "",
        "| planted bug | recipe | first outside of the band | largest deviation, in bands |",
        "| --- | --- | --- | ---: |",
        *found,
        "",
        "| machine, without a bug | largest deviation, in bands |",
        "| --- | --- |",
        *alarms,
        "",
        f"The bands are derived from {len(FOR_BAND)} machines ({', '.join(machine.name for machine in FOR_BAND)}) and "
        f"{', '.join(versions) or 'no other version of torch'}:",
        "",
        "| recipe | band of loss, gradient norm: first update | last update | largest deviation with another torch |",
        "| --- | --- | --- | --- |",
        *(band_row(name, recorded[name], versions) for name in RECIPES),
    ]
    return "\n".join(text)


def bug_rows(recorded: dict[str, Any]) -> list[str]:
    rows = []
    for bug, (plant, name) in BUGS.items():
        with tempfile.TemporaryDirectory() as folder, plant():
            curve = train_curve(name, Path(folder))
        where = first_outside(curve, recorded[name]["curve"], recorded[name]["band"])
        times = f"{excess(curve, recorded[name]['curve'], recorded[name]['band']):.2g}"
        rows.append(f"| {bug} | {name} | {where or 'not found'} | {times} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def clean_rows(recorded: dict[str, Any]) -> list[str]:
    rows = []
    for machine, curves in zip(CLEAN, on_all(CLEAN, list(RECIPES)), strict=True):
        share, name = max((excess(curve, recorded[n]["curve"], recorded[n]["band"]), n) for n, curve in curves.items())
        rows.append(f"| {machine.name} | {'ALARM: ' if share > 1 else ''}{share:.2f} ({name}) |")
    return rows


def band_row(name: str, recorded: dict[str, Any], versions: list[str]) -> str:
    loss, norm = (recorded["band"][series] for series in ("loss", "grad_norm"))
    others = ", ".join(f"{recorded['deviations'][version]:.0e} ({version.removeprefix('torch ')})" for version in versions)
    return f"| {name} | {loss[0]:.0e}, {norm[0]:.0e} | {loss[-1]:.0e}, {norm[-1]:.0e} | {others} |"
