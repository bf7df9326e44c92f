"""The search space of a sweep: config keys and the values that each may have, as --space writes them."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import yaml12
from engine.config.errors import ConfigError

FORMS = "KEY=a,b,c, KEY=low..high, KEY=low..high..step or KEY=log:low..high"


@dataclass(frozen=True)
class Dimension:
    """One config key with the values to choose from or, if there are none, a range of numbers."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False

    @property
    def grid(self) -> Sequence[Any]:
        if self.values:
            return self.values
        if self.step is None:
            raise ConfigError(f"--space {self.key}: a grid needs values, or a range with a step: {FORMS}")
        n = math.floor((self.high - self.low) / self.step + 1e-9)
        is_integer = isinstance(self.low, int)
        return [self.low + i * self.step if is_integer else round(self.low + i * self.step, 12) for i in range(n + 1)]


def storable(value: Any) -> Any:
    """Replace a list by its YAML: Optuna stores only numbers and strings."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else yaml12.dump([value]).strip()


def grid_points(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Yield each combination of the grids, as Optuna stores it."""
    for values in itertools.product(*(dimension.grid for dimension in space)):
        yield {dimension.key: storable(value) for dimension, value in zip(space, values, strict=True)}


def read_space(words: Sequence[str]) -> tuple[Dimension, ...]:
    space = tuple(_read_dimension(word) for word in words)
    for key, n in Counter(dimension.key for dimension in space).items():
        if n > 1:
            raise ConfigError(f"--space {key}: given {n} times; a key has one set of values")
    return space


def _read_dimension(word: str) -> Dimension:
    key, _, text = word.removeprefix("--").partition("=")
    if not text:
        raise ConfigError(f"--space {word}: expected {FORMS}")
    log = text.startswith("log:")
    parts = text.removeprefix("log:").split("..")
    try:
        values = yaml12.parse(f"[{text}]") if len(parts) == 1 else [yaml12.parse(part) for part in parts]
    except ValueError as error:
        raise ConfigError(f"--space {word}: {text!r} can't be read: {error}") from error
    if len(parts) == 1:
        if log:
            raise ConfigError(f"--space {word}: log: is for a range, as in {key}=log:1e-4..1e-1")
        return Dimension(key, values=tuple(values))
    if len(values) > 3 or any(type(value) not in (int, float) for value in values):
        raise ConfigError(f"--space {word}: a range is low..high or low..high..step, of numbers")
    if float in map(type, values):
        values = [float(value) for value in values]
    low, high, step = (*values, None)[:3]
    if not low < high or (step is not None and step <= 0) or (log and (low <= 0 or step is not None)):
        rule = "from a positive number, without a step" if log else "from low to high, in steps above 0"
        raise ConfigError(f"--space {word}: a range goes {rule}")
    return Dimension(key, low=low, high=high, step=step, log=log)
