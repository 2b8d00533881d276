"""Wide residual networks for 32x32 images: Zagoruyko and Komodakis, arXiv:1605.07146.

Depth ``6n + 4``: a 3x3 stem of 16 channels, three stages of ``n`` pre-activation blocks with ``16k``,
``32k`` and ``64k`` channels, batch norm, a global mean and a linear classifier.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class PreActivationBlock(nn.Module):
    """``conv2(relu(bn2(conv1(a)))) + shortcut`` with ``a = relu(bn1(x))``.

    The shortcut is ``x``, or where the number of channels changes a 1x1 convolution of ``a``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.dropout = dropout
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.relu(self.bn1(x))
        y = self.relu(self.bn2(self.conv1(active)))
        y = self.conv2(F.dropout(y, self.dropout, self.training))
        return y + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """WRN-depth-k for small images.

    Args:
        depth: ``6n + 4``: 16, 22, 28, 40, ...
        widen: ``k``, the factor of the widths.
        num_classes: the number of logits.
        in_channels: 3 for colour images, 1 for grey.
        dropout: between the convolutions of a block.

    Tappable parts: ``conv1``, ``layer1``, ``layer2``, ``layer3``, ``bn``, ``relu``, ``avgpool``,
    ``linear``. A stage's output is before its activation; the activations are inside the blocks that
    follow.

    Raises:
        ValueError: for a depth that is not ``6n + 4``.

    >>> WideResNet(16, 1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, depth: int, widen: int, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, 28, 40, ...), got {depth}")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)

        def stage(a: int, b: int, stride: int) -> nn.Sequential:
            first = PreActivationBlock(a, b, stride, dropout)
            return nn.Sequential(first, *(PreActivationBlock(b, b, 1, dropout) for _ in range(blocks - 1)))

        self.layer1 = stage(16, 16 * widen, 1)
        self.layer2 = stage(16 * widen, 32 * widen, 2)
        self.layer3 = stage(32 * widen, 64 * widen, 2)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(self.avgpool(self.relu(self.bn(x))).flatten(1))


def wrn_16_1(num_classes: int = 10, in_channels: int = 3) -> WideResNet:
    """WRN-16-1 (180,916 parameters for 100 classes)."""
    return WideResNet(16, 1, num_classes, in_channels)


def wrn_16_2(num_classes: int = 10, in_channels: int = 3) -> WideResNet:
    """WRN-16-2 (703,284 parameters for 100 classes)."""
    return WideResNet(16, 2, num_classes, in_channels)


def wrn_40_1(num_classes: int = 10, in_channels: int = 3) -> WideResNet:
    """WRN-40-1 (569,780 parameters for 100 classes)."""
    return WideResNet(40, 1, num_classes, in_channels)


def wrn_40_2(num_classes: int = 10, in_channels: int = 3) -> WideResNet:
    """WRN-40-2 (2,255,156 parameters for 100 classes)."""
    return WideResNet(40, 2, num_classes, in_channels)
