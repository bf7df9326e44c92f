"""Damaged and hostile run folders for compare.py: each is a row that says why, or is compared as far as it can be read."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from engine.config.command_line import run_tool
from engine.config.text import CONTROL
from tests.faults.fuzz import fuzz
from tests.faults.rows import Row
from tools.compare import main
from tools.comparison.curves import curve_of, y_labels
from tools.comparison.rows import differences_as_text, rows_of
from tools.comparison.runs import read_runs

CONFIG = "seed: 1\ndata: {name: digits}\nmodel: {name: lenet, pdrop: 0.1}\ntrain: {n_steps: 60, optim: {lr: 0.1, betas: [0.9]}}\n"
METRICS = {"train/loss": 1.5, "valid/loss": 1.2, "valid/acc@1": 0.5, "valid/count": 360}
RESULTS = {
    "status": "failed",
    "why": "the training diverged",
    "step": 20,
    "n_steps": 60,
    "monitor": "acc@1",
    "params": 60_000,
    "macs": 1e6,
    "best": {"step": 10, **METRICS},
    "last": METRICS,
    "test": {},
    "wall_time": 3.5,
    "images_per_sec": 100.0,
    "peak_memory_mb": 50.0,
}
ENVIRONMENT = {
    "world_size": 1,
    "device": "cpu",
    "precision": "fp32",
    "packages": {"torch": "2.6"},
    "command": ["main.py", "-e", "a"],
}
WHY = {  # damaged content of one file, and a part of the reason that must be given
    "config.yaml": {
        b"": "config.yaml: a config is a mapping",
        b"\0" * 100: "config.yaml",
        b"\xff\xfe": "config.yaml",
        b"[1, 2]": "mapping",
        b"model: {name: 3}\n": "config.yaml: it has no model.name",
        b"data: {name: digits}\nseed: .inf\n": "seed",
        b"{1: 2}": "a key",
    },
    "results.json": {
        b"": "results.json: it is empty",
        b"\0" * 100: "results.json: it is empty",
        b"[1]": "not a mapping",
        b"{": "not JSON",
        b'{"best": 3}': "its best is not valid",
        b'{"step": "x"}': "its step",
        b'{"params": 1e999}': "its params",
        b'{"test": {"test/acc@1": "x"}}': "its test",
        b'{"monitor": []}': "its monitor",
        b'{"why": 3}': "its why",
        b'{"a": ' * 5_000: "not JSON",
    },
    "environment.json": {
        b"": "environment.json: it is empty",
        b"\0": "it is empty",
        b"3": "not a mapping",
        b'{"a": ' * 30: "not JSON",
    },
}


def write_run(folder: Path) -> Path:
    """Write a run folder without checkpoints."""
    folder.mkdir(parents=True)
    lines = [{"step": step, "epoch": step / 10, "elapsed": 0.1 * step, **METRICS} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return folder


def compared(*argv: object) -> SimpleNamespace:
    """Run compare.py in this process, and return its exit code, stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run_tool(lambda: main([str(word) for word in argv]))
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def mutated_runs(folder: Path, n: int = 1_000) -> Row:
    """Compare a run with mutants of it."""
    good, run, outputs = (
        write_run(folder / "good"),
        write_run(folder / "mutant"),
        ("--markdown", folder / "a.md", "--csv", folder / "a.csv"),
    )
    files = {path: path.read_bytes() for path in sorted(run.iterdir())}

    def compare() -> None:
        ended = compared(good, run, *outputs)
        assert ended.code == 0, ended.err
        texts = (ended.out, ended.err, (folder / "a.md").read_text())
        assert not any(CONTROL.search(text.replace("\n", "")) for text in texts), texts
        runs = read_runs([str(good), str(run)])
        rows = rows_of(runs)
        assert [curve_of(each, key, 1.0) for each in runs for key in y_labels(rows)]
        differences_as_text(*runs)

    compare()
    return fuzz("a mutated run folder", files, compare, (), n, must="compared, or a row that says why")


def damaged_runs(folder: Path) -> Row:
    """Compare two runs, one of them with a damaged, missing or special file."""
    row = Row("a damaged run folder", "a row that says why, and exit code 0")
    good = write_run(folder / "good")
    cases: list[tuple[str, Callable[[Path], object], str]] = [
        (f"{content[:20]!r} in {name}", lambda path, content=content: path.write_bytes(content), why)
        for name, contents in WHY.items()
        for content, why in contents.items()
    ]
    names = [name for name, contents in WHY.items() for _ in contents]
    for name in WHY:
        for kind, make in (
            ("a pipe", os.mkfifo),
            ("a folder", os.mkdir),
            ("a device", lambda path: path.symlink_to("/dev/zero")),
        ):
            cases.append((f"{kind} as {name}", lambda path, make=make: (path.unlink(), make(path)), "not a regular file"))
            names.append(name)
    for name in ("config.yaml", "environment.json"):
        cases.append((f"no {name}", lambda path: path.unlink(), name))
        names.append(name)
    for i, ((case, damage, why), name) in enumerate(zip(cases, names, strict=True)):
        run = write_run(folder / f"damaged-{i}")
        damage(run / name)
        row.tried += 1
        ended, alone = compared(good, run), compared(run)
        reason = next((line for line in ended.out.splitlines() if line.startswith(f"{run.name}: ")), "")
        if (
            ended.code != 0
            or f"{run.name} " not in ended.out
            or why not in reason
            or "1 of 2 runs can't be read" not in ended.err
        ):
            row.wrong.append(f"{case}: exit code {ended.code}, {ended.out[-300:]}{ended.err[-300:]}")
        if alone.code != 1 or alone.err.count("\n") != 1 or why not in alone.err:
            row.wrong.append(f"{case} alone: exit code {alone.code}, {alone.err[-300:]}")
        shutil.rmtree(run)
    return row


PARTS: dict[str, Callable[[Path], Row]] = {"mutated runs": mutated_runs, "damaged runs": damaged_runs}
