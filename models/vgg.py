"""VGG.

Karen Simonyan, Andrew Zisserman (2015): Very Deep Convolutional Networks for Large-Scale Image Recognition.
ICLR. https://arxiv.org/abs/1409.1556

Nothing but 3x3 convolutions, in five groups of equal resolution, each followed by a 2x2 max pooling: two of them cover as much as
a 5x5, three as much as a 7x7, with fewer weights and more ReLUs. The number counts the layers with weights. The paper predates
BatchNorm; the `_bn` variants add one after each convolution, which keeps its bias, as torchvision's do.

Where copies differ: the head. The paper's three fully connected layers hold 124 million weights and are designed for the 7x7 map
of a 224x224 image. A 32x32 image leaves a single position, and what everybody calls VGG on CIFAR-10 has one linear layer there
(VGG-11 for ten classes: 9.23 million parameters). So images of 224x224 and more get the paper's head, smaller ones a linear layer
over the averaged map. `head` selects either at any size; the paper's then averages or repeats the map to 7x7, as torchvision's
does. Published weights are for the paper's head; the linear one loads nothing from it.

Initial weights are torchvision's: convolutions normal with the variance of their fan-out (He et al. 2015), linear layers normal
with std 0.01, biases 0. (The paper started its deeper networks from a trained VGG-11, and found later that Glorot's
initialization would have sufficed.)

Module names are torchvision's, so its weights load unchanged.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn


class VGG(nn.Module):
    HEAD = ("classifier",)
    FIRST_CONV = "features.0"

    def __init__(
        self,
        *,
        layers: Sequence[int],
        batch_norm: bool,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        head: Literal["paper", "linear"] | None = None,
        pdrop: float | None = None,
    ) -> None:
        """Choose the head by img_size if `head` is None. `pdrop` None means 0.5 in the paper's head and 0 in the linear one."""
        super().__init__()
        if img_size < 32:
            raise ValueError(f"VGG halves the image five times and reads 32x32 and more; img_size is {img_size}")
        if head not in ("paper", "linear", None):
            raise ValueError(f"head is {head!r}; it can be paper, linear or null (which follows img_size)")
        self.features, self.feature_info = _convolutions(in_channels, layers, batch_norm)
        self.head = head or ("paper" if img_size >= 224 else "linear")
        if self.head == "paper":
            pdrop = 0.5 if pdrop is None else pdrop
            self.num_features = 4096
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            self.classifier = nn.Sequential(
                nn.Linear(512 * 7 * 7, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(pdrop),
                nn.Linear(4096, 4096),
                nn.ReLU(inplace=True),
                nn.Dropout(pdrop),
                nn.Linear(4096, n_classes),
            )
        else:
            self.num_features = 512
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Sequential(nn.Dropout(pdrop or 0.0), nn.Linear(512, n_classes))
        self.CLASSIFIERS = (f"classifier.{len(self.classifier) - 1}",)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return [*maps, x]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.avgpool(x).flatten(1)  # B 512 H W -> B 25088, or B 512
        *hidden, classes = self.classifier
        for layer in hidden:
            x = layer(x)
        return x if pre_logits else classes(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _convolutions(in_channels: int, layers: Sequence[int], batch_norm: bool) -> tuple[nn.Sequential, list[dict]]:
    """Make the five groups and describe their maps: each before its pooling, and the last one after it as well."""
    modules: list[nn.Module] = []
    feature_info = []
    for group, (n_layers, channels) in enumerate(zip(layers, (64, 128, 256, 512, 512), strict=True)):
        for _ in range(n_layers):
            modules.append(nn.Conv2d(in_channels, channels, kernel_size=3, padding=1))
            if batch_norm:
                modules.append(nn.BatchNorm2d(channels))
            modules.append(nn.ReLU(inplace=True))
            in_channels = channels
        feature_info.append({"num_chs": channels, "reduction": 2**group, "module": f"features.{len(modules) - 1}"})
        modules.append(nn.MaxPool2d(kernel_size=2, stride=2))
    feature_info.append({"num_chs": in_channels, "reduction": 32, "module": f"features.{len(modules) - 1}"})
    return nn.Sequential(*modules), feature_info


LAYERS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # table 1: A, B, D, E
MODELS = {
    f"vgg{depth}{suffix}": partial(VGG, layers=layers, batch_norm=bool(suffix))
    for depth, layers in LAYERS.items()
    for suffix in ("", "_bn")
}
