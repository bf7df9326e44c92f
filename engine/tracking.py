"""What a run says: lines on the terminal and in output.log, metrics.jsonl, TensorBoard."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.config import flatten
from engine.run_folder import RunFolder, finite, remove_tree

log = logging.getLogger("engine")


class Terminal(logging.Handler):
    """Lines on stdout, above the progress bar where there is one. A stdout that was closed is no reason to stop training."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = True

    def emit(self, record: logging.LogRecord) -> None:
        if not self.is_open:
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except (BrokenPipeError, ValueError):  # ValueError: the stream object itself is closed
            self.is_open = False
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
            log.warning("stdout is closed; the log goes on in output.log")


class Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{level}{record.getMessage()}"


def set_up_terminal(is_main: bool) -> None:
    """Rank 0 speaks for all."""
    for name in ("engine", "models", "datasets"):
        logger = logging.getLogger(name)
        logger.handlers = [Terminal()] if is_main else [logging.NullHandler()]
        logger.handlers[0].setFormatter(Line())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def add_log_file(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path)
    handler.setFormatter(Line())
    for name in ("engine", "models", "datasets"):
        logging.getLogger(name).addHandler(handler)
    return handler


def remove_log_file(handler: logging.Handler) -> None:
    for name in ("engine", "models", "datasets"):
        logging.getLogger(name).removeHandler(handler)
    handler.close()


class Tracker:
    """The history of a run, which continues where the checkpoint was written: what came later is cut off."""

    def __init__(self, folder: RunFolder, step: int, metrics_bytes: int) -> None:
        self.path = folder.path / "metrics.jsonl"
        self._file = self.path.open("ab")
        if self._file.tell() < metrics_bytes:
            log.warning("%s is shorter than at the checkpoint; earlier lines are lost", self.path)
        self._file.truncate(min(metrics_bytes, self._file.tell()))
        self._file.seek(0, os.SEEK_END)
        if step == 0 and (folder.path / "tensorboard").exists():  # of a start that never came to its first checkpoint
            remove_tree(folder.path / "tensorboard")
        self.tensorboard = _open_tensorboard(folder.path / "tensorboard", step)

    def record(self, step: int, metrics: dict[str, float]) -> int:
        """Add one line; gives the length of the file."""
        self._file.write(json.dumps(finite({"step": step, **metrics})).encode() + b"\n")
        self._file.flush()
        if self.tensorboard is not None:
            for name, value in metrics.items():
                if "/" in name:
                    self.tensorboard.add_scalar(name, value, step)
        return self._file.tell()

    def images(self, tag: str, grid: Any, step: int) -> None:
        if self.tensorboard is not None:
            self.tensorboard.add_image(tag, grid, step)

    def hyperparameters(self, config: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        if self.tensorboard is None:
            return
        from torch.utils.tensorboard.summary import hparams

        flat = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in flatten(config).items()
        }
        for summary in hparams(flat, metrics):
            self.tensorboard.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)

    def flush(self) -> None:
        """Everything on the disk, before a checkpoint says how long the file is."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    except (ImportError, OSError) as error:
        log.warning("no TensorBoard (%s); metrics.jsonl has everything", error)
        return None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
