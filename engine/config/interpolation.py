"""References such as `${train.n_steps}` to other values of the same config.

OmegaConf follows them; before it does, they are checked: no resolver (such as `oc.env`) is ever called, and references that lead
to references can't multiply without bound.
"""

import re
from typing import Any

from engine.config.errors import ConfigError

REFERENCE = re.compile(r"\$\{([A-Za-z_][\w-]*(?:\.[\w-]+)*)\}")
MAX_LOOKUPS = 1_000  # for one config, every reference followed; a long text counts once per 100 characters
MAX_DEPTH = 20  # of references that lead to references


def check_references(values: dict[str, Any]) -> None:
    """Raise ConfigError for a reference to anything but a key, for a circle of them, and for one that expands without bound."""
    known: dict[str, int | None] = {}

    def lookups(value: Any, path: str, depth: int = 0) -> int:
        """Count the references that resolving `value`, at `path`, follows."""
        if path in known:
            if (n := known[path]) is None:
                raise ConfigError(path, "refers to itself")
            return n
        if depth > MAX_DEPTH:
            raise ConfigError(path, f"more than {MAX_DEPTH} references lead to it, one by way of the other")
        known[path] = None
        if isinstance(value, dict):
            n = sum(lookups(item, f"{path}.{key}".lstrip("."), depth) for key, item in value.items())
        elif isinstance(value, list):
            n = sum(lookups(item, f"{path}.{i}", depth) for i, item in enumerate(value))
        else:
            n = 0
            for target in _targets(value, path):
                text = at(values, target)
                n += 1 + lookups(text, target, depth + 1) + (len(text) // 100 if isinstance(text, str) else 0)
        if n > MAX_LOOKUPS:
            raise ConfigError(path or "the config", f"its references expand to more than {MAX_LOOKUPS:,} values")
        known[path] = n
        return n

    lookups(values, "")


def _targets(value: Any, path: str) -> list[str]:
    if not isinstance(value, str) or "${" not in value:
        return []
    targets = REFERENCE.findall(value)
    if len(targets) != value.count("${"):
        raise ConfigError(path, f"{value!r} is not a reference to another key", "only ${section.key} of the same config is read")
    return targets


def at(values: Any, key: str) -> Any:
    """Return the value at a dotted key, or None for a missing key, which OmegaConf then reports."""
    for part in key.split("."):
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, dict):
            values = values.get(part)
        else:
            return None
    return values
