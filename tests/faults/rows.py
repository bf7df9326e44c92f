"""Rows of the campaign's tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """What was tried, how often, what must happen, and each case in which it did not."""

    fault: str
    must: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)


def table(rows: Sequence[Row], what: str = "fault") -> str:
    lines = [f"| {what} | tried | what must happen | failed |", "| --- | ---: | --- | ---: |"]
    return "\n".join([*lines, *(f"| {row.fault} | {row.tried} | {row.must} | {len(row.wrong)} |" for row in rows)])
