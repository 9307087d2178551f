"""A small CNN on the project's own layers alone; scripts/train_mnist.py trains it."""

import torch
from torch import Tensor, nn

from robust.conv.layers import BatchNorm2d, Conv2d, Linear, ReLU

THRESHOLDS = (0.3, 0.5, 0.7)  # with which the first layer begins


class MnistCNN(nn.Module):
    """(N, 1, 28, 28) pixels in [0, 1] to (N, 10) logits, by 110,902 parameters.

    Strides take the place of pooling, as in the network of arXiv 1711.00851: adversarial training sees every image
    many times. Before them each pixel, on its own, goes through a ReLU on either side of some thresholds: networks that
    resist linf 0.3 learn to tell ink from paper so, and this one begins with it.
    """

    input_size = (1, 28, 28)
    class_names = tuple("0123456789")

    def __init__(self) -> None:
        super().__init__()
        sides = 2 * len(THRESHOLDS)
        thresholds = Conv2d(1, sides, 1)
        with torch.no_grad():  # relu(2 (x - t)), relu(2 (t - x))
            slopes = torch.tensor([2.0, -2.0] * len(THRESHOLDS))
            thresholds.weight.copy_(slopes.view(-1, 1, 1, 1))
            thresholds.bias = nn.Parameter(-slopes * torch.tensor(THRESHOLDS).repeat_interleave(2))
        self.layers = nn.Sequential(
            thresholds, ReLU(),  # (N, 6, 28, 28)
            Conv2d(sides, 16, 4, stride=2, padding=1, bias=False), BatchNorm2d(16), ReLU(),  # (N, 16, 14, 14)
            Conv2d(16, 32, 4, stride=2, padding=1, bias=False), BatchNorm2d(32), ReLU(),  # (N, 32, 7, 7)
            nn.Flatten(),
            Linear(32 * 7 * 7, 64), ReLU(),
            Linear(64, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
