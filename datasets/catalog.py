"""Find a data set by its name and by what its targets are; case, dashes and underscores do not matter."""

import importlib
import pkgutil
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from datasets.splits import DatasetSpec

NOT_FAMILIES = {
    *("augment", "boxes", "cache", "catalog", "counters", "downloads", "files", "loaders", "masks", "mixing", "order", "scenes"),
    *("splits", "tensors"),
}


Specs = dict[tuple[str, str], DatasetSpec]  # by plain name and targets


@cache
def _specs() -> Specs:
    specs: Specs = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name in NOT_FAMILIES:
            continue
        _add(specs, importlib.import_module(f"datasets.{module.name}").DATASETS, f"datasets/{module.name}.py")
    return specs


def _add(specs: Specs, more: Sequence[DatasetSpec], source: str) -> None:
    for spec in more:
        if (_plain(spec.name), spec.targets) in specs:
            raise ValueError(f"{source} names its data set {spec.name!r}, which is taken")
    specs.update({(_plain(spec.name), spec.targets): spec for spec in more})


def register_datasets(specs: Sequence[DatasetSpec], source: str) -> None:
    """Make data sets from elsewhere available by name, like those of the files here."""
    _add(_specs(), specs, source)


def list_datasets(targets: str | None = None) -> list[str]:
    """All, or those with such targets."""
    return sorted({spec.name for spec in _specs().values() if targets in (None, spec.targets)})


def find_dataset(name: str, targets: str = "classes") -> DatasetSpec:
    if (_plain(name), targets) in _specs():
        return _specs()[_plain(name), targets]
    if other := sorted(of for plain, of in _specs() if plain == _plain(name)):
        raise ValueError(f"{name} gives {' or '.join(other)}, not {targets}; {', '.join(list_datasets(targets))} do")
    names = {_plain(known): known for known in list_datasets(targets)}
    near = get_close_matches(_plain(name), list(names), n=1)
    hint = f"did you mean {names[near[0]]}?" if near else f"there are {', '.join(list_datasets(targets))}"
    raise ValueError(f"unknown data set {name!r}: {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
