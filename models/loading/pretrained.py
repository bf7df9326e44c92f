"""Load published weights into a model that may have other classes, other channels or another image size.

Files may come from torchvision, timm or this project. Only tensors and plain values are unpickled: a file that would run code is
refused. The backbone must match tensor by tensor; tensors of the head that don't fit are skipped, and named.
"""

import logging
import socket
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.loading.features import layer_names
from models.loading.files import MalformedFile, linked_folder, open_regular, read_json
from models.loading.tensors import ForbiddenContent, check_safetensors_header, load_pickled

# timm and torchvision's models are imported where they are needed: they take a second to start.
log = logging.getLogger(__name__)

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # averaged weights first: training scripts report theirs
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DDP and averaging, torch.compile, Lightning
TIMEOUT = 5.0  # seconds without an answer from the network
PLACES = ("", "model.safetensors")  # the file itself, or in a checkpoint folder


def load_pretrained(model: nn.Module, name: str, source: str | Path | bool) -> dict[str, int]:
    """Load weights into `model` from `source`: a file, or true for the published ones.

    Return the tensors of the head that were skipped because they are for other classes, each with its length.
    """
    if isinstance(source, bool):
        weights, origin = _published(model, name), f"the published weights of {name}"
        set_as_published(model)
    else:
        weights, origin = read_weights(Path(source)), str(source)
    try:
        skipped, initial, adapted = _load_matching(model, weights)
    except ValueError as error:
        raise ValueError(f"{name} can't load {origin}: {error}") from error
    notes = {"skipped": skipped, "missing, left at their initial values": initial, "adapted": adapted}
    phrases = [f"weights from {origin}", *(f"{note}: {', '.join(keys)}" for note, keys in notes.items() if keys)]
    log.log(logging.WARNING if skipped or initial else logging.INFO, "; ".join(phrases))
    return skipped


def set_as_published(model: nn.Module) -> None:
    """Set the attributes that the published weights were trained with."""
    for attribute, value in getattr(model, "PUBLISHED_WITH", {}).items():
        setattr(model, attribute, value)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a .safetensors or .pth file, a checkpoint or a run folder, without wrappers and prefixes."""
    path = path.expanduser()
    path = linked_folder(path) or path
    if best := linked_folder(path / "ckpt" / "best"):
        path = best
    file = next((path / place for place in PLACES if (path / place).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: {'no model.safetensors in this folder' if path.is_dir() else 'no such file'}")
    content = _read(file)
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if isinstance(content, dict):
        content.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    entries = content.items() if isinstance(content, dict) else ()
    if not entries or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries):
        raise ValueError(f"{file} holds no state dict (looked under {', '.join(WRAPPERS)} and at the top)")
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in content)), None):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content


def _read(file: Path) -> Any:
    try:
        with open_regular(file) as opened:
            if file.suffix != ".safetensors":
                return load_pickled(opened)
            check_safetensors_header(opened.read(8))
        return load_file(file)
    except ForbiddenContent as error:
        problem = f"is refused: it holds more than tensors and plain values ({error}), and loading it could run code"
        raise ValueError(f"{file} {problem}") from error
    except Exception as error:  # damaged and foreign files raise errors of many types
        reason = str(error).partition("\n")[0].partition(". ")[0] or "it ends too early"
        problem = f"can't be read as weights; is it damaged, cut short, or another kind of file? ({reason})"
        raise ValueError(f"{file} {problem}") from error


def _load_matching(model: nn.Module, given: dict[str, Tensor]) -> tuple[dict[str, int], list[str], list[str]]:
    """Load the weights that fit the model.

    Return the tensors of the file that were skipped (with their lengths), the tensors of the model that keep their initial
    values, and those that were adapted. Anything but the head that doesn't match raises ValueError.
    """
    own, weights = model.state_dict(), _convert(model, given)
    for key in (f"{layer}.weight" for layer in layer_names(model, "FIRST_CONV", "first_conv")):
        if key in weights and key in own:
            weights = {**weights, key: _to_channels(weights[key], own[key].shape)}

    of_head = tuple(f"{module}." for module in layer_names(model, "HEAD", "classifier"))
    in_head = {key for key in own.keys() | weights.keys() if key.startswith(of_head)}
    reshaped = [key for key, value in weights.items() if key in own and own[key].shape != value.shape]
    replaced = {key.rpartition(".")[0] for key in reshaped if key in in_head}  # a layer is loaded as a whole or not at all
    of_others = [key for key in weights if key in in_head and (key not in own or key.rpartition(".")[0] in replaced)]
    skipped = {key: len(weights[key]) if weights[key].ndim else 0 for key in of_others}
    fitting = {key: value for key, value in weights.items() if key not in skipped and key not in reshaped}
    missing, unexpected = model.load_state_dict(fitting, strict=False)

    shapes = [(key, tuple(weights[key].shape), tuple(own[key].shape)) for key in reshaped if key not in skipped]
    problems = [f"{key} is {theirs} in the file and {ours} in the model" for key, theirs, ours in shapes]
    problems += [f"{key} is missing" for key in missing if key not in in_head and key not in reshaped]
    problems += [f"{key} is unknown" for key in unexpected]
    if problems:
        raise ValueError("; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else ""))
    initial = [key for key in missing if key in in_head and key not in skipped]
    adapted = [key for key in fitting if key in given and given[key].shape != fitting[key].shape]
    return skipped, initial, adapted


def _convert(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply the family's conversion of its published files: older or foreign names, another image size."""
    convert: Any = getattr(model, "convert_pretrained", None)
    if convert is not None:
        return convert(weights)
    timm_filter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if timm_filter is None:
        return weights
    try:
        return timm_filter(weights, model)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from error


