"""Train variants, each in a process of its own: side by side where there is more than one device."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from engine.config import yaml12
from engine.config.errors import ConfigError, RunError
from tools.comparison.runs import is_run, read_run
from tools.comparison.variants import Variant
from tools.tables import duration

MAIN = Path(__file__).resolve().parents[2] / "main.py"
PAUSE = 0.2  # seconds between two looks at the processes
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
END_OF_LOG = 4096  # bytes, in which its last line is looked for

Environment = Mapping[str, str]


def environments(jobs: int) -> list[Environment]:
    """What tells each of the processes that run at a time which device, or which part of the cores, is its own."""
    if jobs == 1:
        return [{}]
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        key = "CUDA_VISIBLE_DEVICES"
    elif torch.accelerator.is_available():
        devices, key = [torch.accelerator.current_accelerator().type], ""
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return [{"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}] * jobs
    if jobs > len(devices):
        raise ConfigError(f"--jobs {jobs}: each variant is trained on a device of its own, and there {_are(len(devices))}")
    return [{key: device} for device in devices[:jobs]]


def _are(n: int) -> str:
    return "is 1" if n == 1 else f"are {n}"


@dataclass
class Child:
    """A training under way."""

    variant: Variant
    process: subprocess.Popen
    slot: int
    began: float

    @classmethod
    def start(cls, variant: Variant, slot: int, environment: Environment, plugins: Sequence[str]) -> "Child":
        options = [f"--{key}={as_option(value)}" for key, value in variant.overrides.items()]
        options += [f"--plugin={file}" for file in plugins]
        command = [sys.executable, str(MAIN), "-c", str(variant.config), "-e", str(variant.folder), "-r", "auto", *options]
        with _opened(variant.log) as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C comes from us, once, and not from the terminal too
            )
        return cls(variant, process, slot, time.monotonic())

    def progress(self) -> str:
        """How far it is, in its own words: of an evaluation where there was one."""
        lines = [line for line in last_lines(self.variant.log) if line.startswith("epoch ")]
        parts = lines[-1].split(" | ") if lines else ["begins"]
        if any(part.startswith("valid ") for part in parts):
            parts = [part for part in parts if not part.startswith("train ")]
        return f"{self.variant.name}  {' | '.join(parts)}"

    def why_not_complete(self) -> str | None:
        code, folder = self.process.returncode, self.variant.folder
        run = read_run(folder, self.variant.name) if is_run(folder) else None
        if code == 0 and run is not None and run.is_completed:
            return None
        if any(code in (128 + signum, -signum) for signum in INTERRUPTIONS):
            return run.said_status if run is not None else "interrupted before its first step"
        said = last_lines(self.variant.log)[-1:] or ["it said nothing"]
        return f"failed with exit code {code}: {said[0].removeprefix('error: ')} ({self.variant.log})"


def _opened(log: Path) -> IO[bytes]:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("ab")
    except OSError as error:
        raise RunError(f"{log} can't be written: {error.strerror}") from error


def as_option(value: object) -> str:
    """As the YAML that an option is read as; in a list everything stands on one line."""
    return yaml12.dump([value]).strip()[1:-1].replace("\n", " ")


def last_lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - END_OF_LOG))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


@dataclass(frozen=True)
class Outcome:
    signum: int  # by which it was ended; 0 for none
    incomplete: Mapping[str, str]  # the variants that are not complete, each with the reason


def train_all(variants: Sequence[Variant], slots: Sequence[Environment], plugins: Sequence[str]) -> Outcome:
    """As many at a time as there are slots. One that fails doesn't stop the others. A signal is passed on to those under way,
    which save; no other is begun."""
    waiting = deque(variants)
    children: list[Child] = []
    incomplete: dict[str, str] = {}
    ended_by = 0
    with noted_signals() as noted, Progress(len(slots)) as progress, _ended(children):
        while children or (waiting and not ended_by):
            while waiting and len(children) < len(slots) and not noted and not ended_by:
                slot = next(i for i in range(len(slots)) if i not in [child.slot for child in children])
                children.append(Child.start(waiting.popleft(), slot, slots[slot], plugins))
            while noted:
                ended_by = noted.popleft()
                for child in children:
                    child.process.send_signal(ended_by)  # a second one ends it at once
            progress.show(children)
            time.sleep(PAUSE)
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                why = child.why_not_complete()
                if why is not None:
                    incomplete[child.variant.name] = why
                progress.say(f"{child.variant.name}: {why or f'done in {duration(time.monotonic() - child.began)}'}")
    return Outcome(ended_by, incomplete | {variant.name: "not begun" for variant in waiting})


@contextmanager
def _ended(children: Sequence[Child]) -> Iterator[None]:
    """Whatever happens to us, no child is left behind."""
    try:
        yield
    finally:
        for child in children:
            child.process.terminate()
        for child in children:
            child.process.wait()


@contextmanager
def noted_signals() -> Iterator[deque[int]]:
    """SIGINT and SIGTERM only leave a note inside."""
    noted: deque[int] = deque()
    before = {signum: signal.signal(signum, lambda signum, frame: noted.append(signum)) for signum in INTERRUPTIONS}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Progress:
    """A line for each training under way, where there is a terminal that can show it, and one for each that has ended."""

    def __init__(self, n_slots: int) -> None:
        n_lines = n_slots if sys.stderr.isatty() else 0
        self.lines = [tqdm(position=i, bar_format="{desc}", leave=False) for i in range(n_lines)]

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        for line in self.lines:
            line.close()

    def show(self, children: Sequence[Child]) -> None:
        of_slot = {child.slot: child for child in children}
        width = shutil.get_terminal_size().columns - 1
        for slot, line in enumerate(self.lines):
            said = of_slot[slot].progress()[:width] if slot in of_slot else ""
            if said != line.desc:
                line.set_description_str(said)

    def say(self, line: str) -> None:
        tqdm.write(line)
