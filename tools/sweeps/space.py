"""What a sweep searches: keys of the config, and the values that each may have, as they are written on the command line."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config import yaml12
from engine.config.errors import ConfigError

if TYPE_CHECKING:
    from optuna import Trial

FORMS = "KEY=a,b,c, KEY=low..high, KEY=low..high..step or KEY=log:low..high"


@dataclass(frozen=True)
class Dimension:
    key: str
    values: tuple[Any, ...] = ()  # to choose from; without any, it is a range
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that a config must take, if it takes any."""
        return self.values or (self.low, self.high)

    @property
    def grid(self) -> Sequence[Any]:
        if self.values:
            return self.values
        if self.step is None:
            raise ConfigError(f"--space {self.key}: a grid needs values, or a range with a step: {FORMS}")
        n = math.floor((self.high - self.low) / self.step + 1e-9)
        whole = isinstance(self.low, int) and isinstance(self.step, int)
        return [self.low + i * self.step if whole else round(self.low + i * self.step, 12) for i in range(n + 1)]

    def draw(self, trial: "Trial") -> Any:
        """The value of a trial, which is the same one whenever it is asked for."""
        if self.values:
            drawn = trial.suggest_categorical(self.key, [_storable(value) for value in self.values])
            return next(value for value in self.values if _storable(value) == drawn)
        if isinstance(self.low, int):
            return trial.suggest_int(self.key, self.low, self.high, log=self.log, step=self.step or 1)
        return trial.suggest_float(self.key, self.low, self.high, log=self.log, step=self.step)


def _storable(value: Any) -> Any:
    """Optuna keeps numbers and texts; a list is kept as it is written."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else yaml12.dump([value]).strip()


def read_space(words: Sequence[str]) -> tuple[Dimension, ...]:
    space = tuple(_dimension(word) for word in words)
    keys = [dimension.key for dimension in space]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--space {key}: given {keys.count(key)} times; a key has one set of values")
    return space


def _dimension(word: str) -> Dimension:
    key, equals, text = word.partition("=")
    key = key.removeprefix("--")
    if not equals or not text:
        raise ConfigError(f"--space {word}: expected {FORMS}")
    log = text.startswith("log:")
    parts = text.removeprefix("log:").split("..")
    if len(parts) == 1:
        if log:
            raise ConfigError(f"--space {word}: log: is for a range, as in {key}=log:1e-4..1e-1")
        values = tuple(_parsed(word, f"[{text}]"))
        return Dimension(key, values=values)
    numbers = [_parsed(word, part) for part in parts]
    if len(numbers) > 3 or not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers):
        raise ConfigError(f"--space {word}: a range is low..high or low..high..step, of numbers")
    if len({type(n) for n in numbers}) > 1:
        numbers = [float(n) for n in numbers]
    low, high, step = (*numbers, None)[:3]
    if not low < high or (step is not None and step <= 0) or (log and (low <= 0 or step is not None)):
        why = "from a positive number, without a step" if log else "from low to high, in steps above 0"
        raise ConfigError(f"--space {word}: a range goes {why}")
    return Dimension(key, low=low, high=high, step=step, log=log)


def _parsed(word: str, text: str) -> Any:
    try:
        return yaml12.parse(text)
    except ValueError as error:
        raise ConfigError(f"--space {word}: {text!r} can't be read: {error}") from error


def grid_of(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*(dimension.grid for dimension in space)):
        yield {d.key: _storable(value) if d.values else value for d, value in zip(space, values, strict=True)}
