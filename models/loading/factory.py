"""Find a model by its name, and build it."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from models.loading.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from models.loading.pretrained import Published

TIMM = "timm/"
Constructor = Callable[..., nn.Module]


def _entries(table: Mapping[str, Constructor]) -> Mapping[str, Constructor]:
    if reserved := [name for name in table if name.startswith(TIMM)]:
        raise ValueError(f"{reserved[0]}: names that begin with {TIMM} are timm's")
    return table


MODELS: Registry[str, Constructor] = Registry("model", "models", "MODELS", _entries)


def list_models() -> list[str]:
    """The names of this project's own models; any timm model is there besides, as timm/<name>."""
    return sorted(MODELS.entries)


def model_signature(name: str) -> inspect.Signature | None:
    """What the model's constructor takes; None for a timm model, which says so only when it is built."""
    if name.startswith(TIMM):
        _timm_model_exists(name)
        return None
    return inspect.signature(_constructor(name))


def published_with(name: str) -> "Published | None":
    """How the published weights of a model want their images; None for one that nobody publishes weights of."""
    from models.loading.pretrained import published_with

    family = None if name.startswith(TIMM) else _constructor(name)
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
    With `features_only` the result gives a list of feature maps, those of `out_indices` (all by default), described by its
    `.feature_info`. An `img_size` of None is the size that the model was published for.
    """
    from models.loading.features import FeatureExtractor
    from models.loading.pretrained import load_pretrained

    if out_indices is not None and not features_only:
        raise ValueError("out_indices is for features_only=True")
    if name.startswith(TIMM):
        model = _create_timm_model(name, n_classes, in_channels, img_size, kwargs)
    else:
        size = {} if img_size is None else {"img_size": img_size}
        model = _constructor(name)(n_classes=n_classes, in_channels=in_channels, **size, **kwargs)
    if pretrained:
        load_pretrained(model, name, pretrained)
    return FeatureExtractor(model, out_indices) if features_only else model


def _constructor(name: str) -> Callable[..., nn.Module]:
    if name not in MODELS.entries:
        raise ValueError(_unknown(name, list_models()))
    return MODELS.entries[name]


def _unknown(name: str, known: Sequence[str]) -> str:
    hint = did_you_mean(name, {other: other for other in known}, "list_models() names them all; timm's are timm/<name>", n=3)
    return f"unknown model {name!r}: {hint}"


def _timm_model_exists(name: str) -> None:
    import timm

    plain = name.removeprefix(TIMM)
    if not timm.is_model(plain):
        raise ValueError(_unknown(name, [TIMM + known for known in timm.list_models()]))


def _create_timm_model(name: str, n_classes: int, in_channels: int, img_size: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """A timm model, given an image size only where its parameters depend on one."""
    import timm

    _timm_model_exists(name)
    plain = name.removeprefix(TIMM)
    published = timm.get_pretrained_cfg(plain)
    if img_size is not None and published is not None and published.fixed_input_size:
        kwargs = {"img_size": img_size, **kwargs}
    return timm.create_model(plain, num_classes=n_classes, in_chans=in_channels, **kwargs)
