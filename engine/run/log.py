"""Log lines: on the terminal and in output.log of the run folder."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.config.text import printable

PACKAGES = ("engine", "models", "datasets")  # whose log is shown
log = logging.getLogger("engine")


class Terminal(logging.Handler):
    """Writes lines to stdout, above the progress bar if one is shown. A stdout that was closed does not stop the training."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = True

    def emit(self, record: logging.LogRecord) -> None:
        if not self.is_open:
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError):  # a closed pipe, a full disk; ValueError: the stream object itself is closed
            self.is_open = False
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
            log.warning("stdout can't be written; the log goes on in output.log")


class LogFile(logging.FileHandler):
    """Writes output.log. If it can't be written, as on a full disk, one warning says so."""

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=without_following)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name for it
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.handle = lambda record: False  # type: ignore[method-assign]  # from now on nothing is written
        log.warning("%s can't be written (%s)", self.baseFilename, error.strerror)


class Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return printable(f"{level}{record.getMessage()}", keep="\n\t")


if logging.lastResort is not None:  # prints the warnings of tools, which set up no log
    logging.lastResort.setFormatter(Line())


def without_following(path: str, flags: int) -> int:
    """Open a file as `open` does, but not through a symlink. A pipe does not block."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def millions(n: float) -> str:
    return f"{n / 1e6:.2f} M" if n >= 1e6 else f"{n / 1e3:.1f} k"


def set_up_terminal(is_main: bool) -> None:
    """Send the log of rank 0 to the terminal, and that of other ranks nowhere."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [Terminal()] if is_main else [logging.NullHandler()]
        logger.handlers[0].setFormatter(Line())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def add_log_file(path: Path) -> logging.Handler:
    handler = LogFile(path)
    handler.setFormatter(Line())
    for name in PACKAGES:
        logging.getLogger(name).addHandler(handler)
    return handler


def remove_log_file(handler: logging.Handler) -> None:
    for name in PACKAGES:
        logging.getLogger(name).removeHandler(handler)
    with suppress(OSError):  # the warning has been given
        handler.close()
