"""Read published weights into a model that may have other classes, other channels or another image size.

Files are those of torchvision, timm or this project. Only tensors and plain values are unpickled: a file that would run code is
refused. The backbone must fit to the last tensor; of the head, what doesn't fit is left out, by name.
"""

import argparse
import logging
import pickle
import re
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # averaged weights are the ones that a training script reports
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DDP and averaging, torch.compile, Lightning
TIMEOUT = 5.0  # seconds without an answer from the network
PLACES = ("", "model.safetensors", "ckpt/best/model.safetensors")  # in a file, a checkpoint folder, a run folder


def load_pretrained(model: nn.Module, name: str, source: str | Path | bool) -> dict[str, int]:
    """Fill `model` with the weights of `source`: a file, or true for the published ones.

    The result names what was left out, since it belongs to a classifier of other classes, with the length of each.
    """
    if source is True:
        weights, said = _published(model, name), f"the published weights of {name}"
        set_as_published(model)
    else:
        weights, said = read_weights(Path(source)), str(source)
    try:
        left_out, initial, adapted = _fill(model, weights)
    except ValueError as error:
        raise ValueError(f"{name} can't take {said}: {error}") from error
    notes = {"left out": left_out, "not there, so as initialized": initial, "adapted": adapted}
    log.log(
        logging.WARNING if left_out or initial else logging.INFO,
        "; ".join([f"weights from {said}", *(f"{what}: {', '.join(keys)}" for what, keys in notes.items() if keys)]),
    )
    return left_out


def set_as_published(model: nn.Module) -> None:
    """What isn't in the weights, but was there when they were trained."""
    for attribute, value in getattr(model, "PUBLISHED_WITH", {}).items():
        setattr(model, attribute, value)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file, a checkpoint or a run folder, without wrappers and prefixes."""
    path = path.expanduser()
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
    if not isinstance(content, dict) or not content or not all(map(_is_named_tensor, content.items())):
        raise ValueError(f"{file} holds no state dict (looked under {', '.join(WRAPPERS)} and at the top)")
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in content)), None):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content


def _read(file: Path) -> object:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # the options of a run, which timm's and torchvision's training scripts save beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the readers stumble over
        forbidden = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if forbidden:
            said = f"is refused: it holds more than tensors and plain values ({forbidden[1]}), and loading it could run code"
        else:
            reason = str(error).partition("\n")[0].partition(". ")[0] or "it ends too early"
            said = f"can't be read as weights; is it damaged, cut short, or another kind of file? ({reason})"
        raise ValueError(f"{file} {said}") from error


def _is_named_tensor(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _fill(model: nn.Module, given: dict[str, Tensor]) -> tuple[dict[str, int], list[str], list[str]]:
    """Load what fits. The result names what the file has too much, with its length, what the model keeps of its own, and what
    was adapted."""
    own, head = model.state_dict(), _head(model)
    weights = _convert(model, given)
    for key in (f"{layer}.weight" for layer in _first_convs(model)):
        if key in weights and key in own:
            weights = {**weights, key: _to_channels(weights[key], own[key].shape)}

    reshaped = [key for key, value in weights.items() if key in own and own[key].shape != value.shape]
    replaced = {_layer(key) for key in reshaped if _within(key, head)}
    left_out = {
        key: len(value) if value.ndim else 0
        for key, value in weights.items()
        if _within(key, head) and (key not in own or _layer(key) in replaced)
    }
    fitting = {key: value for key, value in weights.items() if key not in left_out and key not in reshaped}
    missing, unexpected = model.load_state_dict(fitting, strict=False)

    problems = [
        f"{key} is {tuple(weights[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in reshaped
        if key not in left_out
    ]
    problems += [f"{key} is missing" for key in missing if not _within(key, head) and key not in reshaped]
    problems += [f"{key} is unknown" for key in unexpected]
    if problems:
        raise ValueError("; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else ""))
    initial = [key for key in missing if _within(key, head) and key not in left_out]
    adapted = [key for key in fitting if key in given and given[key].shape != fitting[key].shape]
    return left_out, initial, adapted


def _convert(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Older or foreign names, another image size: what the family knows of its published files."""
    if hasattr(model, "convert_pretrained"):
        return model.convert_pretrained(weights)
    of_timm = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if of_timm is None:
        return weights
    try:
        return of_timm(weights, model)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from error


