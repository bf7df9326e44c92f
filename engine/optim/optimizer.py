"""Optimizers by name: every class of torch.optim, every optimizer of timm."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.config.arguments import check_arguments, nearest
from engine.config.errors import ConfigError
from engine.config.resolve import LoadedConfig
from engine.config.schema import OptimConfig
from engine.optim.layers import classifier, layers
from engine.optim.schedule import base_lr

log = logging.getLogger(__name__)

# torch's Muon refuses all but matrices; timm's flattens the weights of convolutions and updates norms and biases by AdamW
TIMM_INSTEAD_OF_TORCH = {"muon"}
FALLBACK = "fallback_lr_scale"  # the argument of an optimizer that leaves some parameters to another: timm's Muon, to AdamW
CANNOT_RUN = {
    "lbfgs": "it evaluates the loss several times per update, on the same batch; SGD and AdamW don't",
    "sparseadam": "it takes sparse gradients only, and those of images are dense; Adam takes them",
    "adahessian": "it differentiates the gradients again, and the loop doesn't keep their graph; AdaBelief and AdamW do without",
}


def make_optimizer(config: LoadedConfig, model: nn.Module) -> tuple[Optimizer, tuple[str, ...]]:
    """The optimizer of what is not frozen, and the names of its options that the config decides.

    Every group has the base learning rate as `initial_lr`, and what its own is of that as `lr_scale`.
    """
    optim = config.train.optim
    constructor = find_optimizer(optim.type, config)
    arguments, left_out = optimizer_arguments(config, constructor)
    for name in left_out:
        origin = config.origin(f"train.optim.{name}").name
        log.warning("train.optim.%s (%s) is left out: %s doesn't take it", name, origin, optim.type)
    groups = parameter_groups(model, optim, has_fallback=FALLBACK in inspect.signature(constructor).parameters)
    try:
        optimizer = constructor(groups, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"train.optim: {optim.type} refuses these arguments: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])
        group["lr"] = group["initial_lr"] * group["lr_scale"]
    return optimizer, (*arguments, "initial_lr", "lr_scale")


def parameter_groups(model: nn.Module, optim: OptimConfig, *, has_fallback: bool = False) -> list[dict[str, Any]]:
    """One group for all parameters of the same learning rate and weight decay.

    An optimizer that `has_fallback` takes it for the classifier too, as Muon's author advises
    (https://kellerjordan.github.io/posts/muon/); which others it does by their shapes.
    """
    scales = _lr_scales(model, optim)
    undecayed = set() if optim.decay_norm_and_bias else _undecayed(model)
    left_to_fallback = _classifier_if_known(model) if has_fallback else set()
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


def _classifier_if_known(model: nn.Module) -> set[str]:
    try:
        return set(classifier(model))
    except ValueError:
        return set()


def _lr_scales(model: nn.Module, optim: OptimConfig) -> dict[str, float]:
    """What the learning rate of each parameter is, as a part of train.optim.lr."""
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    if optim.layer_decay is not None:
        try:
            layer_of = layers(model)
        except ValueError as error:
            raise ConfigError(f"train.optim.layer_decay: {error}") from error
        last = max(layer_of.values())
        scales = {name: optim.layer_decay ** (last - layer) for name, layer in layer_of.items()}
    if optim.bias_lr is not None:
        for name, parameter in model.named_parameters():
            scales[name] *= optim.bias_lr / optim.lr if parameter.ndim <= 1 else 1
    if optim.head_lr is not None:
        try:
            scales |= dict.fromkeys(classifier(model), optim.head_lr / optim.lr)
        except ValueError as error:
            raise ConfigError(f"train.optim.head_lr: {error}") from error
    return scales


def _undecayed(model: nn.Module) -> set[str]:
    """Norms, biases, and what the model or a part of it names; the names may be patterns, as timm's are."""
    names = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    for prefix, module in model.named_modules():
        for pattern in module.no_weight_decay() if hasattr(module, "no_weight_decay") else ():
            full = f"{prefix}.{pattern}" if prefix else pattern
            names |= {name for name, _ in model.named_parameters() if fnmatchcase(name, full)}
    return names


def find_optimizer(name: str, config: LoadedConfig) -> Callable[..., Optimizer]:
    """torch's own where it has the name, else timm's; in timm `sgd` alone would be Nesterov's."""
    plain = name.lower()
    origin = config.origin("train.optim.type").name
    if plain in CANNOT_RUN:
        raise ConfigError(f"train.optim.type: {name} is no optimizer for this loop ({origin}): {CANNOT_RUN[plain]}")
    if plain in _of_torch():
        return _of_torch()[plain]
    from timm.optim import get_optimizer_class, list_optimizers

    if plain in list_optimizers():
        try:
            return get_optimizer_class(plain, bind_defaults=True)
        except (AssertionError, ImportError) as error:  # bitsandbytes or apex, not installed or without a GPU
            raise ConfigError(f"train.optim.type: timm can't give {name!r} here: {error} ({origin})") from error
    if plain in _classes_of_timm():
        return _classes_of_timm()[plain]
    known = [*(cls.__name__ for cls in (_of_torch() | _classes_of_timm()).values()), *list_optimizers()]
    raise ConfigError(f"train.optim.type: no optimizer {name!r} in torch.optim or timm ({origin}){nearest(name, known)}")


def optimizer_arguments(config: LoadedConfig, constructor: Callable[..., Optimizer]) -> tuple[dict[str, Any], list[str]]:
    """The arguments that this optimizer takes, and the names of those that only others take. One that none takes is an error."""
    optim = config.train.optim
    given = {"lr": base_lr(config.train), "weight_decay": optim.weight_decay, "momentum": optim.momentum, **optim.args}
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
            of_config = (field.name for field in fields(optim))
            hint = nearest(name, [*of_config, *takes, *sorted(_arguments_of_any())], "train.optim.")
            raise ConfigError(f"train.optim.{name}: no optimizer takes it{said}{hint}")
    return arguments, left_out


@cache
def _of_torch() -> dict[str, type[Optimizer]]:
    found = {name.lower(): value for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    left_out = {"optimizer", *CANNOT_RUN, *TIMM_INSTEAD_OF_TORCH}
    return {name: cls for name, cls in found.items() if issubclass(cls, Optimizer) and name not in left_out}


@cache
def _classes_of_timm() -> dict[str, type[Optimizer]]:
    """By the name of the class, which may not be the registered one: NvNovoGrad is novograd."""
    from timm.optim import get_optimizer_class, list_optimizers

    names = list_optimizers(exclude_filters=["bnb*", "fused*", *CANNOT_RUN])  # bnb and fused need packages and a GPU
    classes = [get_optimizer_class(name, bind_defaults=False) for name in names]
    return {cls.__name__.lower(): cls for cls in classes}


@cache
def _arguments_of_any() -> set[str]:
    constructors = [*_of_torch().values(), *_classes_of_timm().values()]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters} - {"params"}
