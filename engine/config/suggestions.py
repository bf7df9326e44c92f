"""Hints for names that are not known: the nearest one that is."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `did you mean ...?` with the nearest of `known`, upper and lower case alike; empty if none is near."""
    spelled: dict[str, str] = {}
    for word in known:
        spelled.setdefault(word.lower(), word)
    near = get_close_matches(name.lower(), list(spelled), n=1)
    return f"did you mean {prefix}{spelled[near[0]]}?" if near else ""


def nearest_key(path: str, known: Sequence[str], siblings: Iterable[str] = ()) -> str:
    """The same for a dotted key: a sibling first, then a key with the same last part in another section, then any key."""
    parent, _, last = path.rpartition(".")
    if hint := nearest(last, siblings, f"{parent}." if parent else ""):
        return hint
    if same := [key for key in known if key.rpartition(".")[2] == last]:
        return f"did you mean {same[0]}?"
    if close := get_close_matches(path, known, n=1):
        return f"did you mean {close[0]}?"
    if close := get_close_matches(last, [key.rpartition(".")[2] for key in known], n=1):
        return f"did you mean {next(key for key in known if key.rpartition('.')[2] == close[0])}?"
    return ""
