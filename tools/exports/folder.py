"""A folder as timm and the Hugging Face Hub have it: model.safetensors, config.json, and a model card as README.md.

Where timm builds the same network, the weights have timm's names, and timm loads the folder: that is tried before it is said. Any
other folder is loaded by this project.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from engine.config.errors import RunError
from engine.run.checkpoint import save_tensors
from models import create_model
from models.loading.factory import TIMM
from tools.exports.exportable import Exportable, complete, expect_equal

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
KNOWN_TO_TIMM = ("layers", "depth", "patch_size")  # where the constructors of this project and of timm both take them


@dataclass(frozen=True)
class Named:
    """A network under the names that its loader knows."""

    architecture: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    layers: dict[str, Any]  # which of them read the image and give the classes


def write_folder(exportable: Exportable, path: Path, card: Callable[[bool], str]) -> str:
    """`card` is asked for the model card, and told whether timm loads the folder. Gives what there is to say of it."""
    batches = [exportable.normalize(exportable.images(n)) for n in (1, 5)]

    def expect(loaded: nn.Module) -> str:
        return expect_equal(loaded.eval(), exportable.model, batches, str(path))

    with complete(path) as folder:
        named = _in_timm(exportable)
        if named is not None:
            _write(folder, exportable, named)
        is_of_timm = named is not None and _loads_in_timm(folder, expect)
        if not is_of_timm:
            _write(folder, exportable, _in_this_project(exportable))
        checked = expect(_load(folder, exportable))
        (folder / CARD).write_text(card(is_of_timm))
    loaders = f"timm (as {named.architecture}) and this project load it" if is_of_timm else "this project loads it, timm can't"
    return f"{loaders}; {checked}"


def _write(folder: Path, exportable: Exportable, named: Named) -> None:
    separate = {name: tensor.detach().clone().contiguous() for name, tensor in named.weights.items()}  # tied ones too
    save_tensors(separate, folder / WEIGHTS, {"format": "pt"})
    size = [exportable.channels, exportable.img_size, exportable.img_size]
    n_classes = len(exportable.classes)
    config = {
        "architecture": named.architecture,
        "num_classes": n_classes,
        "num_features": exportable.model.num_features,
        "label_names": list(exportable.classes),
        "model_args": named.arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": size,
            "interpolation": exportable.interpolation,
            "crop_pct": exportable.crop_pct,
            "crop_mode": "center",
            "mean": list(exportable.mean),
            "std": list(exportable.std),
            "num_classes": n_classes,
            **named.layers,
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _in_this_project(exportable: Exportable) -> Named:
    model = exportable.model
    layers = {"first_conv": model.FIRST_CONV, "classifier": model.CLASSIFIERS[0]} if hasattr(model, "FIRST_CONV") else {}
    return Named(exportable.name, exportable.arguments, model.state_dict(), layers)


def _load(folder: Path, exportable: Exportable) -> nn.Module:
    sizes = {"n_classes": len(exportable.classes), "in_channels": exportable.channels, "img_size": exportable.built_for}
    return create_model(exportable.name, **sizes, **exportable.arguments, pretrained=folder)


# timm


def _in_timm(exportable: Exportable) -> Named | None:
    """None where timm has no network of this name, or none that takes these arguments."""
    name = getattr(exportable.model, "TIMM_NAMES", {}).get(exportable.name, exportable.name.removeprefix(TIMM))
    if not timm.is_model(name):
        return None
    is_its_own = exportable.name.startswith(TIMM)
    arguments = {key: value for key, value in exportable.arguments.items() if is_its_own or key in KNOWN_TO_TIMM}
    if exportable.channels != 3:
        arguments["in_chans"] = exportable.channels
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        arguments["img_size"] = exportable.built_for
    try:
        model = timm.create_model(name, num_classes=len(exportable.classes), **arguments)
    except TypeError:
        return None
    layers = {key: model.pretrained_cfg.get(key) for key in ("first_conv", "classifier", "fixed_input_size")}
    return Named(name, arguments, _under_names_of(model, exportable.model), layers)


def _under_names_of(of_timm: nn.Module, own: nn.Module) -> dict[str, Tensor]:
    """The weights of `own` under the names that its way to read timm's weights starts from."""
    theirs = of_timm.state_dict()
    names = {id(tensor): name for name, tensor in theirs.items()}
    read = own.convert_pretrained(theirs) if hasattr(own, "convert_pretrained") else theirs
    return {names.get(id(read.get(name)), name): tensor for name, tensor in own.state_dict().items()}


def _loads_in_timm(folder: Path, expect: Callable[[nn.Module], str]) -> bool:
    """Whether timm builds the network that this is, which nothing else says: other stems and paddings have the same names."""
    try:
        expect(timm.create_model(f"local-dir:{folder}", pretrained=True))
    except (RuntimeError, KeyError, RunError):  # weights that it misses or doesn't know, or other logits
        return False
    return True
