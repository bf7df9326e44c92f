"""Network in Network.

Min Lin, Qiang Chen, Shuicheng Yan (2014): Network In Network.
ICLR. https://arxiv.org/abs/1312.4400

A linear filter is replaced by a small network that slides over the image: a convolution and two 1x1 convolutions, each with a
ReLU ("mlpconv"). The maps of the last one are the classes, averaged over the image in place of fully connected layers. This is
the authors' network for CIFAR-10; the paper doesn't list the widths, its code does.

Where copies differ, and the choice made here:
- The two poolings are 3x3 with stride 2 in ceil mode, as in the authors' code (cuda-convnet and Caffe both round up), so that the
  maps of a 32x32 image are 32, 16 and 8. With padding 1 the sizes are the same, but the windows lie a pixel further up and left.
- The second pooling is an average in the trained model that the first author published for Caffe
  (https://gist.github.com/mavenlin/e56253735ef32c3c296d), and a maximum, like the first, in the older definition of
  https://github.com/mavenlin/cuda-convnet/tree/master/NIN. It is an average here.
- The class maps pass through a ReLU before they are averaged, in both of these. No BatchNorm; dropout of 0.5 after both poolings.
- Initial weights are normal with std 0.05, biases 0 (the older definition, cifar-10_def).

Layer names are those of the authors' code (cccp: cascaded cross-channel parametric pooling). Fully convolutional: accepts images
from 4x4 on, though it was designed for 32x32.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class NetworkInNetwork(nn.Module):
    HEAD = ("cccp6",)
    CLASSIFIERS = ("cccp6",)
    FIRST_CONV = "conv1"

    def __init__(self, *, n_classes: int = 10, in_channels: int = 3, img_size: int = 32, pdrop: float = 0.5) -> None:
        super().__init__()
        if img_size < 4:
            raise ValueError(f"Network in Network pools twice and reads images of 4x4 and more; img_size is {img_size}")
        self.conv1 = nn.Conv2d(in_channels, 192, kernel_size=5, padding=2)
        self.cccp1 = nn.Conv2d(192, 160, kernel_size=1)
        self.cccp2 = nn.Conv2d(160, 96, kernel_size=1)
        self.pool1 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.drop1 = nn.Dropout(pdrop)
        self.conv2 = nn.Conv2d(96, 192, kernel_size=5, padding=2)
        self.cccp3 = nn.Conv2d(192, 192, kernel_size=1)
        self.cccp4 = nn.Conv2d(192, 192, kernel_size=1)
        self.pool2 = nn.AvgPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.drop2 = nn.Dropout(pdrop)
        self.conv3 = nn.Conv2d(192, 192, kernel_size=3, padding=1)
        self.cccp5 = nn.Conv2d(192, 192, kernel_size=1)
        self.cccp6 = nn.Conv2d(192, n_classes, kernel_size=1)
        self.num_features = 192
        maps = ((96, 1, "cccp2"), (192, 2, "cccp4"), (192, 4, "cccp5"))
        self.feature_info = [{"num_chs": channels, "reduction": reduction, "module": name} for channels, reduction, name in maps]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                nn.init.normal_(module.weight, std=0.05)
                nn.init.zeros_(module.bias)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        m1 = _mlpconv(x, self.conv1, self.cccp1, self.cccp2)
        m2 = _mlpconv(self.drop1(self.pool1(m1)), self.conv2, self.cccp3, self.cccp4)
        m3 = _mlpconv(self.drop2(self.pool2(m2)), self.conv3, self.cccp5)
        return [m1, m2, m3]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The embedding is the average of the maps from which the classes are computed: no single vector precedes the classes."""
        if not pre_logits:
            x = F.relu(self.cccp6(x))
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _mlpconv(x: Tensor, *layers: nn.Conv2d) -> Tensor:
    for layer in layers:
        x = F.relu(layer(x))
    return x


MODELS = {"nin": NetworkInNetwork}
