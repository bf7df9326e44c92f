"""Faults of processes: signals, hangs, and processes that die or can't start. Each run must end, and leave no process behind."""

import contextlib
import ctypes
import importlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from engine.run.checkpoint import read_checkpoint
from tests.faults.campaign import DIGITS_RUN, FEATURES, FILES_RUN, differences
from tests.faults.children import At, Ended, Fault, left_behind, train
from tests.faults.rows import Row
from tests.on_disk import write_coco, write_image_folder
from tests.running import ROOT, results

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18  # of Linux's sched.h and mount.h
TIMEOUT = ("--train.timeout", 4)


# Workers


@dataclass
class FewFiles:
    """From the first update on, the process may open `n` more files."""

    n: int

    def __call__(self, run_dir: Path) -> None:
        before_training(lambda: _limit(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd"))) + 1 + self.n))


@dataclass
class LittleMemory:
    """From the first update on, the process may allocate `mb` more MB of addresses."""

    mb: int

    def __call__(self, run_dir: Path) -> None:
        before_training(lambda: _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + self.mb * 2**20))


@dataclass
class NoMoreProcesses:
    """os.fork fails after `n` processes, as with RLIMIT_NPROC, which does not hold for root."""

    n: int

    def __call__(self, run_dir: Path) -> None:
        fork, calls = os.fork, itertools.count()

        def limited() -> int:
            if next(calls) >= self.n:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            return fork()

        os.fork = limited


@dataclass
class SmallSharedMemory:
    """/dev/shm holds `kb` KB. Where mounting is not allowed, sharing a tensor fails as it does then."""

    kb: int

    def __call__(self, run_dir: Path) -> None:
        import torch

        libc = ctypes.CDLL(None)
        if not (
            libc.unshare(CLONE_NEWNS)
            or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
            or libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, f"size={self.kb}k".encode())
        ):
            return

        def full(tensor: torch.Tensor) -> None:
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

        torch.Tensor.share_memory_ = full


def before_training(action: Callable[[], None]) -> None:
    """Call `action` when the run is built, so that only the training meets the fault."""
    module = importlib.import_module("engine.train")  # the package hides its name
    fit = module.fit

    def with_action(*args, **options) -> None:
        action()
        fit(*args, **options)

    module.fit = with_action


def _limit(what: int, soft: int) -> None:
    resource.setrlimit(what, (soft, resource.getrlimit(what)[1]))


LIMITS: Sequence[Fault] = (
    *map(FewFiles, (0, 2, 5, 9, 14, 20, 27)),
    *map(NoMoreProcesses, (0, 1, 3)),
    *map(SmallSharedMemory, (8, 64)),
    *map(LittleMemory, (1, 8)),
)


def workers_cannot_start(folder: Path, limits: Iterable[Fault] = LIMITS, kinds: Iterable[str] = ("images", "boxes")) -> Row:
    row = Row("workers can't be started or get no memory", "one line, exit code 1, and no process is left")
    for i, (limit, kind) in enumerate(itertools.product(limits, kinds)):
        argv = (*FILES_RUN, *TIMEOUT, *_data(folder, kind), "--dataloader.num_workers", 6)
        row.tried += 1
        try:
            ended = train(folder / f"{kind}-{i}", *argv, fault=limit, timeout=40)
        except TimeoutError as error:
            row.wrong.append(f"{kind}, {limit}: {error}")
            continue
        errors = [line for line in ended.output.splitlines() if line.startswith("error")]
        if ended.codes != [1] or len(errors) != 1 or "Traceback" in ended.output or ended.left:
            row.wrong.append(f"{kind}, {limit}: {ended}")
    return row


def _data(folder: Path, kind: str) -> Sequence[object]:
    path = folder / f"data-{kind}"
    if not path.exists():
        write_image_folder(path, n_classes=4, n_train=6) if kind == "images" else write_coco(path, n_train=16, n_val=6)
    return ("--data.dataroot", path) if kind == "images" else (*FEATURES["detection"], "--data.dataroot", path)


