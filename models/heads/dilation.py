"""Replace strides by dilation, so that the last maps of a backbone keep more of the image's resolution.

Liang-Chieh Chen, George Papandreou, Iasonas Kokkinos, Kevin Murphy, Alan L. Yuille (2017): DeepLab: Semantic Image Segmentation
with Deep Convolutional Nets, Atrous Convolution, and Fully Connected CRFs. IEEE TPAMI. https://arxiv.org/abs/1606.00915

When a stride is removed, the layers after it see their input sampled more densely, and dilate their kernels by the same factor.
At the positions of the strided network the result is then the same (except for layers that average over the whole map, such as
squeeze and excitation), so weights that were trained with strides fit. For a bottleneck this is torchvision's
`replace_stride_with_dilation`: the convolution that loses its stride keeps its dilation.
"""

import copy
import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PROBE = 512  # pixels per side of the image that measures reductions; enough for the deepest network here


def replace_strides(backbone: Any, output_stride: int) -> None:
    """Limit the reduction of every feature map to `output_stride`. Raise ValueError if the backbone can't be dilated."""
    if max(entry["reduction"] for entry in backbone.feature_info) <= output_stride:
        return
    if output_stride & (output_stride - 1):
        raise ValueError(f"output_stride {output_stride} is not a power of two")
    refusal = f"output_stride {output_stride}: {type(backbone).__name__} can't be dilated"
    try:
        for name, (before, after) in _reductions(backbone).items():
            if max(before, after) > output_stride:
                _dilate(backbone.get_submodule(name), before, after, output_stride)
        reached = max(after for _, after in _reductions(backbone).values())
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "maps that it joins would no longer be of one size"
        raise ValueError(f"{refusal}: {reason}; null keeps its strides") from error
    if reached != output_stride:
        raise ValueError(f"{refusal} to it; null keeps its strides")
    for entry in backbone.feature_info:
        entry["reduction"] = min(entry["reduction"], output_stride)


def _dilate(layer: Any, before: int, after: int, output_stride: int) -> None:
    kernel_size, padding, dilation = (_pair(value) for value in (layer.kernel_size, layer.padding, layer.dilation))
    for kernel, pad in zip(kernel_size, padding, strict=True):
        if kernel != 2 * pad + 1:
            raise ValueError(f"a kernel of {kernel} with a padding of {pad} would move the map against the image")
    if after > before:
        layer.stride = _pair(max(1, output_stride // before))
    factor = max(1, before // output_stride)
    if factor > 1:
        layer.dilation = tuple(value * factor for value in dilation)
        layer.padding = tuple(value * factor for value in padding)


def _reductions(backbone: Any) -> dict[str, tuple[int, int]]:
    """Measure the reduction of the image before and after each convolution and max pooling, without computing anything."""
    reductions: dict[str, tuple[int, int]] = {}
    network = copy.deepcopy(backbone).to("meta").eval()

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        if min(output.shape[-2:]) > 1:  # otherwise it is one value per channel, as in squeeze and excitation
            before, after = (2 ** round(math.log2(PROBE / maps.shape[-1])) for maps in (inputs[0], output))
            reductions[name] = before, after

    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
                hooks.callback(module.register_forward_hook(partial(record, name=name)).remove)
        channels = next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
        forward = network.forward_stages if hasattr(network, "forward_stages") else network.forward_features
        forward(torch.empty(1, channels, PROBE, PROBE, device="meta"))
    return reductions


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)
