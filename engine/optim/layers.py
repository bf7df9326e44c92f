"""The layers and stages of a model, from the stem to the classifier, and how to freeze some of them."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

TRUNK = "trunk"


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the named parts, and return the names of their parameters.

    A pattern is `trunk` (all but the classifier), a glob over the names of modules and parameters (`layer1`, `conv1*`), or one of
    `stages(model)`. BatchNorm's running statistics freeze with its parameters. Call it before the model is wrapped, copied or
    compiled, and after SyncBatchNorm has replaced BatchNorm.
    """
    frozen = {name for pattern in patterns for name in _matching(model, pattern)}
    parameters = dict(model.named_parameters())
    if frozen and len(frozen) == len(parameters):
        raise ValueError(f"{', '.join(patterns)} would freeze all of {type(model).__name__}, and nothing would be trained")
    for name in frozen:
        parameters[name].requires_grad_(False)
    for module in list(_frozen_statistics(model)):
        module.eval()
        # Replacing the module (timm's FrozenBatchNorm2d) would change names in checkpoints, and eval() in the loop be undone
        # by the next model.train(). A partial, unlike a bound method, is copied and pickled with its module.
        module.train = partial(_stay_in_eval, module)  # type: ignore[method-assign]  # see above
    return [name for name in parameters if name in frozen]


def classifier(model: nn.Module) -> list[str]:
    """Return the parameters of the layers that output the classes; for a model around a backbone, all outside the backbone."""
    prefix, backbone = _backbone(model)
    names = [name for name, _ in model.named_parameters()]
    if backbone is not None and backbone is not model:
        return [name for name in names if not name.startswith(prefix)]
    modules = getattr(model, "CLASSIFIERS", None) or (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    found = [name for name in names if _within(name, (modules,) if isinstance(modules, str) else modules)]
    if not found:
        raise ValueError(f"{type(model).__name__} doesn't say which of its layers is the classifier")
    return found


def layers(model: nn.Module) -> dict[str, int]:
    """Return the number of each parameter's layer: 0 is the stem, then block after block; the last is the head.

    Layers are counted as in timm, so that a layer decay means the same for resnet18 and timm/resnet18.
    """
    prefix, backbone = _backbone(model)
    if backbone is None:
        raise ValueError(f"{type(model).__name__} has no layers to count: neither forward_stages nor group_matcher")
    of_backbone = _layers_of_family(backbone) if hasattr(backbone, "forward_stages") else _groups_of_timm(backbone, coarse=False)
    head = max(of_backbone.values()) + 1
    numbers = {f"{prefix}{name}": layer for name, layer in of_backbone.items()}
    return {name: numbers.get(name, head) for name, _ in model.named_parameters()}


def stages(model: nn.Module) -> dict[str, list[str]]:
    """Return the parameters of `stem`, `stage1`, ... in order; only the stem if modules of the model have such names."""
    prefix, backbone = _backbone(model)
    if backbone is None:
        return {}
    if hasattr(backbone, "forward_stages"):
        modules = [name for name, _ in backbone.named_modules()]  # a stage ends with the module that outputs its feature map
        ends = [max(i for i, name in enumerate(modules) if _within(name, [info["module"]])) for info in backbone.feature_info]
        layer_of = _layers_of_family(backbone)  # the stem is the first layer
        positions = {name: modules.index(name.rpartition(".")[0]) for name in layer_of}
        stage_of = {name: 1 + bisect_left(ends, positions[name]) if layer else 0 for name, layer in layer_of.items()}
    else:
        stage_of = _groups_of_timm(backbone, coarse=True)
        head = max(stage_of.values()) if backbone is model else None
        stage_of = {name: stage for name, stage in stage_of.items() if stage != head}
    ambiguous = any(re.fullmatch(r"stage\d+", name) for name, _ in backbone.named_children())
    found = {}
    for i, stage in enumerate(sorted(set(stage_of.values()))):
        if i == 0 or not ambiguous:
            found[f"stage{i}" if i else "stem"] = [f"{prefix}{name}" for name in stage_of if stage_of[name] == stage]
    return found


def _matching(model: nn.Module, pattern: str) -> set[str]:
    """Return the parameters that a pattern matches. The model's own names take precedence over those of the stages."""
    names = [name for name, _ in model.named_parameters()]
    if pattern == TRUNK:
        return set(names) - set(classifier(model))
    modules = [name for name, _ in model.named_modules() if name]
    chosen = {name for name in (*modules, *names) if fnmatchcase(name, pattern)}
    found = {name for name in names if _within(name, chosen)} or set(stages(model).get(pattern, ()))
    if not found:
        parts = [TRUNK, *stages(model)]
        near = get_close_matches(pattern, [*parts, *modules, *names], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(parts)} and its modules' names"
        raise ValueError(f"{pattern!r} matches no parameter of {type(model).__name__}; {hint}")
    return found


def _within(name: str, modules: Sequence[str] | set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _backbone(model: nn.Module) -> tuple[str, Any]:
    """Return the prefix of names and the network with stages: the model itself, or the backbone of a task's model."""
    for name, module in model.named_modules():
        if hasattr(module, "forward_stages") or hasattr(module, "group_matcher"):
            return (f"{name}." if name else ""), module
    return "", None


def _groups_of_timm(backbone: Any, coarse: bool) -> dict[str, int]:
    from timm.models import group_parameters

    return group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True)


def _layers_of_family(backbone: Any) -> dict[str, int]:
    """Count layers, without the head: the members of a Sequential one by one; any other module with weights is one layer."""
    layer_of = {name: 0 for name, _ in backbone.named_parameters(recurse=False)}  # a class token, a position embedding
    layer = -1
    for name, module in _in_sequence(backbone):
        parameters = dict(module.named_parameters(prefix=name))
        if not parameters or _within(name, backbone.HEAD):
            continue
        if layer < 0 or any(parameter.ndim > 1 for parameter in parameters.values()):  # a norm belongs to the layer before it
            layer += 1
        layer_of |= dict.fromkeys(parameters, layer)
    return layer_of


def _in_sequence(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential):
            yield from _in_sequence(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _frozen_statistics(model: nn.Module) -> Iterator[nn.Module]:
    """Yield norms with running statistics and only frozen parameters; one without parameters follows the module around it."""
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is None:
            continue
        around = module
        while name and next(around.parameters(), None) is None:
            name = name.rpartition(".")[0]
            around = model.get_submodule(name)
        if not any(parameter.requires_grad for parameter in around.parameters()):
            yield module


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