def _to_channels(weight: Tensor, shape: torch.Size) -> Tensor:
    """One channel gets the sum over the colors; more get the colors in turn, scaled so that activations keep their size."""
    if weight.ndim != 4 or weight.shape[1] == shape[1]:
        return weight
    if shape[1] == 1:
        return weight.sum(dim=1, keepdim=True)
    turns = torch.arange(shape[1]) % weight.shape[1]
    return weight[:, turns] * (weight.shape[1] / shape[1])


def _head(model: nn.Module) -> tuple[str, ...]:
    return model.HEAD if hasattr(model, "HEAD") else _names(model.pretrained_cfg["classifier"])


def _first_convs(model: nn.Module) -> tuple[str, ...]:
    return _names(model.FIRST_CONV if hasattr(model, "FIRST_CONV") else model.pretrained_cfg["first_conv"])


def _names(of_timm: str | Iterable[str] | None) -> tuple[str, ...]:
    return (of_timm,) if isinstance(of_timm, str) else tuple(of_timm or ())


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _within(key: str, modules: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{module}.") for module in modules)


def _published(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The published weights of a model, downloaded by torchvision or, for the models that it hasn't, by timm."""
    import timm

    in_timm = _name_in_timm(model, name)
    try:
        with _impatient():
            if of_torchvision := _of_torchvision(name):
                return of_torchvision.get_state_dict(progress=True, check_hash=True, weights_only=True)
            if timm.is_model_pretrained(in_timm):
                _expect_hub(timm.get_pretrained_cfg(in_timm).hf_hub_id)
                return timm.create_model(in_timm, pretrained=True).state_dict()
    except Exception as error:  # whatever the network or a hub's client raises
        raise OSError(
            f"the published weights of {name} can't be fetched ({error}); "
            "download them elsewhere and give model.pretrained the file"
        ) from error
    raise ValueError(f"nobody publishes weights for {name}; give model.pretrained a file")


def _of_torchvision(name: str) -> Any:
    """The best weights that torchvision publishes under this name; None where it has no such model."""
    import torchvision

    known = name in torchvision.models.list_models(torchvision.models)
    return torchvision.models.get_model_weights(name).DEFAULT if known else None


def _name_in_timm(family: Any, name: str) -> str:
    return getattr(family, "TIMM_NAMES", {}).get(name, name.removeprefix("timm/"))


# What is published with them


@dataclass(frozen=True)
class Published:
    """How the published weights of a model were trained to see an image, and how many classes they tell apart."""

    n_classes: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str


def published_with(family: Any, name: str) -> Published | None:
    """None for a model that nobody publishes weights of; `family` is its class, or None for one of timm."""
    import timm

    if of_torchvision := _of_torchvision(name):
        sees = of_torchvision.transforms()
        size, resized = sees.crop_size[0], sees.resize_size[0]
        n_classes = len(of_torchvision.meta["categories"])
        return Published(n_classes, size, tuple(sees.mean), tuple(sees.std), size / resized, sees.interpolation.value)
    of_timm = timm.get_pretrained_cfg(_name_in_timm(family, name))
    if of_timm is None or not of_timm.has_weights:
        return None
    size, crop_pct = of_timm.input_size[-1], of_timm.crop_pct
    return Published(of_timm.num_classes, size, of_timm.mean, of_timm.std, crop_pct, of_timm.interpolation)


def published_classes(n_classes: int) -> tuple[str, ...]:
    """What is written about the classes of ImageNet, or of one of its larger sets; numbers where there is no such set."""
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
    """How many classes the weights in a file tell apart."""
    weights = _convert(model, read_weights(file))
    layer = (model.CLASSIFIERS if hasattr(model, "CLASSIFIERS") else _names(model.pretrained_cfg["classifier"]))[0]
    key = f"{layer}.weight"
    if key not in weights:
        raise ValueError(f"{file} has no {key}: there is no classifier in it")
    return len(weights[key])


@contextmanager
def _impatient() -> Iterator[None]:
    """torch's downloads have no timeout of their own: a network that never answers would be waited for."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _expect_hub(weights_of: str | None) -> None:
    """The hub's client tries for a minute; so it is asked only if the hub answers at all, or has been asked before."""
    from huggingface_hub import constants, try_to_load_from_cache

    if weights_of is None or isinstance(try_to_load_from_cache(weights_of, "model.safetensors"), str):
        return
    with suppress(urllib.error.HTTPError):  # which is an answer
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT).close()
