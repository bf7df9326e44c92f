"""Optimizers by name: every class of torch.optim, every optimizer of timm."""

import inspect
import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.arguments import check_arguments, nearest
from engine.config import LoadedConfig
from engine.errors import ConfigError

log = logging.getLogger(__name__)

NEED_A_CLOSURE = {"lbfgs"}


def make_optimizer(config: LoadedConfig, parameters: Iterable[nn.Parameter]) -> tuple[Optimizer, tuple[str, ...]]:
    """The optimizer, and the names of its options that the config decides."""
    optim = config.train.optim
    constructor = find_optimizer(optim.type, config)
    arguments, left_out = optimizer_arguments(config, constructor)
    for name in left_out:
        origin = config.origin(f"train.optim.{name}").name
        log.warning("train.optim.%s (%s) is left out: %s doesn't take it", name, origin, optim.type)
    try:
        optimizer = constructor(list(parameters), **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"train.optim: {optim.type} refuses these arguments: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] = float(group["lr"])
    return optimizer, (*arguments, "initial_lr")


def find_optimizer(name: str, config: LoadedConfig) -> Callable[..., Optimizer]:
    """torch's own where it has the name, else timm's; in timm `sgd` alone would be Nesterov's."""
    plain = name.lower()
    if plain in _of_torch() and plain not in NEED_A_CLOSURE:
        return _of_torch()[plain]
    from timm.optim import get_optimizer_class, list_optimizers

    origin = config.origin("train.optim.type").name
    if plain in list_optimizers():
        try:
            return get_optimizer_class(plain, bind_defaults=True)
        except (AssertionError, ImportError) as error:  # bitsandbytes or apex, not installed or without a GPU
            raise ConfigError(f"train.optim.type: timm can't give {name!r} here: {error} ({origin})") from error
    known = [*(cls.__name__ for cls in _of_torch().values()), *list_optimizers()]
    raise ConfigError(f"train.optim.type: no optimizer {name!r} in torch.optim or timm ({origin}){nearest(name, known)}")


def optimizer_arguments(config: LoadedConfig, constructor: Callable[..., Optimizer]) -> tuple[dict[str, Any], list[str]]:
    """The arguments that this optimizer takes, and the names of those that only others take. One that none takes is an error."""
    optim = config.train.optim
    given = {"lr": optim.lr, "weight_decay": optim.weight_decay, "momentum": optim.momentum, **optim.args}
    takes = inspect.signature(constructor).parameters
    arguments, left_out = {}, []
    for name, value in given.items():
        origin = config.origins.get(f"train.optim.{name}")
        if name in takes:
            check_arguments({name: value}, inspect.signature(constructor), "train.optim", config)
            arguments[name] = value
        elif name in _arguments_of_any():
            left_out += [name] if origin is not None else []
        else:
            said = f" ({origin.name})" if origin else ""
            hint = nearest(name, [*takes, *sorted(_arguments_of_any())], "train.optim.")
            raise ConfigError(f"train.optim.{name}: no optimizer takes it{said}{hint}")
    return arguments, left_out


@cache
def _of_torch() -> dict[str, type[Optimizer]]:
    found = {name: value for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    return {name.lower(): cls for name, cls in found.items() if issubclass(cls, Optimizer) and cls is not Optimizer}


@cache
def _arguments_of_any() -> set[str]:
    from timm.optim import get_optimizer_class, list_optimizers

    of_timm = list_optimizers(exclude_filters=["bnb*", "fused*"])  # these need packages and a GPU
    constructors = [*_of_torch().values(), *(get_optimizer_class(name, bind_defaults=False) for name in of_timm)]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters} - {"params"}
