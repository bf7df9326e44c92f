"""Run the whole fault campaign and print its tables."""

import os
import sys
import tempfile
from datetime import date
from pathlib import Path

from tests.faults import campaign, hangs, hostile_comparisons, hostile_configs, hostile_files, hostile_runs
from tests.faults.rows import table
from tests.running import stop_ignoring_signals

TABLES = {
    "fault": campaign.PARTS,
    "hostile file": {**hostile_files.PARTS, **hostile_configs.PARTS, **hostile_runs.PARTS, **hostile_comparisons.PARTS},
    "hang": hangs.PARTS,
}

if __name__ == "__main__":
    stop_ignoring_signals()
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the fork server and all trainings
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        rows = {kind: [] for kind in TABLES}
        for kind, name, part in ((kind, name, part) for kind, parts in TABLES.items() for name, part in parts.items()):
            (Path(folder) / name).mkdir()
            row = part(Path(folder) / name)
            rows[kind].append(row)
            print(f"{row.fault}: {row.tried} tried, {len(row.wrong)} wrong", *row.wrong, sep="\n  ", file=sys.stderr, flush=True)
    print(f"{len(os.sched_getaffinity(0))} cores (CPU), {date.today()}:\n")
    print("\n\n".join(table(of_kind, kind) for kind, of_kind in rows.items()))
    sys.exit(any(row.wrong for of_kind in rows.values() for row in of_kind))
