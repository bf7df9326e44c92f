"""Config files and command-line options as layers of values; a later layer overrides an earlier one, key by key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engine.config import yaml12
from engine.config.command_line import parse_overrides
from engine.config.errors import ConfigError, Origin

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "lenet_digits.yaml"
MAX_BYTES = 1_000_000  # of a config with its bases
MAX_FILES = 100
COMMAND_LINE = 1_000_000  # the rank of options, above that of any file


DEFAULT = Origin(0, "the default")


@dataclass
class Layer:
    origin: Origin
    values: dict[str, Any]


def read_layers(path: str | Path | None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> list[Layer]:
    """Read the config at `path` (LeNet on digits without one) with its bases, lowest first; `overrides` come last.

    Overrides are a mapping, {"train.optim.lr": 0.01}, or words of a command line, ["--train.optim.lr", "0.01"].
    """
    files = _Files()
    files.collect((Path(path) if path is not None else DEFAULT_CONFIG).expanduser())
    layers = [Layer(Origin(rank, str(file)), values) for rank, (file, values) in enumerate(files.values, start=1)]
    given = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    for key, value in given.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        layers.append(Layer(Origin(COMMAND_LINE, f"--{key}"), nested))
    return layers


@dataclass
class _Files:
    """A config and its bases, lowest first, and how much of them may still be read."""

    values: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    files_left: int = MAX_FILES
    bytes_left: int = MAX_BYTES

    def collect(self, path: Path, parents: tuple[Path, ...] = ()) -> None:
        """Append the file, after its bases."""
        values = self._read(path, base_of=parents[-1] if parents else None)
        if path.resolve() in parents:
            raise ConfigError(f"{path} is its own base, by way of {parents[-1]}")
        bases = values.pop("base", None) or []
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ConfigError("base", "expected a file name or a list of them", origin=str(path))
        for base in bases:
            self.collect(path.parent / base, (*parents, path.resolve()))
        self.values.append((path, values))

    def _read(self, path: Path, base_of: Path | None) -> dict[str, Any]:
        self.files_left -= 1
        if self.files_left < 0:
            raise ConfigError("base", f"more than {MAX_FILES} files, each with its bases")
        try:
            if path.exists() and not path.is_file():  # a pipe would block, and a device may never end
                raise ConfigError(f"{path} can't be read: it is not a regular file")
            with path.open("rb") as file:
                raw = file.read(self.bytes_left + 1)
            self.bytes_left -= len(raw)
            if self.bytes_left < 0:
                raise ConfigError(f"{path} is larger than a config with its bases can be ({MAX_BYTES:,} bytes)")
            values = yaml12.parse(raw.decode())
        except FileNotFoundError:
            near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
            problem = f"no such config{f' (the base of {base_of})' if base_of else ''}"
            raise ConfigError(str(path), problem, f"did you mean {path.parent / near[0]}?" if near else "") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symlinks
            raise ConfigError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
        except ValueError as error:  # bad YAML, bytes that are not UTF-8, or a NUL in the path
            raise ConfigError(f"{path}: {error}") from error
        if values is None:
            return {}
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ConfigError(f"{path}: a config is a mapping of keys to values")
        return values
