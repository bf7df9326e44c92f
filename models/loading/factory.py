"""Find a model by its name, and build it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from models.loading.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from models.loading.pretrained import Published

# timm and the weights are imported where they are needed: timm takes a second to start.
TIMM = "timm/"
# Arguments of timm.create_model that don't describe the network: they read weights, or set what `create_model` here sets
NOT_OF_THE_NETWORK = (
    *("checkpoint_path", "cache_dir", "pretrained*", "model_cfg", "kwargs_filter", "feature_cfg", "feature_cls", "features_only"),
    *("out_indices", "num_classes", "in_chans", "device", "dtype", "scriptable", "exportable", "no_jit"),
)
Constructor = Callable[..., nn.Module]


def _entries(table: Mapping[str, Constructor]) -> Mapping[str, Constructor]:
    if reserved := [name for name in table if name.startswith(TIMM)]:
        raise ValueError(f"{reserved[0]}: names that begin with {TIMM} are timm's")
    return table


MODELS: Registry[str, Constructor] = Registry("model", "models", "MODELS", _entries)


def list_models() -> list[str]:
    """List the names of this project's own models. Every timm model is available as well, as timm/<name>."""
    return sorted(MODELS.entries)


def model_signature(name: str) -> inspect.Signature | None:
    """Return the signature of the model's constructor, or None for a timm model, which has none before it is built."""
    _require_model(name)
    return None if name.startswith(TIMM) else inspect.signature(MODELS.entries[name])


def describes_network(argument: str) -> bool:
    """Tell whether an argument of a timm model describes its network; others could name a file with code in it."""
    return not any(fnmatchcase(argument, pattern) for pattern in NOT_OF_THE_NETWORK)


def published_with(name: str) -> "Published | None":
    """Return the image settings and classes of a model's published weights, or None if there are no such weights."""
    from models.loading.pretrained import published_with

    _require_model(name)
    family = MODELS.entries.get(name)
    return published_with(getattr(family, "func", family), name)  # of a partial, the class


def create_model(
    name: str,
    *,
    n_classes: int = 1000,
    in_channels: int = 3,
    img_size: int | None = None,
    pretrained: str | Path | bool = False,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the model `name`.

    `pretrained` is a file of weights (torchvision's, timm's or a checkpoint of this project), or true for the published ones.
    With `features_only` the result returns a list of feature maps, those of `out_indices` (all by default), described by its
    `.feature_info`. An `img_size` of None is the size of the published model.
    """
    from models.loading.features import FeatureExtractor
    from models.loading.pretrained import load_pretrained

    if out_indices is not None and not features_only:
        raise ValueError("out_indices is for features_only=True")
    _require_model(name)
    if name.startswith(TIMM):
        import timm

        if refused := [argument for argument in kwargs if not describes_network(argument)]:
            raise ValueError(f"{refused[0]} is not an argument of the network {name}")
        timm_name = name.removeprefix(TIMM)
        published = timm.get_pretrained_cfg(timm_name)
        if img_size is not None and published is not None and published.fixed_input_size:
            kwargs = {"img_size": img_size, **kwargs}  # other networks don't depend on it, and don't accept it
        model = timm.create_model(timm_name, num_classes=n_classes, in_chans=in_channels, **kwargs)
    else:
        size = {} if img_size is None else {"img_size": img_size}
        model = MODELS.entries[name](n_classes=n_classes, in_channels=in_channels, **size, **kwargs)
    if pretrained:
        load_pretrained(model, name, pretrained)
    return FeatureExtractor(model, out_indices) if features_only else model


def _require_model(name: str) -> None:
    """Raise ValueError, with the nearest names, unless `name` is a model of this project or of timm."""
    if not name.startswith(TIMM):
        if name in MODELS.entries:
            return
        known = list_models()
    else:
        import timm

        if timm.is_model(name.removeprefix(TIMM)):
            return
        known = [TIMM + other for other in timm.list_models()]
    hint = did_you_mean(name, dict(zip(known, known, strict=True)), "list_models() lists them; timm's are timm/<name>", n=3)
    raise ValueError(f"unknown model {name!r}: {hint}")
