"""ShuffleNet for 32x32 images: Zhang et al., arXiv:1707.01083.

Bottleneck blocks with grouped 1x1 convolutions, whose groups exchange channels by a shuffle. As in
arXiv:1910.10699 the stem is a 1x1 convolution and there is no early pooling, so that a 32x32 image ends at
4x4.
"""

from __future__ import annotations

import torch
from torch import nn


class ChannelShuffle(nn.Module):
    """Channel ``k`` of group ``g`` goes to place ``k * groups + g``.

    >>> ChannelShuffle(2)(torch.arange(6.0).reshape(1, 6, 1, 1)).flatten().tolist()
    [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; then ``relu`` of the sum with the input.

    With stride 2 the result is joined to the average-pooled input along the channels instead of added to it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, first: bool) -> None:
        super().__init__()
        added = out_channels - in_channels if stride == 2 else out_channels
        # A quarter of what the unit adds, as in the study's network; the paper takes a quarter of the output.
        middle = added // 4
        # The 24 channels of the stem are too few to be divided.
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=1 if first else groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.shuffle = ChannelShuffle(1 if first else groups)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, added, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(added)
        self.relu = nn.ReLU()
        self.pool: nn.Module | None = nn.AvgPool2d(3, 2, 1) if stride == 2 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shuffle(self.relu(self.bn1(self.conv1(x))))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(torch.cat([y, self.pool(x)], 1) if self.pool is not None else y + x)


class ShuffleNetV1(nn.Module):
    """ShuffleNet with three groups for small images.

    Args:
        num_classes: the number of logits.
        in_channels: 3 for colour images, 1 for grey.
        groups: groups of the 1x1 convolutions.
        channels: of the three stages; each, and each less the one before (24 at first), a multiple of
            ``4 * groups``.

    Tappable parts: ``conv1``, ``bn1``, ``relu``, ``layer1``, ``layer2``, ``layer3``, ``avgpool``, ``linear``.

    >>> ShuffleNetV1()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        groups: int = 3,
        channels: tuple[int, int, int] = (240, 480, 960),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()

        def stage(a: int, b: int, blocks: int, first: bool) -> nn.Sequential:
            units = [ShuffleUnit(a, b, 2, groups, first)]
            units += [ShuffleUnit(b, b, 1, groups, False) for _ in range(blocks - 1)]
            return nn.Sequential(*units)

        self.layer1 = stage(24, channels[0], 4, True)
        self.layer2 = stage(channels[0], channels[1], 8, False)
        self.layer3 = stage(channels[1], channels[2], 4, False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels[2], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def shufflenetv1(num_classes: int = 10, in_channels: int = 3) -> ShuffleNetV1:
    """ShuffleNet, three groups, 240-480-960 channels (949,258 parameters for 100 classes)."""
    return ShuffleNetV1(num_classes, in_channels)
