"""LeNet-5.

Yann LeCun, Leon Bottou, Yoshua Bengio, Patrick Haffner (1998): Gradient-Based Learning Applied to Document Recognition.
Proceedings of the IEEE 86(11). http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf

Two convolutions, each followed by a sub-sampling, then three fully connected layers (the paper writes the first as a convolution
over the whole 5x5 map). The paper centers its 28x28 digits in a 32x32 field: `padding` adds that margin to a 28x28 image, and is
0 for a 32x32 one.

Differences from the paper, as in nearly every modern copy: ReLU and max pooling instead of the scaled tanh and the trainable
average pooling, all 16 maps of C3 connected to all 6 of S2, and a linear classifier instead of radial basis functions.
`classic=True` selects the paper's tanh and average pooling.
"""

from torch import Tensor, nn


class LeNet5(nn.Module):
    HEAD = ("fc1", "fc2", "fc3")
    CLASSIFIERS = ("fc3",)
    FIRST_CONV = "conv1"

    def __init__(
        self, *, n_classes: int = 10, in_channels: int = 1, img_size: int = 28, pdrop: float = 0.0, classic: bool = False
    ) -> None:
        super().__init__()
        if img_size < 28:
            raise ValueError(f"LeNet-5 reads images of 28x28 and more; img_size is {img_size}")
        padding = 2 if img_size < 32 else 0
        side = ((img_size + 2 * padding - 4) // 2 - 4) // 2  # of the map that the first fully connected layer reads
        self.conv1 = nn.Conv2d(in_channels, 6, kernel_size=5, padding=padding)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, n_classes)
        self.dropout = nn.Dropout(pdrop)
        self.activation = nn.Tanh() if classic else nn.ReLU()
        self.pool = nn.AvgPool2d(2) if classic else nn.MaxPool2d(2)
        self.num_features = 84
        self.feature_info = [
            {"num_chs": 6, "reduction": 2, "module": "conv1"},
            {"num_chs": 16, "reduction": 4, "module": "conv2"},
        ]

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        c1 = self.pool(self.activation(self.conv1(x)))
        c2 = self.pool(self.activation(self.conv2(c1)))
        return [c1, c2]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.activation(self.fc1(x.flatten(1)))
        x = self.dropout(self.activation(self.fc2(x)))
        return x if pre_logits else self.fc3(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


MODELS = {"lenet": LeNet5}