@dataclass
class InWorker:
    """A worker does something when it reads a batch, in the training or in an evaluation."""

    what: str  # "hang", "SIGKILL" or "pipe": it opens a named pipe that nobody writes to
    part: str  # "train" or "valid"
    rank: int | None = None

    def __call__(self, run_dir: Path) -> None:
        from datasets.pipeline import images

        kind = images.TrainingImages if self.part == "train" else images.EvaluationImages
        read = kind.__call__
        pipe = run_dir.with_name(f"{run_dir.name}.pipe")

        def faulty(this, request, out) -> None:
            if self.rank in (None, int(os.environ.get("RANK", "0"))):
                if self.what == "pipe":
                    with contextlib.suppress(FileExistsError):
                        os.mkfifo(pipe)
                    pipe.read_bytes()
                elif self.what == "hang":
                    time.sleep(1000)
                os.kill(os.getpid(), signal.SIGKILL)
            read(this, request, out)

        kind.__call__ = faulty


WORKER_FAULTS: Sequence[tuple[InWorker, int]] = (
    *((InWorker(what, part), 1) for what in ("hang", "SIGKILL", "pipe") for part in ("train", "valid")),
    *((InWorker(what, "valid", rank=1), 2) for what in ("hang", "SIGKILL")),
)


def workers_fail(folder: Path, faults: Iterable[tuple[InWorker, int]] = WORKER_FAULTS) -> Row:
    row = Row("a worker dies, hangs or reads from a pipe", "one line, exit code 1 within train.timeout, and no process is left")
    data = _data(folder, "images")
    for i, (fault, ranks) in enumerate(faults):
        argv = (*FILES_RUN, *TIMEOUT, *data, "--dataloader.num_workers", 2)
        _try(row, folder / f"worker-{i}", argv, fault, ranks, lambda ended: set(ended.codes) == {1} and "error" in ended.output)
    return row


def _try(
    row: Row, run: Path, argv: Sequence[object], fault: Fault, ranks: int, is_right: Callable[[Ended], bool]
) -> Ended | None:
    """Train with a fault, and note it as wrong if the run hangs, prints a traceback, or leaves a process behind."""
    row.tried += 1
    try:
        ended = train(run, *argv, fault=fault, ranks=ranks, timeout=60)
    except TimeoutError as error:
        row.wrong.append(f"{fault}: {error}")
        return None
    if ended.left or "Traceback" in ended.output or not is_right(ended):
        row.wrong.append(f"{fault}, {ranks} ranks: {ended}")
    return ended


# Ranks

RANK_FAULTS: Sequence[At] = (
    *(
        At(f"engine.train:{function}", what, rank=rank)
        for function in ("evaluate_split", "_test_best", "_finish")
        for what in ("hang", "SIGKILL")
        for rank in (0, 1)
    ),
    *(
        At(function, what, rank=0)
        for function in ("engine.build:read_data", "engine.run.checkpoint:Checkpoints.save", "engine.train:_draw_predictions")
        for what in ("hang", "SIGKILL")
    ),
    *(At("engine.train:write_results", what, rank=0) for what in ("hang", "SIGKILL")),
)


def ranks_fail(folder: Path, faults: Iterable[At] = RANK_FAULTS) -> Row:
    """A rank whose work is done may end with 0 while the faulty one fails."""
    row = Row("one of two ranks hangs or dies", "both end within train.timeout, and the faulty one is not silent")
    for i, fault in enumerate(faults):
        code = -signal.SIGKILL if fault.what == "SIGKILL" else 1

        def is_right(ended: Ended, rank: int = fault.rank or 0, code: int = code) -> bool:
            told = code < 0 or f"error on rank {rank}: no progress" in ended.output
            return ended.codes[rank] == code and ended.codes[1 - rank] in (0, 1) and told

        _try(row, folder / f"rank-{i}", (*DIGITS_RUN, "--data.valid_ratio", 0.2, "--train.timeout", 6), fault, 2, is_right)
    return row


# Signals

CODES = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}
MOMENTS = {  # -> whether the run has started, and can be interrupted
    "engine.build:read_data": (False, True),
    "engine.build:make_optimizer": (False, True),
    "engine.train:write_start": (True, True),
    "engine.update:Update.__call__": (True, True),
    "engine.train:evaluate_split": (True, True),
    "engine.run.checkpoint:Checkpoints.save": (True, True),
    "engine.train:_test_best": (True, True),
    "engine.train:write_results": (True, False),
    "engine.train:_draw_predictions": (True, False),
}
SEVERAL = ("SIGTERM SIGINT", "SIGINT SIGINT", "SIGTERM SIGINT SIGINT")
ODD_MOMENTS = (
    *((moment, name, 1) for moment in MOMENTS for name in CODES),
    *((moment, names, 1) for moment in list(MOMENTS)[::4] for names in SEVERAL),
    *((moment, "SIGTERM", 2) for moment in MOMENTS),
)


