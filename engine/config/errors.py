"""The two kinds of failure that are no bugs of this program, and the exit code of each."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: a file or an option. A higher rank overrides a lower one."""

    rank: int
    name: str


class ConfigError(Exception):
    """A mistake in the command line or the config: exit code 2.

    `key` is the config key or option at fault, or several of them; without a `problem` it is the whole message. Where the values
    of the keys come from is added by `located`, which `resolve` and `train` use.
    """

    exit_code = 2
    on_every_rank = True  # every rank finds the same mistake, so rank 0 alone reports it

    def __init__(self, key: str | Sequence[str], problem: str = "", hint: str = "", origin: str = "") -> None:
        super().__init__(key, problem, hint, origin)
        self.keys = (key,) if isinstance(key, str) else tuple(key)
        self.problem, self.hint, self.origin = problem, hint, origin

    def __str__(self) -> str:
        message = f"{self.keys[0]}: {self.problem}" if self.problem else self.keys[0]
        return message + (f" ({self.origin})" if self.origin else "") + (f"; {self.hint}" if self.hint else "")


@contextmanager
def located(origins: Mapping[str, Origin]) -> Iterator[None]:
    """Add to a ConfigError the files or options that the values of its keys come from."""
    try:
        yield
    except ConfigError as error:
        if error.origin:
            raise
        names = dict.fromkeys(origins[key].name for key in error.keys if key in origins)
        raise ConfigError(error.keys, error.problem, error.hint, ", ".join(names)) from error.__cause__


class RunError(Exception):
    """Something outside the program that fails at run time, such as an unreadable file: exit code 1."""

    exit_code = 1
    on_every_rank = False
