"""Sharpness-aware minimization: the gradient is taken at perturbed weights, where the loss nearby is about highest.

SAM: Foret, Kleiner, Mobahi, Neyshabur (2021): Sharpness-Aware Minimization for Efficiently Improving Generalization.
https://arxiv.org/abs/2010.01412
Adaptive: Kwon, Kim, Park, Choi (2021): ASAM. https://arxiv.org/abs/2102.11600
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TINY = 1e-12  # keeps the direction of a gradient of zero finite


@dataclass(frozen=True)
class Sharpness:
    rho: float  # the length of the perturbation
    adaptive: bool = False  # in units of each weight

    @contextmanager
    def perturbed(self, model: nn.Module) -> Iterator[None]:
        """Perturb the weights by `rho` along the gradient, then clear gradients; on leaving, restore weights and buffers exactly.

        A gradient scaler's factor does not change the direction. Running statistics stay those of the unperturbed weights.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        before = [parameter.detach().clone() for parameter in parameters]
        buffers = [buffer.clone() for buffer in model.buffers()]
        with torch.no_grad():
            scales: list[Any] = [weight.abs() for weight in before] if self.adaptive else [1.0] * len(before)
            gradients: list[Any] = [parameter.grad for parameter in parameters]
            slopes = [gradient * scale for gradient, scale in zip(gradients, scales, strict=True)]
            step = self.rho / torch.nn.utils.get_total_norm(slopes).clamp(min=TINY)
            for parameter, slope, scale in zip(parameters, slopes, scales, strict=True):
                parameter.add_(slope * scale * step)
                parameter.grad = None
        yield
        with torch.no_grad():
            for tensor, value in zip([*parameters, *model.buffers()], [*before, *buffers], strict=True):
                tensor.copy_(value)
