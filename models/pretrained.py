"""Read published weights into a model that may have other classes, other channels or another image size.

Nothing is unpickled: safetensors, or torch.load with weights_only=True, which refuses a file that would run code.
"""

import logging
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")


def load_pretrained(model: nn.Module, name: str, source: str | Path | bool) -> None:
    """Fill `model` with the weights of `source`: a file, or true for the published ones."""
    if source is True:
        weights, said = _published(name), f"the published weights of {name}"
    else:
        weights, said = read_weights(Path(source)), str(source)
    if hasattr(model, "convert_pretrained"):
        weights = model.convert_pretrained(weights)
    weights, left_out = _adapt(model, weights)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [key for key in missing if key not in left_out]
    if missing or unexpected:
        raise ValueError(
            f"{said} doesn't fit {name}: "
            + "; ".join(
                f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
                for what, keys in (("missing", missing), ("unexpected", unexpected))
                if keys
            )
        )
    log.info("weights from %s%s", said, f"; left out: {', '.join(left_out)}" if left_out else "")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file, or in a checkpoint folder, without wrappers and prefixes."""
    path = path.expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values, and loading it could run code"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} can't be read as weights: {error}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (looked under {', '.join(WRAPPERS)} and at the top)")
    for prefix in PREFIXES:
        if content and all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content


def _adapt(model: nn.Module, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Fit the first convolution to other channels and leave out a classifier of other classes."""
    own = model.state_dict()
    classifiers, first_conv = _classifiers(model), _first_conv(model)
    adapted, left_out = {}, []
    for key, value in weights.items():
        layer = key.rpartition(".")[0]
        if key not in own or own[key].shape == value.shape:
            adapted[key] = value
        elif layer in classifiers:
            left_out.append(key)
        elif layer == first_conv and value.ndim == 4:
            adapted[key] = _to_channels(value, own[key].shape[1])
        else:
            raise ValueError(f"{key} is {tuple(value.shape)} in the file and {tuple(own[key].shape)} in the model")
    return adapted, left_out


def _to_channels(weight: Tensor, channels: int) -> Tensor:
    """One channel gets the sum over the colours; more get the colours in turn, scaled so that activations keep their size."""
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    turns = torch.arange(channels) % weight.shape[1]
    return weight[:, turns] * (weight.shape[1] / channels)


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    if hasattr(model, "CLASSIFIERS"):
        return model.CLASSIFIERS
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def _first_conv(model: nn.Module) -> str:
    return model.FIRST_CONV if hasattr(model, "FIRST_CONV") else model.pretrained_cfg["first_conv"]


def _published(name: str) -> dict[str, Tensor]:
    """The published weights of a model, downloaded by timm or torchvision."""
    plain = name.removeprefix("timm/")
    try:
        if name.startswith("timm/"):
            import timm

            return timm.create_model(plain, pretrained=True).state_dict()
        import torchvision

        return torchvision.models.get_model_weights(plain).DEFAULT.get_state_dict(progress=True, check_hash=True)
    except ValueError as error:
        raise ValueError(f"nobody publishes weights for {name}; give model.pretrained a file") from error
    except Exception as error:  # whatever the network or a hub's client raises
        raise OSError(
            f"the published weights of {name} can't be fetched ({error}); download them elsewhere and give model.pretrained the file"
        ) from error
