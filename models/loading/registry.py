"""Discovery: every module directly in a package that holds a table of models, datasets or tasks."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", str, tuple[str, str])
Entry = TypeVar("Entry")


class Registry(Generic[Key, Entry]):
    """The entries of one table, such as MODELS, in every module directly in a package, and in plugins.

    `entries_of` turns a module's table into a mapping from names (or other keys) to entries.
    """

    def __init__(self, kind: str, package: str, table: str, entries_of: Callable[[Any], Mapping[Key, Entry]]) -> None:
        self.kind, self.package, self.table = kind, package, table
        self.entries_of: Callable[[Any], Mapping[Key, Entry]] = entries_of

    @cached_property
    def entries(self) -> dict[Key, Entry]:
        found: dict[Key, Entry] = {}
        for info in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            if not info.ispkg:
                module = importlib.import_module(f"{self.package}.{info.name}")
                self._add_to(found, getattr(module, self.table), f"{self.package}/{info.name}.py")
        return found

    def register(self, table: Any, source: str) -> None:
        """Add the entries of a plugin's table. A duplicate name raises ValueError."""
        self._add_to(self.entries, table, source)

    def _add_to(self, entries: dict[Key, Entry], table: Any, source: str) -> None:
        added = self.entries_of(table)
        if taken := sorted(added.keys() & entries.keys()):
            name = taken[0] if isinstance(taken[0], str) else taken[0][0]
            raise ValueError(f"{source} names its {self.kind} {name!r}, which is taken")
        entries.update(added)


def did_you_mean(name: str, known: Mapping[str, str], otherwise: str, n: int = 1) -> str:
    """Return `did you mean ...?` with the nearest names of `known` (compared by key, printed by value), or `otherwise`."""
    near = [known[key] for key in get_close_matches(name, list(known), n=n)]
    return f"did you mean {' or '.join(near)}?" if near else otherwise
