"""Sharpness-aware minimization: the gradient is taken where the loss is about highest near the weights.

SAM: Foret, Kleiner, Mobahi, Neyshabur (2021): Sharpness-Aware Minimization for Efficiently Improving Generalization.
https://arxiv.org/abs/2010.01412
Adaptive: Kwon, Kim, Park, Choi (2021): ASAM. https://arxiv.org/abs/2102.11600
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

TINY = 1e-12  # keeps the direction of a gradient of zero finite


@dataclass(frozen=True)
class Sharpness:
    radius: float  # rho of the papers
    adaptive: bool = False  # large weights may be moved further

    @contextmanager
    def uphill(self, model: nn.Module) -> Iterator[None]:
        """Inside, the weights stand `radius` up their gradients, which are gone; outside they are what they were, to the bit.

        A gradient scaler's factor has no influence on the direction. Running statistics are those of the weights themselves.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        before = [parameter.detach().clone() for parameter in parameters]
        buffers = [buffer.clone() for buffer in model.buffers()]
        with torch.no_grad():
            scales = [weight.abs() for weight in before] if self.adaptive else [1.0] * len(before)
            slopes = [parameter.grad * scale for parameter, scale in zip(parameters, scales, strict=True)]
            step = self.radius / torch.nn.utils.get_total_norm(slopes).clamp(min=TINY)
            for parameter, slope, scale in zip(parameters, slopes, scales, strict=True):
                parameter.add_(slope * scale * step)
                parameter.grad = None
        yield
        with torch.no_grad():
            for tensor, value in zip([*parameters, *model.buffers()], [*before, *buffers], strict=True):
                tensor.copy_(value)
