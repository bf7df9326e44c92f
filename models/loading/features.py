"""A backbone, of this project or of timm, as a source of feature maps for segmentation, detection and visualization."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class FeatureInfo:
    """The channels, the reduction (image size / map size) and the source module of each selected feature map."""

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self._info = [dict(info[i]) for i in out_indices]
        self.out_indices = tuple(out_indices)

    def channels(self) -> list[int]:
        return [entry["num_chs"] for entry in self._info]

    def reduction(self) -> list[int]:
        return [entry["reduction"] for entry in self._info]

    def module_name(self) -> list[str]:
        return [entry["module"] for entry in self._info]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._info[index]

    def __len__(self) -> int:
        return len(self._info)


def trim(backbone: Any, out_indices: Sequence[int] | None = None) -> FeatureInfo:
    """Remove the head, and describe the feature maps of `out_indices` (all by default)."""
    available = list(backbone.feature_info)
    selected = range(len(available)) if out_indices is None else out_indices
    for index in selected:
        if not -len(available) <= index < len(available):
            there = f"{len(available)} feature maps (0 to {len(available) - 1})"
            raise ValueError(f"{type(backbone).__name__} has {there}, but out_indices contains {index}")
    info = FeatureInfo(available, [index % len(available) for index in selected])
    if _is_from_timm(backbone):
        backbone.prune_intermediate_layers(list(info.out_indices), prune_head=True)
        return info
    for name in backbone.HEAD:
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, nn.Identity())
    return info


def feature_maps(backbone: Any, info: FeatureInfo, x: Tensor) -> list[Tensor]:
    """Compute the maps that `info` describes, with a backbone that was trimmed to them."""
    if _is_from_timm(backbone):
        return backbone.forward_intermediates(x, indices=list(info.out_indices), intermediates_only=True)
    maps = backbone.forward_stages(x)
    return [maps[i] for i in info.out_indices]


def require_feature_maps(backbone: Any, n_maps: int, reader: str) -> None:
    """Raise ValueError if the backbone has fewer than the `n_maps` maps that `reader` needs."""
    if len(backbone.feature_info) < n_maps:
        raise ValueError(f"{reader} {n_maps} feature maps; {type(backbone).__name__} has {len(backbone.feature_info)}")


def layer_names(model: Any, attribute: str, timm_key: str) -> tuple[str, ...]:
    """Return the names of layers in `attribute` (HEAD, CLASSIFIERS, FIRST_CONV), or for a timm model in its pretrained_cfg."""
    names = getattr(model, attribute) if hasattr(model, attribute) else model.pretrained_cfg[timm_key]
    return (names,) if isinstance(names, str) else tuple(names or ())


def _is_from_timm(backbone: nn.Module) -> bool:
    return not hasattr(backbone, "forward_stages")


class FeatureExtractor(nn.Module):
    """A backbone without its head, which returns a list of feature maps for a batch of images."""

    def __init__(self, backbone: nn.Module, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.feature_info = trim(backbone, out_indices)
        self.backbone = backbone

    def forward(self, x: Tensor) -> list[Tensor]:
        return feature_maps(self.backbone, self.feature_info, x)