def _to_channels(weight: Tensor, shape: torch.Size) -> Tensor:
    """Adapt a first convolution to the image's channels.

    One channel gets the sum over the colors; more get the colors in turn, scaled so that activations keep their size.
    """
    if weight.ndim != 4 or weight.shape[1] == shape[1]:
        return weight
    if shape[1] == 1:
        return weight.sum(dim=1, keepdim=True)
    turns = torch.arange(shape[1]) % weight.shape[1]
    return weight[:, turns] * (weight.shape[1] / shape[1])


def _published(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Download the published weights of a model, by torchvision or, for models that it lacks, by timm."""
    import timm

    timm_name = _name_in_timm(model, name)
    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch's downloads have no timeout, and would wait forever
    try:
        if weights := _torchvision_weights(name):
            return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        if timm.is_model_pretrained(timm_name):
            _require_hub(getattr(timm.get_pretrained_cfg(timm_name), "hf_hub_id", None))
            return timm.create_model(timm_name, pretrained=True).state_dict()
    except Exception as error:  # the network and the hub's client raise errors of many types
        advice = "download them elsewhere and give model.pretrained the file"
        raise OSError(f"the published weights of {name} can't be fetched ({error}); {advice}") from error
    finally:
        socket.setdefaulttimeout(default_timeout)
    raise ValueError(f"nobody publishes weights for {name}; give model.pretrained a file")


def _require_hub(repository: str | None) -> None:
    """Raise unless the hub answers or the weights are cached: the hub's own client retries for a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    if repository is None or isinstance(try_to_load_from_cache(repository, "model.safetensors"), str):
        return
    with suppress(urllib.error.HTTPError):  # an error status is an answer, too
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT).close()


def _torchvision_weights(name: str) -> Any:
    """Return the best weights that torchvision publishes under this name, or None if it has no such model."""
    import torchvision

    known = name in torchvision.models.list_models(torchvision.models)
    return torchvision.models.get_model_weights(name).DEFAULT if known else None


def _name_in_timm(family: Any, name: str) -> str:
    return getattr(family, "TIMM_NAMES", {}).get(name, name.removeprefix("timm/"))


# Metadata of the published weights


@dataclass(frozen=True)
class Published:
    """The image settings and the number of classes that the published weights of a model were trained with."""

    n_classes: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str


def published_with(family: Any, name: str) -> Published | None:
    """Return the settings of a model's published weights, or None if there are none. `family` is its class, None for timm's."""
    import timm

    if weights := _torchvision_weights(name):
        transforms = weights.transforms()
        size, resized = transforms.crop_size[0], transforms.resize_size[0]
        mean, std, interpolation = tuple(transforms.mean), tuple(transforms.std), transforms.interpolation.value
        return Published(len(weights.meta["categories"]), size, mean, std, size / resized, interpolation)
    cfg = timm.get_pretrained_cfg(_name_in_timm(family, name))
    if cfg is None or not cfg.has_weights:
        return None
    return Published(cfg.num_classes, cfg.input_size[-1], cfg.mean, cfg.std, cfg.crop_pct, cfg.interpolation)


def published_classes(n_classes: int) -> tuple[str, ...]:
    """Return the class names of ImageNet, or of a larger subset of it, by the number of classes; otherwise plain numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset
    from torchvision.models import ResNet50_Weights

    if n_classes == 1000:
        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    subset = infer_imagenet_subset({"num_classes": n_classes})
    if subset is None:
        return tuple(map(str, range(n_classes)))
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(n_classes))


def n_classes_in(file: Path, model: nn.Module) -> int:
    """Return the number of classes of the classifier in a file of weights for `model`."""
    weights = _convert(model, read_weights(file))
    key = f"{layer_names(model, 'CLASSIFIERS', 'classifier')[0]}.weight"
    if key not in weights:
        raise ValueError(f"{file} has no {key}: there is no classifier in it")
    return len(weights[key])


def label_names(folder: Path) -> list[str] | None:
    """Return the names of the classes in the config.json of an exported folder, or None."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    content = read_json(path)
    names = content.get("label_names") if isinstance(content, dict) else None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise MalformedFile(path, "label_names is not a list of names")
    return names
