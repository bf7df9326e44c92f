"""Whether a value from YAML fits a type annotation, and words for people where it does not."""

import math
import types
from collections.abc import Mapping, Sequence
from operator import ge, gt, le, lt
from typing import Any, Literal, Union, get_args, get_origin

from engine.config.text import CONTROL

UNIONS = (Union, types.UnionType)
SEQUENCES = (list, tuple, Sequence)
BOUNDS = {"above": ("above", gt), "least": ("at least", ge), "below": ("below", lt), "most": ("at most", le)}
NAMES = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", type(None): "null"}


def mismatch(value: Any, hint: Any) -> str | None:
    """Say how `value` misses the annotation `hint`; None if it fits. Numbers are not strings, and true is not 1."""
    return None if _fits(value, hint) else f"expected {_describe(hint)}, got {_as_written(value)}"


def out_of_bounds(value: Any, bounds: Mapping[str, float]) -> str | None:
    """Say which of a key's bounds `value` breaks; None if it keeps them."""
    if value is None or isinstance(value, str):
        return None
    for kind, bound in bounds.items():
        words, holds = BOUNDS[kind]
        if not holds(value, bound):
            return f"must be {words} {bound}, got {value}"
    return None


def unusable(value: Any) -> str | None:
    """Say why no key can hold `value`, whatever its type; None if one can."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return "must be a number of at most 64 bits"
    if isinstance(value, str) and CONTROL.search(value):
        return f"must not contain control characters, got {value!r}"
    return None


def as_float(value: Any, hint: Any) -> Any:
    """Turn an int into a float where the annotation says float."""
    options = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value)
    lists = [option for option in options if get_origin(option) is list]
    if isinstance(value, list) and lists:
        return [as_float(item, get_args(lists[0])[0]) for item in value]
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in UNIONS:
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(hint))
    if origin in SEQUENCES:
        of = get_args(hint)[0] if get_args(hint) else Any
        return isinstance(value, (list, tuple)) and all(_fits(item, of) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint if isinstance(hint, type) else object)


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in UNIONS:
        options = [_describe(option) for option in get_args(hint)]
        return " or ".join(option for option in options if not option.startswith("<"))  # a YAML can't hold a Tensor
    if origin is Literal:
        return " or ".join(str(option) for option in get_args(hint))
    if origin in SEQUENCES:
        return f"a list of {_describe(get_args(hint)[0])}s".replace("a list of a ", "a list of ").replace("of an ", "of ")
    return NAMES.get(hint, str(hint))


def _as_written(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
