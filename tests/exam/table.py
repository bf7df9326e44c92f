"""The table of the exam, in Markdown."""

from collections.abc import Sequence
from typing import Any

from tests.exam.candidates import CANDIDATES

QUESTIONS = {
    "resumed": "resumed after a kill",
    "weights": "same weights as left alone",
    "samples": "each sample once per epoch",
    "ranks": "two ranks evaluate each sample once",
    "flip": "flipped bit noticed",
    "code": "code in a pickle",
}


def table(results: list[dict[str, Any]]) -> str:
    """Return a row for each candidate, with its results on all data together."""
    lines = [f"| framework | {' | '.join(QUESTIONS.values())} |", f"| {' | '.join(['---'] * (1 + len(QUESTIONS)))} |"]
    for name, candidate in CANDIDATES.items():
        if of_it := [result for result in results if result["candidate"] == name]:
            title = f"{candidate.title} {of_it[0]['version']}".strip()
            cells = [_with_issues(cell, candidate.issues.get(question, ())) for question, cell in _cells(of_it).items()]
            lines.append(f"| {' | '.join([title, *cells])} |")
    missing = [candidate.title for name, candidate in CANDIDATES.items() if name not in {r["candidate"] for r in results}]
    return "\n".join([*lines, *(["", f"Not installed or not chosen: {'; '.join(missing)}."] if missing else [])])


def _cells(results: list[dict[str, Any]]) -> dict[str, str]:
    resumed = [one for result in results for one in result["resumed"]]
    ended = [one for one in resumed if one["error"] is None]
    flips = [flip for result in results for flip in result["flips"]]
    code = [result["code_ran"] for result in results if result["code_ran"] is not None]
    counted = [result["counted"] for result in results if result["counted"] is not None]
    return {
        "resumed": _share(
            len(ended), len(resumed), f"error after: {', '.join(sorted({_kind(o) for o in resumed if o['error']}))}"
        ),
        "weights": _share(sum(one["difference"] == 0 for one in ended), len(resumed), _off(results, ended)),
        "samples": _share(sum(one["twice"] == one["never"] == 0 for one in ended), len(resumed), _miscounted(ended)),
        "ranks": _evaluated(counted[0]) if counted else "not asked",
        "flip": _share(sum(flip != "trained on" for flip in flips), len(flips), "trained on with it"),
        "code": ("**runs**" if any(code) else "does not run") if code else "not asked",
    }


def _with_issues(cell: str, issues: Sequence[str]) -> str:
    """Return a cell that says something failed with links to where that is known."""
    links = [
        f"[#{number}](https://github.com/{repository}/issues/{number})" for repository, number in (i.split("#") for i in issues)
    ]
    return " ".join([cell, *links]) if "**" in cell else cell


def _kind(resumed: dict[str, Any]) -> str:
    return resumed["fault"].split(" at ")[0]


def _share(n: int, of: int, otherwise: str) -> str:
    if not of:
        return "not asked"
    return f"{n} of {of}" if n == of else f"**{n} of {of}**{'; ' if otherwise else ''}{otherwise}"


def _off(results: list[dict[str, Any]], ended: list[dict[str, Any]]) -> str:
    """Return how far the weights are off, and whether two runs left alone already differ."""
    most = max((one["difference"] for one in ended), default=0.0)
    repeated = max(result["repeated"] for result in results)
    words = f"off by up to {most:.1%}" if most else ""
    return f"{words} (two runs left alone: {repeated:.1%})" if repeated else words


def _miscounted(ended: list[dict[str, Any]]) -> str:
    most = max(ended, key=lambda one: one["twice"] + one["never"], default=None)
    return f"up to {most['twice']} again, {most['never']} never" if most and most["twice"] + most["never"] else ""


def _evaluated(counted: dict[str, int] | str) -> str:
    if isinstance(counted, str):
        return f"**{counted}**"
    wrong = counted["twice"] + counted["never"]
    return f"**no**: {counted['twice']} twice, {counted['never']} never" if wrong else "yes"
