"""Keyword arguments from a config, checked against the signature of what takes them."""

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from engine.config.errors import ConfigError
from engine.config.resolve import LoadedConfig, keys, mismatch


def check_arguments(
    given: dict[str, Any], signature: inspect.Signature, section: str, config: LoadedConfig, set_by_engine: Sequence[str] = ()
) -> None:
    """Every one of `given` must be a parameter, and of its annotated type."""
    for name, value in given.items():
        parameter = signature.parameters.get(name)
        origin = config.origins.get(f"{section}.{name}")
        said = f" ({origin.name})" if origin else ""
        if parameter is None or name in set_by_engine:
            takes = [known for known in signature.parameters if known not in set_by_engine]
            takes += [key.removeprefix(f"{section}.") for key in keys() if key.startswith(f"{section}.")]
            hint = nearest(name, takes, f"{section}.") or (f"; it takes {', '.join(takes)}" if takes else "")
            raise ConfigError(f"{section}.{name}: no such argument{said}{hint}")
        if parameter.annotation is not inspect.Parameter.empty and not isinstance(parameter.annotation, str):
            problem = mismatch(value, parameter.annotation)
            if problem and value != parameter.default:
                raise ConfigError(f"{section}.{name}: {problem}{said}")


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    near = get_close_matches(name, known, n=1) or get_close_matches(name.lower(), [k.lower() for k in known], n=1)
    if not near:
        return ""
    found = next(k for k in known if k.lower() == near[0].lower())
    return f"; did you mean {prefix}{found}?"