def signals_at_odd_moments(folder: Path, cases: Iterable[tuple[str, str, int]] = ODD_MOMENTS) -> Row:
    must = "the documented exit code; a started run is saved and resumes bit for bit alike, another leaves no folder"
    row = Row("a signal at an odd moment", must)
    argv, references = (*DIGITS_RUN, "--data.valid_ratio", 0.2), {}
    for i, (moment, signals, ranks) in enumerate(cases):
        has_started, can_stop = MOMENTS[moment]
        first, second_ctrl_c = signals.split()[0], signals.count("SIGINT") == 2
        code = CODES[first]
        if has_started:
            code = 0 if not can_stop else max(CODES[name] for name in signals.split())
            code = 130 if second_ctrl_c else code
        run = folder / f"signal-{i}"
        ended = _try(row, run, argv, At(moment, signals), ranks, lambda ended, code=code: ended.codes[0] == code)
        if ended is None:
            continue
        if has_started and set(ended.codes) != {code}:
            row.wrong.append(f"{moment}, {signals}: {ended}")
        elif not has_started:  # only rank 0 may have come to this call
            row.wrong += [f"{moment}, {signals}: the run folder is left"] if run.exists() else []
        elif not second_ctrl_c:
            if ranks not in references:
                references[ranks] = folder / f"reference-{ranks}"
                assert train(references[ranks], *argv, ranks=ranks).codes == [0] * ranks
            row.wrong += [f"{moment}, {signals}: {problem}" for problem in _after_signal(run, references[ranks], ranks, code)]
    return row


def _after_signal(run: Path, reference: Path, ranks: int, code: int) -> Iterable[str]:
    status = "interrupted" if code else "completed"
    if results(run)["status"] != status:
        yield f"results.json says {results(run)['status']}"
    if read_checkpoint((run / "ckpt" / "latest").resolve()).step != results(run)["step"]:
        yield "the last step is not saved"
    if code:
        resumed = train(run, "-r", "latest", ranks=ranks)
        if resumed.codes != [0] * ranks:
            yield f"the resumed run ended with {resumed}"
            return
    yield from differences(run, reference)


# The launcher and the terminal

ENDLESS = ("--train.n_steps", 100_000, "--train.print_freq", 20, "--train.eval_freq", 100_000, "--train.save_freq", 100_000)
ENDLESS += ("--train.num_threads", 1, "--train.timeout", 60, "--train.batch_size", 64)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu")
LAUNCHED = (
    *((TORCHRUN, 2, name) for name in ("SIGKILL", "SIGTERM", "SIGHUP")),
    *((ACCELERATE, 1, name) for name in ("SIGKILL", "SIGTERM")),
)


def launcher_is_killed(folder: Path, cases: Iterable[tuple[Sequence[str], int, str]] = LAUNCHED) -> Row:
    row = Row("the launcher is killed", "every rank ends after a checkpoint")
    for i, (launcher, ranks, name) in enumerate(cases):
        run, what = folder / f"launched-{i}", f"{name} to {launcher[1]}"
        row.tried += 1
        process = start_in_background([sys.executable, *launcher, "main.py", "-e", run, *ENDLESS], run)
        if not wait_until(lambda run=run: "step 40/" in _log(run)):
            row.wrong.append(f"{what}: no training: {_log(run)}")
            continue
        if f"on {ranks} x cpu" not in _log(run) and ranks > 1:
            row.wrong.append(f"{what}: not on {ranks} ranks")
        process.send_signal(getattr(signal, name))
        process.wait(timeout=60)
        row.wrong += [f"{what}: {problem}" for problem in _not_saved(run)]
    return row


