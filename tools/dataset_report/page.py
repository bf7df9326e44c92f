"""The report as a page that needs no network, and as a table with a line for each image."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from datasets import Split
from tools import comparison
from tools.comparison.mistakes import MAX_SIDE, data_url
from tools.dataset_report.duplicates import Group
from tools.dataset_report.facts import Facts, picture
from tools.dataset_report.mislabels import Judged
from tools.tables import Rows, csv_text

TEMPLATES = [Path(__file__).with_name("template"), Path(comparison.__file__).with_name("template")]
FORMULAS = ("=", "+", "-", "@")
MOST_GROUPS, MOST_MEMBERS, MOST_SUSPECTS, MOST_PROBLEMS = 60, 6, 80, 100  # in the page; the table has all
COLUMNS = ("path", "split", "labels", "width", "height", "format", "mode", "problem", "duplicates", "suspicion", "suggested")


class Report:
    """What was found in a dataset."""

    def __init__(
        self, title: str, splits: Mapping[str, Split], classes: Sequence[str], facts: Sequence[Facts], groups: Sequence[Group]
    ) -> None:
        self.title, self.splits, self.classes, self.facts, self.groups = title, splits, classes, facts, groups
        self.first: dict[str, int] = {}  # the index of each split's first image
        for i, one in enumerate(facts):
            self.first.setdefault(one.split, i)
        self.summary: list[str] = []
        self.tables: dict[str, Rows] = {}
        self.judged: Judged | None = None

    def as_page(self) -> str:
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        suspects, groups = self.judged.suspects if self.judged is not None else [], []
        for group in self.groups[:MOST_GROUPS]:
            members = [self._image(i) for i in group.members[:MOST_MEMBERS]]
            groups.append({"group": group, "members": members, "n_more": len(group.members) - len(members)})
        return environment.get_template("report.html").render(
            title=self.title,
            date=time.strftime("%Y-%m-%d %H:%M"),
            summary=self.summary,
            tables=self.tables,
            problems=[one.problem for one in self.facts if one.problem][:MOST_PROBLEMS],
            n_groups=len(self.groups),
            groups=groups,
            judged=self.judged,
            n_suspects=len(suspects),
            suspects=[
                {**self._image(i), "suggested": self.classes[suggested], "suspicion": suspicion}
                for i, suggested, suspicion in suspects[:MOST_SUSPECTS]
            ],
        )

    def _image(self, i: int) -> dict[str, Any]:
        one = self.facts[i]
        picture_url = data_url(picture(self.splits[one.split], i - self.first[one.split], MAX_SIDE))
        return {"picture": picture_url, "split": one.split, "name": one.name, "labels": self.named(one)}

    def named(self, one: Facts) -> str:
        """Return the names of an image's classes, as people read them."""
        labels, n = dict.fromkeys(one.labels), len(self.classes)
        return "; ".join(self.classes[label] if label < n else f"class {label}" for label in labels)

    def as_csv(self) -> str:
        of_group = {i: number for number, group in enumerate(self.groups, 1) for i in group.members}
        judged: dict[int, tuple[str, str]] = {}
        if (all_judged := self.judged) is not None:
            columns = all_judged.indices.tolist(), all_judged.suspicion, all_judged.is_suspect, all_judged.suggested
            for i, suspicion, is_suspect, suggested in zip(*columns, strict=True):
                judged[i] = f"{suspicion:.4f}", self.classes[suggested] if is_suspect else ""

        def rows() -> Iterator[Sequence[Any]]:
            yield COLUMNS
            for i, one in enumerate(self.facts):
                about = one.width, one.height, one.format, one.mode, one.problem
                row = one.name, one.split, self.named(one), *about, of_group.get(i, ""), *judged.get(i, ("", ""))
                # text that a spreadsheet would run as a formula is quoted: names of files may be a stranger's
                yield [f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULAS) else cell for cell in row]

        return csv_text(rows())
