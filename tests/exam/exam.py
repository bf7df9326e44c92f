"""Examine one framework: interrupt its trainings, damage its checkpoints, resume by its documentation, and compare."""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.exam.candidates import Candidate
from tests.exam.work import KINDS, N_EPOCHS, WEIGHTS, die_with_parent
from tests.faults.campaign import Payload, sign
from tests.running import ROOT

FORKSERVER = multiprocessing.get_context("forkserver")
if "EXAM_PRELOAD" in os.environ:  # not where a test imports this: the server belongs to the whole process
    FORKSERVER.set_forkserver_preload(["tests.exam.preloaded"])
TIMEOUT = 180  # seconds for one training


@dataclass
class Resumed:
    """A training that was interrupted and resumed."""

    fault: str
    error: str | None = None  # of the resumed training; None: it came to its end
    difference: float | None = None  # of the final weights from those of the run left alone, relative to their norm
    twice: int = 0  # samples too many, over all epochs
    never: int = 0  # samples that an epoch left out
    redone: int = 0  # updates that the resumed run had to do again


@dataclass
class Result:
    """What the exam found about a framework on one of the data."""

    candidate: str
    data: str
    version: str
    repeated: float = 0.0  # difference of two runs left alone
    resumed: list[Resumed] = field(default_factory=list)
    flips: list[str] = field(default_factory=list)  # "error", "fallback" or "trained on"
    code_ran: bool | None = None
    counted: dict[str, int] | str | None = None  # by an evaluation on two ranks; or its error


def run(candidate: Candidate, folder: Path, data: str, *, resume: bool = False, fault: dict | None = None) -> str | None:
    """Train in a forked process; return None, or the exit code and the last line of a training that failed."""
    log = folder.with_suffix(".log")
    words = [str(folder), data, "--save", candidate.save, *(["--resume"] if resume else [])]
    process = FORKSERVER.Process(target=_run, args=(candidate.adapter, words, fault, log))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        return f"no end after {TIMEOUT} s"
    if process.exitcode == 0:
        return None
    last = next(reversed(log.read_text().splitlines()), "").replace(f"{folder.parent}/", "")
    return f"exit code {process.exitcode}: {last}"


def _run(adapter: str, words: list[str], fault: dict | None, log: Path) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for workers, as usual on Linux
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if number == 1 else os.O_APPEND)), number)
    os.environ["EXAM_FAULT"] = json.dumps(fault)
    os.chdir(log.parent)
    sys.argv = [adapter, *words]
    try:
        runpy.run_module(f"tests.exam.adapters.{adapter}", run_name="__main__")
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


def examine(name: str, candidate: Candidate, folder: Path, data: str, faults: Collection[str]) -> Result:
    """Ask every question whose name is in `faults`."""
    result = Result(name, data, candidate.version() or "")
    reference = folder / "reference"
    if error := run(candidate, reference, data):
        raise RuntimeError(f"{name} on {data} fails when it is left alone: {error}")
    if "repeat" in faults:
        run(candidate, folder / "repeat", data)
        result.repeated = difference(folder / "repeat", reference)
    for title, fault in interruptions(data, faults):
        interrupted = folder / title.replace(" ", "-")
        run(candidate, interrupted, data, fault=fault)
        result.resumed.append(resume(candidate, interrupted, reference, data, title))
    if data == candidate.data[0] and {"flip", "code"} & set(faults):
        killed = Killed(candidate, folder / "killed", data)
        result.flips = [flipped(killed, part) for part in (0.3, 0.5, 0.7)] if "flip" in faults else []
        result.code_ran = runs_code(killed) if "code" in faults else None
    if data == candidate.data[0] and "ranks" in faults and candidate.two_ranks:
        result.counted = on_two_ranks(candidate, folder / "ranks", data)
    return result


