"""A folder as timm and the Hugging Face Hub have it: model.safetensors, config.json, and a model card (README.md).

If timm has the same network, the weights get timm's names, so that timm loads the folder. This project loads any such folder.
timm's save_for_hf is not used: it would copy the license and the tag of the published weights into config.json.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from engine.config.errors import RunError
from engine.run.checkpoint import save_tensors
from models import create_model
from models.loading.factory import TIMM
from tools.exports.exportable import Exportable, complete, expect_equal

SHARED_ARGUMENTS = ("layers", "depth", "patch_size")  # the same in the constructors of this project and of timm


def write_folder(exportable: Exportable, path: Path, make_card: Callable[[bool], str]) -> str:
    """Write the folder, check that it loads, and return a summary. `make_card(in_timm)` returns the model card."""
    batches = [exportable.normalize(exportable.images(n)) for n in (1, 5)]
    with complete(path) as folder:
        architecture = _write_for_timm(exportable, folder, batches)
        if architecture is None:
            own: Any = exportable.model
            layers = {"first_conv": own.FIRST_CONV, "classifier": own.CLASSIFIERS[0]} if hasattr(own, "FIRST_CONV") else {}
            _write(exportable, folder, exportable.name, exportable.arguments, own.state_dict(), layers)
        loaded = create_model(exportable.name, pretrained=folder, **exportable.all_arguments)
        difference = expect_equal(loaded.eval(), exportable.model, batches, str(path))
        (folder / "README.md").write_text(make_card(architecture is not None))
    loaders = f"timm (as {architecture}) and this project load it" if architecture else "this project loads it, timm can't"
    return f"{loaders}; {difference}"


def _write_for_timm(exportable: Exportable, folder: Path, batches: list[Tensor]) -> str | None:
    """Write the folder for timm, and return timm's name of the architecture; None if timm can't build the same network."""
    own: Any = exportable.model
    from_timm = exportable.name.startswith(TIMM)
    name = getattr(own, "TIMM_NAMES", {}).get(exportable.name, exportable.name.removeprefix(TIMM))
    if not timm.is_model(name):
        return None
    arguments = {key: value for key, value in exportable.arguments.items() if from_timm or key in SHARED_ARGUMENTS}
    if exportable.channels != 3:
        arguments["in_chans"] = exportable.channels
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        arguments["img_size"] = exportable.built_for
    try:
        model: Any = timm.create_model(name, num_classes=len(exportable.classes), **arguments)
    except TypeError:  # an argument that timm's constructor lacks
        return None

    # The model may rename timm's weights when it loads them; invert this.
    theirs = model.state_dict()
    name_of = {id(tensor): key for key, tensor in theirs.items()}
    renamed = getattr(own, "convert_pretrained", dict)(theirs)
    weights = {name_of.get(id(renamed.get(key)), key): tensor for key, tensor in own.state_dict().items()}

    layers = {key: model.pretrained_cfg.get(key) for key in ("first_conv", "classifier", "fixed_input_size")}
    _write(exportable, folder, name, arguments, weights, layers)
    try:  # only loading it tells: other stems and other paddings have the same names
        expect_equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), own, batches, name)
    except (RuntimeError, KeyError, RunError):  # missing or unknown weights, or other logits
        return None
    return name


def _write(
    exportable: Exportable, folder: Path, name: str, arguments: dict[str, Any], weights: dict[str, Tensor], layers: dict[str, Any]
) -> None:
    unshared = {key: tensor.detach().clone().contiguous() for key, tensor in weights.items()}  # safetensors rejects tied weights
    save_tensors(unshared, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architecture": name,
        "num_classes": len(exportable.classes),
        "num_features": exportable.model.num_features,
        "label_names": exportable.classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [exportable.channels, exportable.img_size, exportable.img_size],
            "interpolation": exportable.interpolation,
            "crop_pct": exportable.crop_pct,
            "crop_mode": "center",
            "mean": exportable.mean,
            "std": exportable.std,
            "num_classes": len(exportable.classes),
            **layers,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
