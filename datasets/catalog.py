"""Find a data set by its name; case, dashes and underscores do not matter."""

import importlib
import pkgutil
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from datasets.splits import DatasetSpec

NOT_FAMILIES = {"augment", "cache", "catalog", "counters", "downloads", "files", "loaders", "mixing", "order", "splits"}


@cache
def _specs() -> dict[str, DatasetSpec]:
    specs: dict[str, DatasetSpec] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name in NOT_FAMILIES:
            continue
        _add(specs, importlib.import_module(f"datasets.{module.name}").DATASETS, f"datasets/{module.name}.py")
    return specs


def _add(specs: dict[str, DatasetSpec], more: Sequence[DatasetSpec], source: str) -> None:
    for spec in more:
        if _plain(spec.name) in specs:
            raise ValueError(f"{source} names its data set {spec.name!r}, which is taken")
    specs.update({_plain(spec.name): spec for spec in more})


def register_datasets(specs: Sequence[DatasetSpec], source: str) -> None:
    """Make data sets from elsewhere available by name, like those of the files here."""
    _add(_specs(), specs, source)


def list_datasets() -> list[str]:
    return sorted(spec.name for spec in _specs().values())


def find_dataset(name: str) -> DatasetSpec:
    if _plain(name) not in _specs():
        near = get_close_matches(_plain(name), list(_specs()), n=1)
        hint = f"did you mean {_specs()[near[0]].name}?" if near else f"there are {', '.join(list_datasets())}"
        raise ValueError(f"unknown data set {name!r}: {hint}")
    return _specs()[_plain(name)]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
