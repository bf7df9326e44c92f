"""The recorded curves and their bands: a file for each recipe, and one about the machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.running import ROOT
from tests.trajectories.curves import Curve, deviations, excess, widest
from tests.trajectories.machines import Machine, on_all

FOLDER = Path(__file__).parent / "recorded"
CHANGELOG = ROOT / "CHANGELOG.md"


def read(name: str) -> dict[str, Any] | None:
    """Return curve, band and reason of a recipe, or what it was recorded on; None if there is no such file."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(name: str, content: dict[str, Any]) -> None:
    """Write a line for each value of the content or of a dictionary in it, so that differences can be read."""
    FOLDER.mkdir(exist_ok=True)
    lines = []
    for key, value in content.items():
        inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) if isinstance(value, dict) else ""
        lines.append(f" {json.dumps(key)}: " + (f"{{\n{inner}\n }}" if inner else json.dumps(value)))
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def is_in_changelog(why: str) -> bool:
    """Tell whether the changelog has the text, whatever its line breaks."""
    return bool(why.strip()) and " ".join(why.split()) in " ".join(CHANGELOG.read_text().split())


def compare(name: str, curve: Curve, recorded: dict[str, Any] | None) -> tuple[str, bool]:
    """Return a row of the table of differences, and whether the curve has to be explained: it is new or outside the band."""
    if recorded is None:
        return f"| {name} | not recorded yet | | | |", True
    if {s: len(v) for s, v in curve.items()} != {s: len(v) for s, v in recorded["curve"].items()}:
        return f"| {name} | has other series | | | |", True
    apart, share = deviations(curve, recorded["curve"]), excess(curve, recorded["curve"], recorded["band"])
    evaluations = max(max(apart.get(series, [0.0])) for series in ("valid/loss", "valid_ema/loss"))
    cells = [f"{value:.1e}" if value else "0" for value in (max(apart["loss"]), max(apart["grad_norm"]), evaluations)]
    verdict = "outside" if share > 1 else f"{share:.0%}"
    return f"| {name} | {' | '.join(cells)} | {verdict} |", share > 1


def derive_bands(curves: dict[str, Curve], machines: Sequence[Machine]) -> tuple[dict[str, Curve], dict[str, dict[str, float]]]:
    """Return a band for each curve, and the largest deviation on each of the machines from which the bands are derived."""
    apart: dict[str, list[Curve]] = {name: [] for name in curves}
    largest: dict[str, dict[str, float]] = {name: {} for name in curves}
    for machine, found in zip(machines, on_all(machines, list(curves)), strict=True):
        for name, curve in found.items():
            apart[name].append(deviations(curve, curves[name]))
            largest[name][machine.name] = float(f"{max(map(max, apart[name][-1].values())):.1e}")
    return {name: widest(of_machines) for name, of_machines in apart.items()}, largest
