"""Config files and command-line options as layers of values; a later layer overrides an earlier one, key by key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engine.config import yaml12
from engine.config.command_line import parse_overrides
from engine.config.errors import ConfigError, Origin

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "lenet_digits.yaml"
MAX_BYTES = 1_000_000
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
    files: list[tuple[Path, dict[str, Any]]] = []
    _collect((Path(path) if path is not None else DEFAULT_CONFIG).expanduser(), files, parents=())
    layers = [Layer(Origin(rank, str(file)), values) for rank, (file, values) in enumerate(files, start=1)]
    given = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    for key, value in given.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        layers.append(Layer(Origin(COMMAND_LINE, f"--{key}"), nested))
    return layers


def _collect(path: Path, files: list[tuple[Path, dict[str, Any]]], parents: tuple[Path, ...]) -> None:
    """Append the file to `files`, after its bases."""
    if path.resolve() in parents:
        raise ConfigError(f"{path} is its own base, by way of {parents[-1]}")
    values = _read(path, base_of=parents[-1] if parents else None)
    bases = values.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError("base", "expected a file name or a list of them", origin=str(path))
    for base in bases:
        _collect(path.parent / base, files, (*parents, path.resolve()))
    files.append((path, values))


def _read(path: Path, base_of: Path | None) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{path} is larger than a config can be ({MAX_BYTES:,} bytes)")
        values = yaml12.parse(raw.decode())
    except FileNotFoundError:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        problem = f"no such config{f' (the base of {base_of})' if base_of else ''}"
        raise ConfigError(str(path), problem, f"did you mean {path.parent / near[0]}?" if near else "") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:  # bad YAML, or bytes that are not UTF-8
        raise ConfigError(f"{path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    return values
