"""Strides replaced by dilation: a backbone whose last maps keep more of the image's resolution.

Liang-Chieh Chen, George Papandreou, Iasonas Kokkinos, Kevin Murphy, Alan L. Yuille (2017): DeepLab: Semantic Image Segmentation
with Deep Convolutional Nets, Atrous Convolution, and Fully Connected CRFs. IEEE TPAMI. https://arxiv.org/abs/1606.00915

Where a stride is left out, what comes after it sees its input sampled more densely, and spreads its kernel by as much. So at the
places that the strided network would have computed, the result is the same (but for layers that look at the whole map, such as
squeeze and excitation), and weights that were trained with strides fit. For a bottleneck this is torchvision's
`replace_stride_with_dilation`: the convolution that loses its stride keeps its dilation.
"""

import copy
import math
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

PROBE = 512  # pixels of an image that no network here is too deep for


def replace_strides(backbone: nn.Module, output_stride: int) -> None:
    """No feature map is reduced by more than `output_stride`. A backbone that can't do that raises ValueError."""
    own = max(entry["reduction"] for entry in backbone.feature_info)
    if own <= output_stride:
        return
    if output_stride & (output_stride - 1):
        raise ValueError(f"output_stride {output_stride} is no power of two")
    try:
        for name, (before, after) in _reductions(backbone).items():
            _dilate(backbone.get_submodule(name), before, after, output_stride)
        reached = max(after for _, after in _reductions(backbone).values())
    except (RuntimeError, ValueError, AssertionError) as error:
        why = str(error) if isinstance(error, ValueError) else "maps that it joins would no longer be of one size"
        raise ValueError(
            f"output_stride {output_stride}: {type(backbone).__name__} can't be dilated: {why}; null does without"
        ) from error
    if reached != output_stride:
        raise ValueError(f"output_stride {output_stride}: {type(backbone).__name__} can't be dilated to it; null does without")
    for entry in backbone.feature_info:
        entry["reduction"] = min(entry["reduction"], output_stride)


def _dilate(layer: nn.Module, before: int, after: int, output_stride: int) -> None:
    if max(before, after) <= output_stride:
        return
    for kernel, padding in zip(_pair(layer.kernel_size), _pair(layer.padding), strict=True):
        if kernel != 2 * padding + 1:
            raise ValueError(f"a kernel of {kernel} with a padding of {padding} would move the map against the image")
    stride, dilation = max(1, output_stride // before), max(1, before // output_stride)
    if after > before:
        layer.stride = (stride, stride)
    if dilation > 1:
        layer.dilation = tuple(old * dilation for old in _pair(layer.dilation))
        layer.padding = tuple(old * dilation for old in _pair(layer.padding))


def _reductions(backbone: nn.Module) -> dict[str, tuple[int, int]]:
    """How often the image is reduced before and after each convolution and max-pooling, found out without computing anything."""
    found: dict[str, tuple[int, int]] = {}
    network = copy.deepcopy(backbone).to("meta").eval()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        if min(output.shape[-2:]) > 1:  # or it is a number per channel, as in squeeze and excitation
            found[name] = (_reduction(inputs[0]), _reduction(output))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
                hooks.callback(module.register_forward_hook(partial(note, name=name)).remove)
        channels = next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
        (network.forward_stages if hasattr(network, "forward_stages") else network.forward_features)(
            torch.empty(1, channels, PROBE, PROBE, device="meta")
        )
    return found


def _reduction(maps: Tensor) -> int:
    return 2 ** round(math.log2(PROBE / maps.shape[-1]))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)
