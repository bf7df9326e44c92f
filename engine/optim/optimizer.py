"""Optimizers by name: every class of torch.optim, every optimizer of timm."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.config.errors import ConfigError
from engine.config.schema import OptimConfig
from engine.config.suggestions import nearest
from engine.optim.layers import classifier, layers

# torch's Muon accepts matrices only; timm's flattens the weights of convolutions and updates norms and biases by AdamW
TIMM_INSTEAD_OF_TORCH = {"muon"}
FALLBACK = "fallback_lr_scale"  # an argument of optimizers that leave some parameters to another one: timm's Muon, to AdamW
CANNOT_RUN = {
    "lbfgs": "it evaluates the loss several times per update, on the same batch; SGD and AdamW don't",
    "sparseadam": "it needs sparse gradients, and those of images are dense; Adam accepts them",
    "adahessian": "it differentiates the gradients again, and the loop does not keep their graph; AdaBelief and AdamW need none",
}


def make_optimizer(optim: OptimConfig, lr: float, model: nn.Module) -> tuple[Optimizer, tuple[str, ...]]:
    """Return the optimizer of all parameters that are not frozen, and the names of its options that the config sets.

    Every group has the base learning rate `lr` as `initial_lr`, and its own share of it as `lr_scale`.
    """
    constructor = find_optimizer(optim.type)
    parameters = inspect.signature(constructor).parameters
    given = {"lr": lr, "weight_decay": optim.weight_decay, "momentum": optim.momentum, **optim.args}
    arguments = {name: value for name, value in given.items() if name in parameters}
    groups = parameter_groups(model, optim, has_fallback=FALLBACK in parameters)
    try:
        optimizer = constructor(groups, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError("train.optim", f"{optim.type} refuses these arguments: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
        group["lr"] = group["initial_lr"] * group["lr_scale"]
    return optimizer, (*arguments, "initial_lr", "lr_scale")


def parameter_groups(model: nn.Module, optim: OptimConfig, *, has_fallback: bool = False) -> list[dict[str, Any]]:
    """Group parameters by learning rate and weight decay.

    An optimizer that `has_fallback` uses it for the classifier too, as Muon's author advises
    (https://kellerjordan.github.io/posts/muon/); it chooses further ones by their shapes.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}  # learning rates as shares of train.optim.lr
    if optim.layer_decay is not None:
        try:
            layer_of = layers(model)
        except ValueError as error:
            raise ConfigError("train.optim.layer_decay", str(error)) from error
        last = max(layer_of.values())
        scales = {name: optim.layer_decay ** (last - layer) for name, layer in layer_of.items()}
    if optim.bias_lr is not None:
        for name, parameter in model.named_parameters():
            scales[name] *= optim.bias_lr / optim.lr if parameter.ndim <= 1 else 1
    if optim.head_lr is not None:
        try:
            scales |= dict.fromkeys(classifier(model), optim.head_lr / optim.lr)
        except ValueError as error:
            raise ConfigError("train.optim.head_lr", str(error)) from error
    undecayed: set[str] = set()
    if not optim.decay_norm_and_bias:
        undecayed = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
        for prefix, module in model.named_modules():  # what the model or a module names; patterns as in timm
            for pattern in module.no_weight_decay() if hasattr(module, "no_weight_decay") else ():
                full = f"{prefix}.{pattern}" if prefix else pattern
                undecayed |= {name for name, _ in model.named_parameters() if fnmatchcase(name, full)}
    left_to_fallback: set[str] = set()
    if has_fallback:
        with suppress(ValueError):  # the model doesn't say which layer is its classifier
            left_to_fallback = set(classifier(model))
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = scales[name], name in undecayed, name in left_to_fallback
            group = groups.setdefault(key, {"params": [], "lr_scale": scales[name]})
            group["params"].append(parameter)
            if name in undecayed:
                group["weight_decay"] = 0.0
            if name in left_to_fallback:
                group["use_fallback"] = True
    return list(groups.values())


@cache
def find_optimizer(name: str) -> Callable[..., Optimizer]:
    """Return torch's optimizer of that name, otherwise timm's, or raise ValueError. (timm's `sgd` is Nesterov's.)"""
    plain = name.lower()
    if plain in CANNOT_RUN:
        raise ValueError(f"{name} can't run in this loop: {CANNOT_RUN[plain]}")
    if plain in _of_torch():
        return _of_torch()[plain]
    from timm.optim import get_optimizer_class, list_optimizers

    if plain in list_optimizers():
        try:
            return get_optimizer_class(plain, bind_defaults=True)
        except (AssertionError, ImportError) as error:  # bitsandbytes or apex, not installed or without a GPU
            raise ValueError(f"timm can't provide {name!r} here: {error}") from error
    if plain in _classes_of_timm():
        return _classes_of_timm()[plain]
    known = [*(cls.__name__ for cls in (_of_torch() | _classes_of_timm()).values()), *map(str, list_optimizers())]
    raise ValueError(f"unknown optimizer {name!r}: {nearest(name, known) or 'any of torch.optim or timm will do'}")


@cache
def _of_torch() -> dict[str, type[Optimizer]]:
    found = {name.lower(): value for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    left_out = {"optimizer", *CANNOT_RUN, *TIMM_INSTEAD_OF_TORCH}
    return {name: cls for name, cls in found.items() if issubclass(cls, Optimizer) and name not in left_out}


@cache
def _classes_of_timm() -> dict[str, type[Optimizer]]:
    """Return timm's optimizers by class name, which may differ from the registered name: NvNovoGrad is novograd."""
    from timm.optim import get_optimizer_class, list_optimizers

    names = list_optimizers(exclude_filters=["bnb*", "fused*", *CANNOT_RUN])  # bnb and fused need packages and a GPU
    classes: list[Any] = [get_optimizer_class(str(name), bind_defaults=False) for name in names]
    return {cls.__name__.lower(): cls for cls in classes}


@cache
def arguments_of_any_optimizer() -> frozenset[str]:
    constructors = [*_of_torch().values(), *_classes_of_timm().values()]
    names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    return frozenset(names - {"params"})
