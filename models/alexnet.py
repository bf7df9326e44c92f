"""AlexNet.

Alex Krizhevsky, Ilya Sutskever, Geoffrey E. Hinton (2012): ImageNet Classification with Deep Convolutional Neural Networks.
NIPS. https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks
Alex Krizhevsky (2014): One weird trick for parallelizing convolutional neural networks. https://arxiv.org/abs/1404.5997

Five convolutions and three fully connected layers; ReLU instead of tanh, overlapping pooling, dropout.

Two networks go by this name. The default is torchvision's one tower, from the second paper: narrower convolutions, no groups, no
normalization. `two_towers=True` is the network of 2012: the second, fourth and fifth convolution read only the maps of their own
half (the paper places each half on its own GPU), and the first two are followed by local response normalization.

Where copies of the latter go wrong:
- The paper's normalization has alpha = 1e-4 on the sum of squares over five channels, and k = 2. PyTorch's `LocalResponseNorm`
  divides alpha by the five, as Caffe's does, and its default k is 1; so it is written out here.
- The order is convolution, ReLU, normalization, pooling; the third convolution isn't grouped.
- The paper's first map of 55x55 needs a padding of 2 (as in torchvision) or images of 227x227 instead of its 224x224.
- Initial weights are normal with std 0.01; the biases of the second, fourth and fifth convolution and of the hidden fully
  connected layers are 1, all others 0. (The one tower keeps PyTorch's initialization, as in torchvision.)
- The paper drops the outputs of the hidden layers, torchvision their inputs. So does the respective network here.

`first_block` is the stem: "imagenet" is the 11x11 convolution of stride 4 with a pooling, for images from 63x63 on; "cifar10" is
a 3x3 of stride 1 without one, so that the maps of a 32x32 image are 32, 15 and 7 where those of a large one are 27, 13 and 6.

Module names are torchvision's, so its weights load unchanged.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


class LocalResponseNorm(nn.Module):
    """b_i = a_i / (k + alpha * sum of a_j^2 over the n channels around i)^beta, with the paper's constants."""

    k, n, alpha, beta = 2.0, 5, 1e-4, 0.75

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        squares = F.pad(x.square(), (0, 0, 0, 0, self.n // 2, self.n // 2))  # B C H W -> B 2+C+2 H W
        sums = sum(squares[:, i : i + channels] for i in range(self.n))
        return x / (self.k + self.alpha * sums) ** self.beta


class AlexNet(nn.Module):
    HEAD = ("classifier",)
    CLASSIFIERS = ("classifier.6",)
    FIRST_CONV = "features.0"

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: int = 224,
        first_block: Literal["imagenet", "cifar10"] = "imagenet",
        pdrop: float = 0.5,
        two_towers: bool = False,
    ) -> None:
        super().__init__()
        if first_block not in ("imagenet", "cifar10"):
            raise ValueError(f"first_block is {first_block!r}; it can be imagenet or cifar10")
        smallest = 63 if first_block == "imagenet" else 7  # smaller images leave no map for the last pooling
        if img_size < smallest:
            readable = f"images of {smallest}x{smallest} and more"
            raise ValueError(f"AlexNet with first_block {first_block} reads {readable}; img_size is {img_size}")
        channels = (96, 256, 384, 384, 256) if two_towers else (64, 192, 384, 256, 256)
        self.features = nn.Sequential(*_convolutions(in_channels, channels, first_block, two_towers))
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        hidden = [nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True)], [nn.Linear(4096, 4096), nn.ReLU(inplace=True)]
        if two_towers:
            layers = [*hidden[0], nn.Dropout(pdrop), *hidden[1], nn.Dropout(pdrop)]
        else:
            layers = [nn.Dropout(pdrop), *hidden[0], nn.Dropout(pdrop), *hidden[1]]
        self.num_features = 4096
        self.classifier = nn.Sequential(*layers, nn.Linear(self.num_features, n_classes))

        self.poolings = [i for i, layer in enumerate(self.features) if isinstance(layer, (nn.MaxPool2d, nn.Identity))]
        reductions = (4, 8, 16, 32) if first_block == "imagenet" else (1, 1, 2, 4)
        widths = (channels[0], channels[1], channels[4], channels[4])
        sources = (*(pooling - 1 for pooling in self.poolings), self.poolings[-1])
        maps = zip(widths, reductions, sources, strict=True)
        self.feature_info = [{"num_chs": n, "reduction": reduction, "module": f"features.{i}"} for n, reduction, i in maps]
        if two_towers:
            layers_with_weights = [module for module in self.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
            for number, layer in enumerate(layers_with_weights, start=1):
                assert layer.bias is not None
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.constant_(layer.bias, 1.0 if number in (2, 4, 5, 6, 7) else 0.0)  # 6 and 7: the hidden linear layers

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.features):
            if i in self.poolings:
                maps.append(x)
            x = layer(x)
        return [*maps, x]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.avgpool(x).flatten(1)  # B 256 H W -> B 9216
        *hidden, classes = self.classifier
        for layer in hidden:
            x = layer(x)
        return x if pre_logits else classes(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _convolutions(in_channels: int, channels: Sequence[int], first_block: str, two_towers: bool) -> list[nn.Module]:
    c1, c2, c3, c4, c5 = channels
    groups = 2 if two_towers else 1
    if first_block == "imagenet":
        conv1 = nn.Conv2d(in_channels, c1, kernel_size=11, stride=4, padding=2)
        pool1: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2)
    else:
        conv1 = nn.Conv2d(in_channels, c1, kernel_size=3, padding=1)
        pool1 = nn.Identity()
    return [
        conv1,
        nn.ReLU(inplace=True),
        *([LocalResponseNorm()] if two_towers else []),
        pool1,
        nn.Conv2d(c1, c2, kernel_size=5, padding=2, groups=groups),
        nn.ReLU(inplace=True),
        *([LocalResponseNorm()] if two_towers else []),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(c2, c3, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(c3, c4, kernel_size=3, padding=1, groups=groups),
        nn.ReLU(inplace=True),
        nn.Conv2d(c4, c5, kernel_size=3, padding=1, groups=groups),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    ]


MODELS = {"alexnet": AlexNet}
