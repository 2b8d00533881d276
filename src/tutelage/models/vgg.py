"""VGG networks with batch norm for 32x32 images: Simonyan and Zisserman, arXiv:1409.1556.

Five blocks of 3x3 convolutions with 64, 128, 256, 512 and 512 channels, 2x2 max pooling after each of the
first three, a global mean and one linear layer in place of the three large ones (as in arXiv:1910.10699).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """A VGG for small images.

    Args:
        convolutions: how many 3x3 convolutions each of the five blocks has.
        num_classes: the number of logits.
        in_channels: 3 for colour images, 1 for grey.

    Tappable parts: ``block1`` to ``block5`` (conv-BN-ReLU, before the pooling), ``pool`` (called three
    times), ``avgpool``, ``linear``.

    Raises:
        ValueError: unless there are five positive counts.

    >>> VGG((1, 1, 1, 1, 1))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, convolutions: Sequence[int], num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if len(convolutions) != len(CHANNELS) or min(convolutions) < 1:
            raise ValueError(f"convolutions must be five positive counts, got {tuple(convolutions)}")

        def block(a: int, b: int, count: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i in range(count):
                layers += [nn.Conv2d(a if i == 0 else b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
            return nn.Sequential(*layers)

        self.block1 = block(in_channels, CHANNELS[0], convolutions[0])
        self.block2 = block(CHANNELS[0], CHANNELS[1], convolutions[1])
        self.block3 = block(CHANNELS[1], CHANNELS[2], convolutions[2])
        self.block4 = block(CHANNELS[2], CHANNELS[3], convolutions[3])
        self.block5 = block(CHANNELS[3], CHANNELS[4], convolutions[4])
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(CHANNELS[4], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.linear.weight, 0, 0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``, sides of 8 at least."""
        x = self.pool(self.block1(x))
        x = self.pool(self.block2(x))
        x = self.pool(self.block3(x))
        return self.linear(self.avgpool(self.block5(self.block4(x))).flatten(1))


def vgg8(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-8, one convolution a block (3,965,028 parameters for 100 classes)."""
    return VGG((1, 1, 1, 1, 1), num_classes, in_channels)


def vgg11(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-11 (9,277,284 parameters for 100 classes)."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels)


def vgg13(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-13 (9,462,180 parameters for 100 classes)."""
    return VGG((2, 2, 2, 2, 2), num_classes, in_channels)


def vgg16(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-16 (14,774,436 parameters for 100 classes)."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels)


def vgg19(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-19 (20,086,692 parameters for 100 classes)."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels)
