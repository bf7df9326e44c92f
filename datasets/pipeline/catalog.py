"""Find a dataset by its name and kind of targets. Case, dashes and underscores do not matter."""

from collections.abc import Sequence

from datasets.pipeline.splits import DatasetSpec
from models.loading.registry import Registry, did_you_mean


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _entries(table: Sequence[DatasetSpec]) -> dict[tuple[str, str], DatasetSpec]:
    return {(_plain(spec.name), spec.targets): spec for spec in table}


DATASETS: Registry[tuple[str, str], DatasetSpec] = Registry("dataset", "datasets", "DATASETS", _entries)


def list_datasets(targets: str | None = None) -> list[str]:
    """Return all dataset names, or those with this kind of targets."""
    return sorted({spec.name for spec in DATASETS.entries.values() if targets in (None, spec.targets)})


def find_dataset(name: str, targets: str = "classes") -> DatasetSpec:
    if (_plain(name), targets) in DATASETS.entries:
        return DATASETS.entries[_plain(name), targets]
    if other := sorted(of for plain, of in DATASETS.entries if plain == _plain(name)):
        raise ValueError(f"{name} gives {' or '.join(other)}, not {targets}; {', '.join(list_datasets(targets))} do")
    names = {_plain(known): known for known in list_datasets(targets)}
    hint = did_you_mean(_plain(name), names, f"there are {', '.join(list_datasets(targets))}")
    raise ValueError(f"unknown dataset {name!r}: {hint}")
