"""A backbone as a source of feature maps, for segmentation, detection and for looking inside."""

from collections.abc import Sequence

from torch import Tensor, nn


class FeatureInfo:
    """What each chosen feature map is: its channels, how often the image is reduced, and the module that gives it."""

    def __init__(self, info: Sequence[dict], out_indices: Sequence[int]) -> None:
        self._info = [dict(info[i]) for i in out_indices]
        self.out_indices = tuple(out_indices)

    def channels(self) -> list[int]:
        return [entry["num_chs"] for entry in self._info]

    def reduction(self) -> list[int]:
        return [entry["reduction"] for entry in self._info]

    def module_name(self) -> list[str]:
        return [entry["module"] for entry in self._info]

    def __getitem__(self, index: int) -> dict:
        return self._info[index]

    def __len__(self) -> int:
        return len(self._info)


def trim(backbone: nn.Module, out_indices: Sequence[int] | None = None) -> FeatureInfo:
    """Take the head off, and say what the feature maps of `out_indices` are, all by default."""
    published = list(backbone.feature_info)
    chosen = range(len(published)) if out_indices is None else out_indices
    for index in chosen:
        if not -len(published) <= index < len(published):
            raise ValueError(
                f"{type(backbone).__name__} has {len(published)} feature maps (0 to {len(published) - 1}), "
                f"out_indices asks for {index}"
            )
    info = FeatureInfo(published, [index % len(published) for index in chosen])
    if _is_of_timm(backbone):
        backbone.prune_intermediate_layers(list(info.out_indices), prune_head=True)
        return info
    for name in backbone.HEAD:
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, nn.Identity())
    return info


def feature_maps(backbone: nn.Module, info: FeatureInfo, x: Tensor) -> list[Tensor]:
    """Those that `info` describes, of a backbone that was trimmed to them."""
    if _is_of_timm(backbone):
        return backbone.forward_intermediates(x, indices=list(info.out_indices), intermediates_only=True)
    maps = backbone.forward_stages(x)
    return [maps[i] for i in info.out_indices]


def _is_of_timm(backbone: nn.Module) -> bool:
    return not hasattr(backbone, "forward_stages")


class FeatureExtractor(nn.Module):
    """A backbone without its head: the image in, a list of feature maps out."""

    def __init__(self, backbone: nn.Module, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.feature_info = trim(backbone, out_indices)
        self.backbone = backbone

    def forward(self, x: Tensor) -> list[Tensor]:
        return feature_maps(self.backbone, self.feature_info, x)
