"""The metrics of a run: metrics.jsonl, TensorBoard, and how fast it trains."""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from engine.config.schema import flatten
from engine.config.text import printable
from engine.run.folder import RunFolder, finite
from engine.run.log import log, without_following

EVENTS = "events.out.tfevents"  # the beginning of the names of TensorBoard's files
MAX_LINE = 1_000_000  # bytes


class MetricsLog:
    """Writes metrics.jsonl and TensorBoard. A resumed run first cuts off what came after its checkpoint.

    Lines that the disk does not take are kept, and written before the next ones.
    """

    def __init__(self, folder: RunFolder, step: int, metrics_bytes: int) -> None:
        from models.loading.files import open_regular  # imports torch, which the tools that compare runs don't need

        self.path = folder.path / "metrics.jsonl"
        self._file = open(self.path, "ab", buffering=0, opener=without_following)  # noqa: SIM115 - until close
        with open_regular(self.path) as file:
            self._length = self._file.truncate(file.read(metrics_bytes).rfind(b"\n") + 1)
        if self._length < metrics_bytes:
            log.warning("%s is not as it was at the checkpoint; earlier lines are lost", self.path)
        self._unwritten = b""
        if step == 0:  # left by a start that did not reach its first checkpoint
            for events in (folder.path / "tensorboard").glob(f"{EVENTS}.*"):
                events.unlink()
        self.tensorboard = _open_tensorboard(folder.path / "tensorboard", step)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one line."""
        self._unwritten += json.dumps(finite({"step": step, **metrics})).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            log.warning("%s can't be written (%s); its lines are kept until it can", self.path, error.strerror)
        for name, value in metrics.items():
            if "/" in name:
                self._to_tensorboard("add_scalar", name, value, step)

    def images(self, tag: str, grid: Any, step: int) -> None:
        self._to_tensorboard("add_image", tag, grid, step)

    def hyperparameters(self, config: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Fill TensorBoard's table of runs: the config with the best metric."""
        if self.tensorboard is None:
            return
        from torch.utils.tensorboard.summary import hparams

        flat = flatten(config)
        flat |= {key: printable(str(value)) for key, value in flat.items() if not isinstance(value, (bool, int, float))}
        for summary in hparams(flat, dict(metrics)):
            self._try(lambda board, summary=summary: board.file_writer.add_summary(summary))  # type: ignore[misc]  # of a lambda
        for name, value in metrics.items():
            self._to_tensorboard("add_scalar", name, value, step)

    def flush(self) -> int:
        """Fsync metrics.jsonl and return its length, which a checkpoint remembers."""
        self._write()
        os.fsync(self._file.fileno())
        return self._length

    def close(self) -> None:
        try:
            self._write()
            self._file.close()
        except OSError as error:
            log.warning("the last lines of %s are lost (%s)", self.path, error.strerror)
        self._to_tensorboard("close")

    def _write(self) -> None:
        written = 0
        try:
            while written < len(self._unwritten):
                written += self._file.write(self._unwritten[written:])
        except OSError:
            self._file.truncate(self._length)  # a reader must not see part of a line
            raise
        self._length, self._unwritten = self._length + written, b""

    def _to_tensorboard(self, method: str, *args: Any) -> None:
        self._try(lambda board: getattr(board, method)(*args))

    def _try(self, action: Callable[[Any], None]) -> None:
        """TensorBoard is a convenience: the training goes on without it."""
        if self.tensorboard is None:
            return
        try:
            action(self.tensorboard)
        except OSError as error:
            self.tensorboard = None
            log.warning("TensorBoard's files can't be written (%s); metrics.jsonl has everything", error)


def _open_tensorboard(folder: Path, step: int) -> Any:
    """Open a new event file, with a later time in its name than its predecessors have, even if the clock was set back.

    TensorBoard reads a folder's files in the order of their names.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter

        _silence_writing_thread()
        from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]  # it has no stubs

        times = [part for path in folder.glob(f"{EVENTS}.*") if (part := path.name.split(".")[3]).isdecimal()]
        stamp = max(time.time(), int(max(times, default="0")) + 1)
        event_file_writer.time = SimpleNamespace(time=lambda: stamp)
        try:
            return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        finally:
            event_file_writer.time = time
    except Exception as error:  # its import fails in many ways, also for lack of memory
        log.warning("no TensorBoard (%s); metrics.jsonl has everything", str(error).partition("\n")[0])
        return None


@cache
def _silence_writing_thread() -> None:
    """Let TensorBoard's writing thread print no traceback: the next call raises its failure."""
    report = threading.excepthook

    def report_others(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            report(failure)

    threading.excepthook = report_others


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without one that is being written. Damaged lines are skipped with a warning."""
    from models.loading.files import open_regular  # imports torch, which the tools that compare runs don't need

    path, lines, damaged = run_dir / "metrics.jsonl", [], []
    if not path.exists():
        return []
    with open_regular(path) as file:
        for number in count(1):
            line = file.readline(MAX_LINE)
            if not line.endswith(b"\n") and len(line) < MAX_LINE:
                break
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            can_be_drawn = isinstance(values, dict) and all(is_number(values.get(key)) for key in ("step", "epoch", "elapsed"))
            if can_be_drawn and type(values["step"]) is int and all(v is None or is_number(v) for v in values.values()):
                lines.append(values)
            else:
                damaged.append(number)
    if damaged:
        log.warning("%s: %d damaged lines are skipped, number %d first", path, len(damaged), damaged[0])
    return lines


def is_number(value: Any) -> bool:
    """Tell whether a value of a JSON file is a number that can be drawn and formatted: finite, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


class Clock:
    """Measures training time: of the run, and of the window since the last log line, without saves."""

    def __init__(self, step: int) -> None:
        self.images = self.seconds = 0.0  # trained since this process started, and the time that it took
        self._last_tick = perf_counter()
        self.start_window(step)

    def start_window(self, step: int) -> None:
        self._window_start, self._window_step = perf_counter(), step

    def images_per_sec(self, step: int, batch_size: int) -> float:
        """Return the speed in this window."""
        images, seconds = (step - self._window_step) * batch_size, perf_counter() - self._window_start
        self.images, self.seconds = self.images + images, self.seconds + seconds
        return round(images / seconds, 1)

    def tick(self) -> float:
        """Return the seconds since the last tick."""
        now = perf_counter()
        elapsed, self._last_tick = now - self._last_tick, now
        return elapsed

    def skip_since_tick(self) -> None:
        """Do not count the time since the last tick as training time of this window."""
        self._window_start += perf_counter() - self._last_tick
