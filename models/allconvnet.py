"""All-CNN-C.

Jost Tobias Springenberg, Alexey Dosovitskiy, Thomas Brox, Martin Riedmiller (2015): Striving for Simplicity: The All
Convolutional Net. ICLR workshop. https://arxiv.org/abs/1412.6806

Convolutions only: where others pool, a convolution has stride 2; where others have fully connected layers, there are 1x1
convolutions and an average over the image. This is "All-CNN-C" of the paper's tables, its best network on CIFAR.

Where copies go wrong:
- The seventh convolution isn't padded, so that the 8x8 map becomes the 6x6 map over which the paper averages.
- No BatchNorm. Dropout of 0.2 on the image and of 0.5 after each convolution of stride 2, of single values, not of whole maps.
- The class maps pass through a ReLU before they are averaged (in table 1, the last convolution of every model has one).

The paper doesn't specify the initial weights. Here they are those of https://github.com/mateuszbuda/ALL-CNN, a Caffe model that
nearly reaches the paper's accuracy: Caffe's "xavier", uniform with the variance 1 / fan-in, biases 0. The last ReLU can become
zero for every class and image, and then no gradient flows: the loss stays exactly that of guessing. Use another seed, a lower
learning rate, or `last_relu=False`, with which short runs do better. The paper uses the best learning rate of 0.25, 0.1, 0.05
and 0.01.

Fully convolutional: accepts images from 9x9 on, though it was designed for 32x32.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class AllConvNet(nn.Module):
    HEAD = ("conv9",)
    CLASSIFIERS = ("conv9",)
    FIRST_CONV = "conv1"

    def __init__(
        self,
        *,
        n_classes: int = 10,
        in_channels: int = 3,
        img_size: int = 32,
        pdrop_input: float = 0.2,
        pdrop: float = 0.5,
        last_relu: bool = True,
    ) -> None:
        super().__init__()
        if img_size < 9:
            raise ValueError(f"All-CNN-C reads images of 9x9 and more, its seventh layer isn't padded; img_size is {img_size}")
        self.drop1 = nn.Dropout(pdrop_input)
        self.conv1 = nn.Conv2d(in_channels, 96, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(96, 96, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(96, 96, kernel_size=3, padding=1, stride=2)
        self.drop2 = nn.Dropout(pdrop)
        self.conv4 = nn.Conv2d(96, 192, kernel_size=3, padding=1)
        self.conv5 = nn.Conv2d(192, 192, kernel_size=3, padding=1)
        self.conv6 = nn.Conv2d(192, 192, kernel_size=3, padding=1, stride=2)
        self.drop3 = nn.Dropout(pdrop)
        self.conv7 = nn.Conv2d(192, 192, kernel_size=3)
        self.conv8 = nn.Conv2d(192, 192, kernel_size=1)
        self.conv9 = nn.Conv2d(192, n_classes, kernel_size=1)
        self.last_relu = last_relu
        self.num_features = 192
        maps = ((96, 1, "conv2"), (192, 2, "conv5"), (192, 4, "conv8"))
        self.feature_info = [{"num_chs": channels, "reduction": reduction, "module": name} for channels, reduction, name in maps]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="linear")
                nn.init.zeros_(module.bias)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        c2 = _convolve(self.drop1(x), self.conv1, self.conv2)
        c3 = self.drop2(_convolve(c2, self.conv3))
        c5 = _convolve(c3, self.conv4, self.conv5)
        c6 = self.drop3(_convolve(c5, self.conv6))
        c8 = _convolve(c6, self.conv7, self.conv8)
        return [c2, c5, c8]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The embedding is the average of the maps from which the classes are computed: no single vector precedes the classes."""
        if not pre_logits:
            x = self.conv9(x)
            x = F.relu(x) if self.last_relu else x
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _convolve(x: Tensor, *layers: nn.Conv2d) -> Tensor:
    for layer in layers:
        x = F.relu(layer(x))
    return x


MODELS = {"allconvnet": AllConvNet}