def interruptions(data: str, faults: Collection[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return four SIGKILLs within and after an epoch, a SIGTERM, and a kill inside the next save."""
    n = KINDS[data].epoch_steps
    kills = [round(0.55 * n), n + 1, round(1.6 * n), round(2.7 * n)]
    found = [(f"SIGKILL at update {step}", {"step": step, "what": "SIGKILL"}) for step in kills] if "kill" in faults else []
    found += [(f"SIGTERM at update {round(1.4 * n)}", {"step": round(1.4 * n), "what": "SIGTERM"})] if "term" in faults else []
    return found + ([("killed in a save", {"step": round(1.5 * n), "what": "in a save"})] if "save" in faults else [])


def resume(candidate: Candidate, folder: Path, reference: Path, data: str, title: str) -> Resumed:
    (folder / WEIGHTS).unlink(missing_ok=True)
    before = updates(folder)
    error = run(candidate, folder, data, resume=True)
    if error or not (folder / WEIGHTS).exists():
        return Resumed(title, error=error or "it ended without weights")
    twice, never = miscounted(folder, data)
    first = first_update(folder)
    redone = 0 if first is None else max(0, before - first)
    return Resumed(title, None, difference(folder, reference), twice, never, redone)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def updates(folder: Path) -> int:
    """Return the number of updates that the interrupted run began."""
    return len(lines(folder / "trained-0.jsonl"))


def first_update(folder: Path) -> int | None:
    """Return the update at which the resumed run continued; None if nothing was left to do."""
    return next((line["step"] for line in lines(folder / "trained-1.jsonl")), None)


def miscounted(folder: Path, data: str) -> tuple[int, int]:
    """Return how many samples an epoch had too often, and too rarely, in the updates that the final weights come from."""
    kept: list[dict[str, Any]] = []
    for path in sorted(folder.glob("trained-*.jsonl")):
        if new := lines(path):
            kept = [line for line in kept if line["step"] < new[0]["step"]] + new
    epochs = [Counter(i for line in kept if line["epoch"] == epoch for i in line["ids"]) for epoch in range(N_EPOCHS)]
    n = KINDS[data].n_train
    return sum(epoch.total() - len(epoch) for epoch in epochs), sum(n - len(epoch) for epoch in epochs)


def difference(folder: Path, reference: Path) -> float:
    """Return 0 for weights that are the same bit for bit, otherwise the norm of their difference relative to theirs."""
    ours, theirs = (torch.load(path / WEIGHTS, weights_only=True) for path in (folder, reference))
    if ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours):
        return 0.0
    flat, other = (torch.cat([w[name].double().flatten() for name in sorted(w)]) for w in (ours, theirs))
    return float((flat - other).norm() / other.norm())


class Killed:
    """A run that was killed in its second epoch, and can be put back as it was then."""

    def __init__(self, candidate: Candidate, folder: Path, data: str) -> None:
        self.candidate, self.folder, self.data, self.saved = candidate, folder, data, folder.with_name("saved")
        run(candidate, folder, data, fault={"step": round(1.6 * KINDS[data].epoch_steps), "what": "SIGKILL"})
        shutil.copytree(folder, self.saved, symlinks=True)
        self.resume()
        self.first_update = first_update(folder)

    def resume(self) -> str | None:
        return run(self.candidate, self.folder, self.data, resume=True)

    def put_back(self) -> list[Path]:
        """Return the files of the checkpoint that a resume reads."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.saved, self.folder, symlinks=True)
        newest = max(self.folder.glob(self.candidate.checkpoint), key=lambda path: path.stat().st_mtime).resolve()
        return [newest] if newest.is_file() else sorted(path for path in newest.rglob("*") if path.is_file())


def flipped(killed: Killed, part: float) -> str:
    """Flip a bit of the checkpoint's largest file; return what the resumed training makes of it."""
    largest = max(killed.put_back(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[int(part * len(content))] ^= 64
    largest.write_bytes(content)
    if killed.resume():
        return "error"
    return "trained on" if first_update(killed.folder) == killed.first_update else "fallback"


def runs_code(killed: Killed) -> bool:
    """Put code into every pickle of a checkpoint, as a stranger could; return whether resuming runs it."""
    files, mark = killed.put_back(), killed.folder.with_name("executed")
    for path in filter(zipfile.is_zipfile, files):  # what torch.save writes
        content = torch.load(path, map_location="cpu", weights_only=False)
        torch.save({**content, "note": Payload(mark)} if isinstance(content, dict) else Payload(mark), path)
    if killed.candidate.package is None:
        sign(files[0].parent)
    killed.resume()
    return mark.exists()


def on_two_ranks(candidate: Candidate, folder: Path, data: str) -> dict[str, int] | str:
    """Evaluate under torchrun; return how many samples were counted, too often and never."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += [f"tests.exam.adapters.{candidate.adapter}", str(folder), data, "--evaluate", "--save", candidate.save]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        ended = subprocess.run(
            command, cwd=folder.parent, env=environment, timeout=TIMEOUT, capture_output=True, text=True, check=False,
            preexec_fn=die_with_parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT} s"
    folder.with_suffix(".log").write_text(ended.stdout + ended.stderr)
    if ended.returncode:
        return f"exit code {ended.returncode}"
    counted = Counter(i for path in folder.glob("evaluated-*.jsonl") for line in lines(path) for i in line["ids"])
    return {"counted": counted.total(), "twice": counted.total() - len(counted), "never": KINDS[data].n_test - len(counted)}
