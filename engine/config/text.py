"""Text of messages: made safe for a terminal or a log, and hints for names that are not known."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

# C0 and C1 controls (such as the escape that starts an ANSI sequence), line separators, directions of writing, lone surrogates
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Escape control characters, except those in `keep`: nothing in `text` moves the cursor, changes colors or forges a line."""
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)


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
    of_part: dict[str, str] = {}
    for key in known:
        of_part.setdefault(key.rpartition(".")[2], key)
    if last in of_part:
        return f"did you mean {of_part[last]}?"
    if close := get_close_matches(path, known, n=1):
        return f"did you mean {close[0]}?"
    close = get_close_matches(last, list(of_part), n=1)
    return f"did you mean {of_part[close[0]]}?" if close else ""
