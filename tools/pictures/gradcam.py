"""The image regions that a prediction depends on: Grad-CAM, and the attention rollout of a Vision Transformer.

Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra (2017): Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization. https://arxiv.org/abs/1610.02391
Abnar, Zuidema (2020): Quantifying Attention Flow in Transformers. https://arxiv.org/abs/2005.00928
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from engine.config.errors import ConfigError
from engine.plots.images import Row, class_titles, draw_images
from engine.plots.style import HEAT, new_figure
from tools.pictures.activations import as_map, captured
from tools.pictures.output import save_pictures
from tools.pictures.subject import model_title, open_classifier, read_images

FINE_ENOUGH = 7  # places along a side, as in the last stage of an ImageNet network; coarser maps of small images show nothing


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    if args.method == "rollout" and (args.target or args.layer):
        raise ConfigError("--target and --layer are for --method gradcam: the rollout uses all layers, and no class")
    trained = open_classifier(args, overrides)
    target = find_class(args.target, trained.classes) if args.target is not None else None
    samples = read_images(args, trained)
    inputs, labels = samples.batch
    is_free = args.method is None and args.target is None and args.layer is None
    if args.method == "rollout" or (is_free and global_attention(trained.model, inputs[:1]) is not None):
        maps, name, details = rollout_maps(trained.model, inputs), "attention rollout", ""
    else:
        layer = args.layer or default_layer(trained.model, inputs)
        targets = None if target is None else torch.full((len(inputs),), target, device=inputs.device)
        maps, _ = gradcam(trained.model, inputs, layer, targets)
        name, details = "Grad-CAM", f" at {layer}" + (f" for {trained.classes[target]}" if target is not None else "")
    with torch.no_grad():
        probabilities = trained.task.predict(trained.model, samples.batch).cpu()
    images = samples.images.cpu()
    heat = matplotlib.colormaps[HEAT](heat_of(maps, images.shape[-1]).cpu().numpy())[..., :3]  # B H W 3, dark to light
    blended = 0.4 * images.mean(1, keepdim=True) + 0.6 * torch.from_numpy(heat).permute(0, 3, 1, 2).float()
    titles = class_titles(probabilities, trained.classes, labels, samples.names)
    rows = [Row("image", images, *titles), Row(name, blended)]
    draw_images(figure := new_figure(show=args.show), rows, f"{model_title(trained)}: {name}{details}")
    save_pictures({"gradcam": figure}, args, trained.run_dir, trained.step)


def gradcam(model: nn.Module, inputs: Tensor, layer: str, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The maps B H W, non-negative, in the resolution of a layer, and the logits. Default `targets`: the predicted classes."""
    with torch.enable_grad(), captured(model, [layer], copy=False) as outputs:
        logits = model(inputs.clone().requires_grad_())  # so that a frozen model has gradients, too
        targets = logits.argmax(1) if targets is None else targets
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(logits.gather(1, targets.unsqueeze(1)).sum(), outputs[layer])
    features, gradient = as_map(outputs[layer].detach()), as_map(gradient)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * features).sum(1).relu(), logits.detach()


@torch.no_grad()
def default_layer(model: nn.Module, inputs: Tensor) -> str:
    """The last stage that is fine enough, or the finest one. For a ViT, the input of the last block, because the outputs of its
    patches don't reach the classifier."""
    stages = [stage["module"] for stage in getattr(model, "feature_info", [])]
    if not stages:
        raise ConfigError(f"{type(model).__name__} doesn't list its stages; give the name of a layer with --layer")
    with captured(model, stages, copy=True) as outputs:
        model(inputs[:1])
    blocks = getattr(model, "blocks", None)
    if outputs[stages[-1]].ndim == 3 and isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        return f"blocks.{len(blocks) - 1}.norm1"
    sides = {stage: as_map(outputs[stage]).shape[-1] for stage in stages}
    return next((stage for stage in reversed(stages) if sides[stage] >= FINE_ENOUGH), max(stages, key=sides.__getitem__))


def find_class(text: str, classes: Sequence[str]) -> int:
    """The number of the class of this name or number."""
    lower = [name.lower() for name in classes]
    if text.lower() in lower:
        return lower.index(text.lower())
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    near = get_close_matches(text.lower(), lower, n=3)
    hint = f"did you mean {' or '.join(classes[lower.index(name)] for name in near)}?" if near else f"there are {len(classes):,}"
    raise ConfigError(f"--target {text}: no such class; {hint}")


def heat_of(maps: Tensor, size: int) -> Tensor:
    """Maps B H W, resized to the image and scaled to the range from 0 to 1 each."""
    maps = F.interpolate(maps.unsqueeze(1), (size, size), mode="bilinear")[:, 0]
    lowest, highest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - lowest) / (highest - lowest).clamp_min(1e-12)


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
