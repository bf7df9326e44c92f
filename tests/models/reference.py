"""Compare a model of this project with the reference implementation whose weights it must load."""

import torch
from torch import Tensor, nn


def randomize(model: nn.Module, img_size: int, in_channels: int = 3, seed: int = 0) -> nn.Module:
    """Draw weights and BatchNorm statistics such that activations stay of order one and every parameter matters."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5)
        elif name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0  # use the statistics of this batch only
    with torch.no_grad():
        model(torch.randn(4, in_channels, img_size, img_size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
    return model.eval()


@torch.no_grad()
def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, in units of the logits' spread between images."""
    spread = theirs.std(dim=0).mean()
    assert spread > 1e-3, "the logits don't depend on the image: this comparison is meaningless"
    return float((ours - theirs).abs().max() / spread)


@torch.no_grad()
def assert_same_output(ours: nn.Module, theirs: nn.Module, img_size: int, in_channels: int = 3) -> None:
    """Check that both models return the same logits for the same images, in float64 and in float32."""
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        torch.manual_seed(1)
        images = torch.randn(4, in_channels, img_size, img_size, dtype=dtype)
        error = relative_error(ours.to(dtype).eval()(images), theirs.to(dtype).eval()(images))
        assert error < tolerance, f"{dtype}: the logits differ by {error:.2g} of their spread"


def assert_loads_and_agrees(ours: nn.Module, theirs: nn.Module, img_size: int) -> None:
    """Draw random weights for `theirs`, load them into `ours` (same names and shapes), and compare the logits."""
    randomize(theirs, img_size)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_output(ours, theirs, img_size)
