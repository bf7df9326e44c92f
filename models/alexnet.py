"""AlexNet.

Alex Krizhevsky, Ilya Sutskever, Geoffrey E. Hinton (2012): ImageNet Classification with Deep Convolutional Neural Networks.
NIPS. https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks
Alex Krizhevsky (2014): One weird trick for parallelizing convolutional neural networks. https://arxiv.org/abs/1404.5997

Five convolutions and three fully connected layers; ReLU instead of tanh, overlapping pooling, dropout.

Two networks go by this name. The default is torchvision's one tower, from the second paper: narrower convolutions, no groups and
no normalisation. `two_towers=True` is the network of 2012: the second, fourth and fifth convolution see only the maps of their own
half (each lay on a GPU of its own), and the first two are followed by local response normalisation.

Where copies of that one go wrong:
- The paper's normalisation is b = a / (2 + 1e-4 * sum of a^2 over 5 channels)^0.75. PyTorch's `LocalResponseNorm` divides alpha by
  the five channels, so that the paper's alpha is 5e-4 there; and its k is 1 unless told otherwise.
- The order is convolution, ReLU, normalisation, pooling; the third convolution isn't grouped.
- The paper's images of 224x224 don't give its own first map of 55x55; a padding of 2 does (as in torchvision), and so would 227x227.
- Weights start from a normal distribution of std 0.01; the biases of the second, fourth and fifth convolution and of the hidden
  fully connected layers at 1, all others at 0. (torchvision's one tower starts as PyTorch's layers do, and does so here.)
- The paper drops the hidden layers' outputs, torchvision the inputs of the fully connected layers. Each is kept in its network.

`first_block` is the stem: "imagenet" the 11x11 convolution of stride 4 with a pooling, for images from 63x63 on; "cifar10" a 3x3 of
stride 1 without one, which gives a 32x32 image maps of 32, 15 and 7 where the paper has 27, 13 and 6.

Module names are torchvision's, so its weights load unchanged.
"""

from typing import Literal

import torch
from torch import Tensor, nn


def convolutions(
    stem: list[nn.Module], channels: tuple[int, int, int, int, int], groups: int, norm: list[nn.Module]
) -> nn.Sequential:
    """`stem` is the first convolution; `norm` follows the ReLU of the first two. An Identity keeps the place of the pooling."""
    c1, c2, c3, c4, c5 = channels
    conv1, pool1 = stem
    return nn.Sequential(
        conv1,
        nn.ReLU(inplace=True),
        *norm,
        pool1,
        nn.Conv2d(c1, c2, kernel_size=5, padding=2, groups=groups),
        nn.ReLU(inplace=True),
        *norm,
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(c2, c3, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(c3, c4, kernel_size=3, padding=1, groups=groups),
        nn.ReLU(inplace=True),
        nn.Conv2d(c4, c5, kernel_size=3, padding=1, groups=groups),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )
