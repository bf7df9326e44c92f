"""Tables and numbers as text, and writing them to files."""

import csv
import io
import re
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from engine.config.errors import RunError
from engine.config.text import printable

MARKUP = re.compile(r"[\\|`*<>\[\]&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # an underscore within a word is none

Rows = Sequence[Sequence[str]]  # the first one is the head


def markdown(rows: Rows, right: Container[int] = ()) -> str:
    """Format a Markdown table, aligned so that the source is readable; the columns `right` are numbers."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * (width - 1) + ":" if i in right else "-" * width for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in _aligned([rows[0], rule, *rows[1:]], widths, right))


def plain(rows: Rows, right: Container[int] = ()) -> str:
    """Format a table for a terminal."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join("  ".join(cells).rstrip() for cells in _aligned([rows[0], rule, *rows[1:]], widths, right))


def _aligned(rows: Rows, widths: Sequence[int], right: Container[int]) -> list[list[str]]:
    return [
        [cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def escaped(text: str) -> str:
    """Escape text for Markdown: it is shown as it is, on one line."""
    return MARKUP.sub(r"\\\g<0>", printable(text))


def code_block(text: str, language: str = "") -> str:
    """Return a Markdown block of code that no line of the text can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{printable(text, keep=chr(10)).strip(chr(10))}\n{fence}"


def print_lines(text: str, file: TextIO | None = None, *, flush: bool = False) -> None:
    """Print lines for people, in which control characters from files and names are escaped."""
    print(printable(text, keep="\n"), file=file or sys.stdout, flush=flush)


def giga(n: float) -> str:
    return f"{n / 1e9:.2f} G" if n >= 1e8 else f"{n / 1e6:.2f} M"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} h" if minutes >= 60 else f"{minutes}:{seconds:02d} min"


@contextmanager
def writing(path: Path, *, say: bool = True) -> Iterator[None]:
    """Create the folder of `path` and print that it was written; raise RunError if it can't be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from error
    if say:
        print_lines(f"wrote {path}")


def write_text(path: Path, text: str) -> None:
    with writing(path):
        path.write_text(text, encoding="utf-8", newline="")
