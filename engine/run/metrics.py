"""What a run says: lines on the terminal and in output.log, metrics.jsonl, TensorBoard."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config.resolve import flatten
from engine.run.folder import RunFolder, finite, remove_tree
from engine.run.log import log


class Tracker:
    """The history of a run, which continues where the checkpoint was written: what came later is cut off.

    Lines that the disk doesn't take are kept, and written before the next ones.
    """

    def __init__(self, folder: RunFolder, step: int, metrics_bytes: int) -> None:
        self.path = folder.path / "metrics.jsonl"
        self._file = self.path.open("ab", buffering=0)
        if self._file.tell() < metrics_bytes:
            log.warning("%s is shorter than at the checkpoint; earlier lines are lost", self.path)
        self._length = self._file.truncate(min(metrics_bytes, self._file.tell()))
        self._unwritten = b""
        if step == 0 and (folder.path / "tensorboard").exists():  # of a start that never came to its first checkpoint
            remove_tree(folder.path / "tensorboard")
        self.tensorboard = _open_tensorboard(folder.path / "tensorboard", step)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Add one line."""
        self._unwritten += json.dumps(finite({"step": step, **metrics})).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            log.warning("%s can't be written (%s); its lines are kept until it can", self.path, error.strerror)
        for name, value in metrics.items():
            if "/" in name:
                self._show(lambda tensorboard, name=name, value=value: tensorboard.add_scalar(name, value, step))

    def images(self, tag: str, grid: Any, step: int) -> None:
        self._show(lambda tensorboard: tensorboard.add_image(tag, grid, step))

    def hyperparameters(self, config: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        if self.tensorboard is None:
            return
        from torch.utils.tensorboard.summary import hparams

        flat = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in flatten(config).items()
        }
        for summary in hparams(flat, metrics):
            self._show(lambda tensorboard, summary=summary: tensorboard.file_writer.add_summary(summary))
        for name, value in metrics.items():
            self._show(lambda tensorboard, name=name, value=value: tensorboard.add_scalar(name, value, step))

    def flush(self) -> int:
        """Everything on the disk, before a checkpoint says how long the file is: that long."""
        self._write()
        os.fsync(self._file.fileno())
        return self._length

    def close(self) -> None:
        try:
            self._write()
            self._file.close()
        except OSError as error:
            log.warning("the last lines of %s are lost (%s)", self.path, error.strerror)
        self._show(lambda tensorboard: tensorboard.close())

    def _write(self) -> None:
        written = 0
        try:
            while written < len(self._unwritten):
                written += self._file.write(self._unwritten[written:])
        except OSError:
            self._file.truncate(self._length)  # no reader shall see part of a line
            raise
        self._length, self._unwritten = self._length + written, b""

    def _show(self, action: Callable[[Any], None]) -> None:
        """TensorBoard is a convenience: without it the training goes on."""
        if self.tensorboard is None:
            return
        try:
            action(self.tensorboard)
        except OSError as error:
            self.tensorboard = None
            log.warning("TensorBoard's files can't be written (%s); metrics.jsonl has everything", error)


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        _wait_for_another_second(folder)
        return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    except (ImportError, OSError) as error:
        log.warning("no TensorBoard (%s); metrics.jsonl has everything", error)
        return None


def _wait_for_another_second(folder: Path) -> None:
    """TensorBoard reads a folder's files in the order of their names, which hold the second in which each was opened."""
    newest = max((path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")), default="")
    while newest == f"{int(time.time()):010d}":
        time.sleep(0.05)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for one that is being written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
