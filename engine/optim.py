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


def make_optimizer(config: LoadedConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    optim = config.train.optim
    constructor = find_optimizer(optim.type, config)
    arguments = optimizer_arguments(config, constructor)
    try:
        optimizer = constructor(list(parameters), **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"train.optim: {optim.type} refuses these arguments: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] = float(group["lr"])
    return optimizer


def find_optimizer(name: str, config: LoadedConfig) -> Callable[..., Optimizer]:
    """torch's own where it has the name, else timm's; in timm `sgd` alone would be Nesterov's."""
    plain = name.lower()
    if plain in _of_torch() and plain not in NEED_A_CLOSURE:
        return _of_torch()[plain]
    from timm.optim import get_optimizer_class, list_optimizers

    if plain in list_optimizers():
        return get_optimizer_class(plain, bind_defaults=True)
    origin = config.origin("train.optim.type").name
    known = [*(cls.__name__ for cls in _of_torch().values()), *list_optimizers()]
    raise ConfigError(f"train.optim.type: no optimizer {name!r} in torch.optim or timm ({origin}){nearest(name, known)}")


def optimizer_arguments(config: LoadedConfig, constructor: Callable[..., Optimizer]) -> dict[str, Any]:
    """The arguments that this optimizer takes. One that only others take is dropped; one that none takes is an error."""
    optim = config.train.optim
    given = {"lr": optim.lr, "weight_decay": optim.weight_decay, "momentum": optim.momentum, **optim.args}
    takes = inspect.signature(constructor).parameters
    arguments = {}
    for name, value in given.items():
        origin = config.origins.get(f"train.optim.{name}")
        if name in takes:
            check_arguments({name: value}, inspect.signature(constructor), "train.optim", config)
            arguments[name] = value
        elif name in _arguments_of_any():
            if origin is not None:
                log.warning("train.optim.%s (%s) is left out: %s doesn't take it", name, origin.name, optim.type)
        else:
            said = f" ({origin.name})" if origin else ""
            raise ConfigError(f"train.optim.{name}: no optimizer takes it{said}{nearest(name, [*takes, 'type'], 'train.optim.')}")
    return arguments


@cache
def _of_torch() -> dict[str, type[Optimizer]]:
    found = {name: value for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    return {name.lower(): cls for name, cls in found.items() if issubclass(cls, Optimizer) and cls is not Optimizer}


@cache
def _arguments_of_any() -> set[str]:
    from timm.optim import get_optimizer_class, list_optimizers

    constructors = [*_of_torch().values(), *(get_optimizer_class(name, bind_defaults=False) for name in list_optimizers())]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters} - {"params"}
