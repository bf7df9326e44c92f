"""Grad-CAM: the places where a class would gain from stronger features.

Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra (2017): Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization. https://arxiv.org/abs/1610.02391
"""

import torch
from torch import Tensor, nn

from engine.config.errors import ConfigError
from tools.pictures.activations import as_map, captured

FINE_ENOUGH = 7  # places along a side, as the last stage of an ImageNet network has; on a few, small images show nothing


def gradcam(model: nn.Module, inputs: Tensor, layer: str, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The maps B H W, from 0 up, of a layer's resolution, and the logits. `targets` are classes; without, the predicted ones."""
    with torch.enable_grad(), captured(model, [layer], copy=False) as outputs:
        logits = model(inputs.clone().requires_grad_())  # so that a frozen model has gradients too
        targets = logits.argmax(1) if targets is None else targets
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(logits.gather(1, targets.unsqueeze(1)).sum(), outputs[layer])
    features, gradient = as_map(outputs[layer].detach()), as_map(gradient)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * features).sum(1).relu(), logits.detach()


@torch.no_grad()
def default_layer(model: nn.Module, inputs: Tensor) -> str:
    """The last stage that is fine enough, or the finest. Of a ViT the input of the last block, since what that gives for the
    patches goes nowhere."""
    stages = [stage["module"] for stage in getattr(model, "feature_info", [])]
    if not stages:
        raise ConfigError(f"{type(model).__name__} doesn't say what its stages are; --layer names one of its layers")
    with captured(model, stages, copy=True) as outputs:
        model(inputs[:1])
    if outputs[stages[-1]].ndim == 3 and hasattr(model, "blocks"):
        return f"blocks.{len(model.blocks) - 1}.norm1"
    sides = {stage: as_map(outputs[stage]).shape[-1] for stage in stages}
    return next((stage for stage in reversed(stages) if sides[stage] >= FINE_ENOUGH), max(stages, key=sides.__getitem__))
