"""Run the resume exam: `python -m tests.exam`. It prints the table and writes docs/measured/exam.json and exam.md.

Each framework runs in a separate process, two at a time, so that none changes another's libraries.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from tests.exam.candidates import CANDIDATES
from tests.running import ROOT, stop_ignoring_signals

FAULTS = ("repeat", "kill", "term", "save", "flip", "code", "ranks")


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.exam", description="the resume exam of several frameworks")
    parser.add_argument("--frameworks", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--data", nargs="+", choices=("digits", "pictures"), default=["digits", "pictures"], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="frameworks that are examined at the same time")
    parser.add_argument("--output", type=Path, help="folder whose exam.json and exam.md are updated, such as docs/measured")
    parser.add_argument("--keep", type=Path, help="folder for the runs and their logs, which are removed otherwise")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # examine one framework in this process, in this folder
    chosen = parser.parse_args(argv)
    if chosen.keep and chosen.keep.exists() and any(chosen.keep.iterdir()):
        parser.error(f"--keep: {chosen.keep} is not empty")
    if chosen.output and not chosen.output.is_dir():
        parser.error(f"--output: {chosen.output} is no folder")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    chosen = options(argv)
    if chosen.one:
        return examine_one(chosen)
    missing = [name for name in chosen.frameworks if CANDIDATES[name].version() is None]
    if missing:
        print(f"not installed, see requirements-rivals.txt: {', '.join(missing)}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="exam-", ignore_cleanup_errors=True) as temporary:
        folder = (chosen.keep or Path(temporary)).resolve()
        results, failed = examine_all([name for name in chosen.frameworks if name not in missing], chosen, folder)
    print(report(results))
    return int(failed or not results)


def report(results: list[dict]) -> str:
    from tests.exam.table import table

    return f"{len(os.sched_getaffinity(0))} cores (CPU), {date.today()}:\n\n{table(results)}\n"


def write(result: dict, folder: Path) -> None:
    """Put a result into exam.json, in place of an older one of this framework and data, and draw the table."""
    path = folder / "exam.json"
    old = json.loads(path.read_text()) if path.exists() else []
    results = {(one["candidate"], one["data"]): one for one in [*old, result]}
    ordered = [results[name, data] for name in CANDIDATES for data in ("digits", "pictures") if (name, data) in results]
    path.write_text(f"{json.dumps(ordered, indent=1)}\n")
    (folder / "exam.md").write_text(report(ordered))


def examine_all(names: Sequence[str], chosen: argparse.Namespace, folder: Path) -> tuple[list[dict], bool]:
    """Examine each framework on each of the data; return the results, and whether an examination failed."""
    waiting = [(name, data) for name in names for data in chosen.data if data in CANDIDATES[name].data]
    order, running, done, failed = list(waiting), {}, {}, False
    try:
        while waiting or running:
            while waiting and len(running) < chosen.jobs:
                key = waiting.pop(0)
                running[key] = _start(*key, chosen.faults, folder)
            time.sleep(0.2)
            for key, process in list(running.items()):
                if process.poll() is not None:
                    del running[key]
                    path = folder / "-".join(key) / "result.json"
                    if process.returncode == 0:
                        done[key] = json.loads(path.read_text())
                        if chosen.output:
                            write(done[key], chosen.output)
                    failed |= process.returncode != 0
                    ending = f"failed ({process.returncode})" if process.returncode else "done"
                    print(f"{' on '.join(key)}: {ending}", file=sys.stderr, flush=True)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return [done[key] for key in order if key in done], failed


def _start(name: str, data: str, faults: Sequence[str], folder: Path) -> subprocess.Popen:
    from tests.exam.work import die_with_parent

    own = folder / f"{name}-{data}"
    own.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.exam", "--one", own, "--frameworks", name, "--data", data, "--faults", *faults]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EXAM_PRELOAD": CANDIDATES[name].module}
    environment |= {"YOLO_CONFIG_DIR": str(own), "YOLO_OFFLINE": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, preexec_fn=die_with_parent)


def examine_one(chosen: argparse.Namespace) -> int:
    from tests.exam.exam import examine
    from tests.exam.work import write_data

    (name,), (data,) = chosen.frameworks, chosen.data
    write_data(chosen.one / "data")
    result = examine(name, CANDIDATES[name], chosen.one, data, chosen.faults)
    (chosen.one / "result.json").write_text(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    stop_ignoring_signals()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