def terminal_is_closed(folder: Path) -> Row:
    """Close the terminal of a training, with and without nohup, and end the shell that started one."""
    row = Row("the terminal is closed", "a checkpoint and exit code 129; under nohup, or if only the shell ends, it trains on")
    for i, (has_nohup, what) in enumerate([(False, "SIGHUP"), (True, "SIGHUP"), (True, "the shell ends")]):
        run = folder / f"terminal-{i}"
        row.tried += 1
        argv = ["nohup"] * has_nohup + [sys.executable, "main.py", "-e", run, *ENDLESS]
        command = " ".join(f"'{word}'" for word in argv)
        shell = start_in_background(["sh", "-c", f"{command} & echo $! > '{run}.pid'; wait $!; echo code $?"], run)
        if not wait_until(lambda run=run: "step 40/" in _log(run)):
            row.wrong.append(f"{what}: no training: {_log(run)}")
            continue
        training = psutil.Process(int(Path(f"{run}.pid").read_text()))
        if what == "SIGHUP":
            training.send_signal(signal.SIGHUP)
        else:
            shell.kill()
            shell.wait()
        if not has_nohup:
            shell.wait(timeout=60)
            row.wrong += [] if "code 129" in _log(run) else [f"{what}: {_log(run)[-500:]}"]
        else:
            goes_on = wait_until(partial(_has_lines, run, _log(run).count("step ") + 3))
            row.wrong += [] if goes_on else [f"{what}: it has ended"]
            training.send_signal(signal.SIGTERM)
        row.wrong += [f"{what}, nohup {has_nohup}: {problem}" for problem in _not_saved(run)]
    return row


def start_in_background(command: Sequence[object], run: Path) -> subprocess.Popen:
    with Path(f"{run}.log").open("w") as log:
        words = [str(word) for word in command]
        return subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def wait_until(is_so: Callable[[], bool], seconds: float = 90) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _has_lines(run: Path, n: int) -> bool:
    return _log(run).count("step ") >= n


def _log(run: Path) -> str:
    return Path(f"{run}.log").read_text()


def _not_saved(run: Path) -> Iterable[str]:
    """Wait for the end of the processes of a run. Its last step must be saved."""
    if left := left_behind(lambda process: str(run) in process.cmdline(), patience=60):
        yield f"left behind: {left}"
    elif not (run / "results.json").exists():
        yield f"no results.json: {_log(run)[-1000:]}"
    elif results(run)["status"] != "interrupted":
        yield f"it is {results(run)['status']}"
    elif read_checkpoint((run / "ckpt" / "latest").resolve()).step != results(run)["step"]:
        yield "the last step is not saved"


# The end of a run


@dataclass
class DamagedBest:
    """Before the test, a byte of the best checkpoint is flipped."""

    def __call__(self, run_dir: Path) -> None:
        test = importlib.import_module("engine.train")._test_best

        def after_damage(run, outputs, agreement):
            weights = run_dir / "ckpt" / "best" / "model.safetensors"
            if int(os.environ.get("RANK", "0")) == 0:
                content = bytearray(weights.read_bytes())
                content[-1] ^= 1
                weights.write_bytes(content)
            run.accelerator.wait_for_everyone()
            return test(run, outputs, agreement)

        importlib.import_module("engine.train")._test_best = after_damage


END_FAULTS: Sequence[tuple[Fault, int]] = (
    *((At("engine.train:_finish", "full disk"), ranks) for ranks in (1, 2)),
    (At("engine.train:_draw_predictions", "full disk"), 1),
    *((At("engine.tasks.classification:Classification.draw", "crash"), ranks) for ranks in (1, 2)),
    (At("engine.tasks.classification:Classification.predict", "crash"), 2),
    *((DamagedBest(), ranks) for ranks in (1, 2)),
)


def ends_with_a_warning(folder: Path, faults: Iterable[tuple[Fault, int]] = END_FAULTS) -> Row:
    row = Row("a full disk, a damaged file or a bug after the last step", "a warning, and the training counts as completed")
    for i, (fault, ranks) in enumerate(faults):
        argv = (*DIGITS_RUN, "--data.valid_ratio", 0.2)
        _try(row, folder / f"end-{i}", argv, fault, ranks, lambda ended: set(ended.codes) == {0} and "warning: " in ended.output)
    return row


PARTS: dict[str, Callable[[Path], Row]] = {
    "workers": workers_cannot_start,
    "reading": workers_fail,
    "ranks": ranks_fail,
    "signals": signals_at_odd_moments,
    "launchers": launcher_is_killed,
    "terminals": terminal_is_closed,
    "endings": ends_with_a_warning,
}
