"""Record the curves anew and show the difference; `make trajectories` calls it.

A curve that leaves its band needs a reason: a text that is in CHANGELOG.md. Then its band is derived anew, too.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch

from tests.trajectories import measure, record
from tests.trajectories.curves import fingerprint, train_curve
from tests.trajectories.machines import FOR_BAND, Machine
from tests.trajectories.recipes import RECIPES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trajectories", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record", help="train the recipes, show the difference and write tests/trajectories/recorded/")
    one.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"default: all of {', '.join(RECIPES)}")
    one.add_argument("--why", default="", help="text in CHANGELOG.md that explains curves outside their band")
    one.add_argument("--band", action="store_true", help="derive the bands anew, in ten minutes")
    one.add_argument(
        "--python", nargs=2, action="append", default=[], metavar=("VERSION", "PATH"), help="another torch, for the bands"
    )
    two = commands.add_parser("curves", help="train recipes on this machine and write their curves")
    two.add_argument("file", type=Path)
    two.add_argument("recipes", nargs="*", metavar="RECIPE")
    two.add_argument("--threads", type=int, default=1)
    two.add_argument("--noise", type=int)
    commands.add_parser("measure", help="plant bugs and vary the machine: print the tables of docs/reliability.md")
    args = parser.parse_args()
    if args.command == "measure":
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the log of each training
            text = measure.tables()
        print(text)
        return int("not found" in text or "ALARM" in text)
    if args.command == "curves":
        return curves(args.file, args.recipes or list(RECIPES), args.threads, args.noise)
    return renew(args.recipes or list(RECIPES), args.why, args.python, all_bands=args.band)


def curves(file: Path, recipes: list[str], threads: int, noise: int | None) -> int:
    torch.set_num_threads(threads)
    found = {}
    for name in recipes:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = train_curve(name, Path(folder), threads=threads, noise=noise)
    file.write_text(json.dumps(found))
    return 0


def renew(recipes: list[str], why: str, pythons: list[list[str]], *, all_bands: bool) -> int:
    """Train the recipes, print a table of differences, and write the curves if each one is inside its band or explained."""
    torch.set_num_threads(1)
    found, old = Machine("this one").curves(recipes), {name: record.read(name) for name in recipes}
    print("| recipe | loss | gradient norm | evaluations | share of the band |\n| --- | ---: | ---: | ---: | ---: |")
    changed = []
    for name, curve in found.items():
        row, is_changed = record.compare(name, curve, old[name])
        changed += [name] if is_changed else []
        print(row, flush=True)
    if changed and not record.is_in_changelog(why):
        print(
            f"\nnothing was written. {', '.join(changed)}: describe the change in CHANGELOG.md and repeat its text:",
            file=sys.stderr,
        )
        print('  make trajectories WHY="..."', file=sys.stderr)
        return 1
    others = [Machine(f"torch {version}", python=python) for version, python in pythons]
    renewed = {name: found[name] for name in (recipes if all_bands else changed)}
    bands, largest = record.derive_bands(renewed, [*FOR_BAND, *others]) if renewed else ({}, {})
    for name, curve in found.items():
        content = dict(old[name] or {})
        if name in renewed:
            content |= {"deviations": largest[name], "band": bands[name]}
        if name in changed:
            content["why"] = why
        record.write(name, content | {"curve": curve})
    if set(recipes) == set(RECIPES):
        record.write("machine", fingerprint())
    return 0


if __name__ == "__main__":
    sys.exit(main())
