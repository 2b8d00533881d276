"""ShuffleNetV2 for 32x32 images: Ma et al., arXiv:1807.11164.

Each unit leaves half of the channels alone, transforms the other half and shuffles the two. As in
arXiv:1910.10699 the stem is a 1x1 convolution and there is no early pooling, so that a 32x32 image ends at
4x4.
"""

from __future__ import annotations

import torch
from torch import nn

from tutelage.models.shufflenet_v1 import ChannelShuffle


def _pointwise(a: int, b: int) -> list[nn.Module]:
    return [nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    ]


class SplitUnit(nn.Module):
    """Half of the channels pass, half go through 1x1, 3x3 depthwise and 1x1 convolutions; then a shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(*_pointwise(half, half), *_depthwise(half, 1), *_pointwise(half, half))
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, changed = x.chunk(2, 1)
        return self.shuffle(torch.cat([kept, self.branch(changed)], 1))


class DownUnit(nn.Module):
    """Two branches of stride 2, each giving half of the new channels; then a shuffle."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.left = nn.Sequential(*_depthwise(in_channels, 2), *_pointwise(in_channels, half))
        self.right = nn.Sequential(*_pointwise(in_channels, half), *_depthwise(half, 2), *_pointwise(half, half))
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shuffle(torch.cat([self.left(x), self.right(x)], 1))


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 for small images.

    Args:
        num_classes: the number of logits.
        in_channels: 3 for colour images, 1 for grey.
        channels: of the three stages (even) and of the last convolution; the default is the paper's 1x.

    Tappable parts: ``conv1``, ``bn1``, ``relu``, ``layer1``, ``layer2``, ``layer3``, ``head``, ``avgpool``,
    ``linear``.

    >>> ShuffleNetV2()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        channels: tuple[int, int, int, int] = (116, 232, 464, 1024),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()

        def stage(a: int, b: int, blocks: int) -> nn.Sequential:
            return nn.Sequential(DownUnit(a, b), *(SplitUnit(b) for _ in range(blocks)))

        self.layer1 = stage(24, channels[0], 3)
        self.layer2 = stage(channels[0], channels[1], 7)
        self.layer3 = stage(channels[1], channels[2], 3)
        self.head = nn.Sequential(*_pointwise(channels[2], channels[3]))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[3], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(self.head(x)).flatten(1))


def shufflenetv2(num_classes: int = 10, in_channels: int = 3) -> ShuffleNetV2:
    """ShuffleNetV2 1x (1,355,528 parameters for 100 classes)."""
    return ShuffleNetV2(num_classes, in_channels)
