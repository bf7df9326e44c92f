"""A config while it is put together: what the rules read, change and complain about."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.config.errors import Origin
from engine.config.layers import DEFAULT
from engine.config.schema import Config, flatten, to_dict

DEFAULTS = flatten(to_dict(Config()))


class TaskFacts(Protocol):
    @property
    def targets(self) -> str: ...

    @property
    def other_keys(self) -> Sequence[str]: ...

    @property
    def losses(self) -> Sequence[str]: ...


class DatasetFacts(Protocol):
    """What the rules need to know about a dataset before it is read; a DatasetSpec has it."""

    @property
    def name(self) -> str: ...

    @property
    def channels(self) -> int: ...

    @property
    def img_size(self) -> int: ...

    @property
    def n_classes(self) -> int | None: ...

    @property
    def crop_padding(self) -> int: ...

    @property
    def in_files(self) -> bool: ...


@dataclass
class Draft:
    """The values of a config by dotted key, while rules check and settle them."""

    values: dict[str, Any]
    arguments: dict[str, dict[str, Any]]  # of the open sections
    origins: dict[str, Origin]
    task: TaskFacts
    dataset: DatasetFacts
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.values[key] = value

    def origin(self, key: str) -> Origin:
        return self.origins.get(key, DEFAULT)

    def is_default(self, key: str) -> bool:
        return self.values[key] in (DEFAULTS[key], None, [])

    def named(self, key: str) -> str:
        """Return `train.ema 0.99 (configs/a.yaml)`."""
        value = self.values[key]
        return f"{key} {f'{value:g}' if isinstance(value, float) else value} ({self.origin(key).name})"

    def warn(self, key: str, problem: str) -> None:
        origin = f" ({self.origins[key].name})" if key in self.origins else ""
        self.notes.append(f"warning: {key}{origin} {problem}")

    @property
    def reads_files(self) -> bool:
        """Whether workers decode images; some datasets of files can be held in memory instead."""
        return self.dataset.in_files and not self.arguments["data"].get("in_memory")
