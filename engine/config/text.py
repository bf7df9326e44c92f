"""Text from files and names, made safe for a terminal or a log."""

import re

# C0 and C1 controls (such as the escape that starts an ANSI sequence), line separators, directions of writing, lone surrogates
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Escape control characters, except those in `keep`: nothing in `text` moves the cursor, changes colors or forges a line."""
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)
