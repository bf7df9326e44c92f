"""Attention rollout: how much each patch contributes to the class token, through all layers.

Abnar, Zuidema (2020): Quantifying Attention Flow in Transformers. https://arxiv.org/abs/2005.00928
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from engine.config.errors import ConfigError


class AttentionWeights(TorchFunctionMode):
    """Collects the weights of every attention, B heads N N. Fused attention doesn't return them, so they are computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.weights.append(attention_weights(*args, **kwargs))
        return function(*args, **kwargs)


def attention_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None, **others: Any
) -> Tensor:
    """softmax(q k / sqrt(d) + mask)"""
    scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)


@torch.no_grad()
def rollout(model: nn.Module, inputs: Tensor) -> Tensor:
    """B N N: the share of each input token (column) in each output token (row) of the last layer. Rows sum to one.

    The shortcut around an attention contributes one half, the mean over its heads the other.
    """
    layers = global_attention(model, inputs)
    if layers is None:
        raise ConfigError(f"{type(model).__name__} has no attention between all tokens in every layer; use --method gradcam")
    rolled = identity = torch.eye(layers[0].shape[-1], device=inputs.device)
    for weights in layers:
        rolled = (0.5 * weights.float().mean(1) + 0.5 * identity) @ rolled
    return rolled


@torch.no_grad()
def global_attention(model: nn.Module, inputs: Tensor) -> list[Tensor] | None:
    """The attention weights of each layer; None without any, and if they aren't between all tokens, as with windows."""
    with AttentionWeights() as attention:
        model(inputs)
    sizes = {len(weights) for weights in attention.weights}
    shapes = {tuple(weights.shape[-2:]) for weights in attention.weights}
    is_square = len(shapes) == 1 and len(set(next(iter(shapes)))) == 1
    return attention.weights if is_square and sizes == {len(inputs)} else None


def rollout_maps(model: nn.Module, inputs: Tensor) -> Tensor:
    """B H W over the patches: their shares in the class token or, without one, the mean over all patches."""
    rolled = rollout(model, inputs)
    side = math.isqrt(rolled.shape[-1])
    n_others = rolled.shape[-1] - side**2  # tokens before the patches
    shares = rolled[:, 0, n_others:] if n_others else rolled.mean(1)
    return shares.unflatten(1, (side, side))
