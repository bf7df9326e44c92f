"""Run the whole fault campaign and print its table."""

import os
import sys
import tempfile
from datetime import date
from pathlib import Path

from tests.faults.campaign import run_all, table

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the fork server and all trainings
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        rows = []
        for row in run_all(Path(folder)):
            rows.append(row)
            print(f"{row.fault}: {row.tried} tried, {len(row.wrong)} wrong", *row.wrong, sep="\n  ", file=sys.stderr, flush=True)
    print(f"{len(os.sched_getaffinity(0))} cores (CPU), {date.today()}:\n")
    print(table(rows))
    sys.exit(any(row.wrong for row in rows))
