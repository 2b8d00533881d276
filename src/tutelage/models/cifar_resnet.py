"""Residual networks for 32x32 images: He et al., arXiv:1512.03385, section 4.2.

Depth ``6n + 2``: a 3x3 stem, three stages of ``n`` two-convolution blocks at full, half and quarter
resolution, a global mean and a linear classifier. The ``x4`` networks are four times as wide (and their
stem twice), as in "Contrastive Representation Distillation", arXiv:1910.10699.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

Shortcut = Literal["projection", "padding"]


class BasicBlock(nn.Module):
    """``relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))``; ``relu`` is one module, called twice."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.stride = stride
        self.padding = 0
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            if shortcut == "projection":
                self.downsample = nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
                )
            else:
                self.padding = (out_channels - in_channels) // 2

    def _shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.downsample is not None:
            return self.downsample(x)
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        # Option A of the paper: new channels are zeros, half of them on each side.
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding)) if self.padding else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self._shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet of depth ``6n + 2`` for small images.

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110 or any other ``6n + 2``.
        widths: channels of the stem and of the three stages.
        num_classes: the number of logits.
        in_channels: 3 for colour images, 1 for grey.
        shortcut: where a block changes shape, ``"projection"`` (1x1 convolution and batch norm, as the CRD
            study uses) or ``"padding"`` (He's option A: subsampling and zero channels, no parameters).

    Tappable parts: ``conv1``, ``bn1``, ``relu``, ``layer1``, ``layer2``, ``layer3``, ``avgpool``, ``linear``.

    Raises:
        ValueError: for a depth that is not ``6n + 2`` or an unknown shortcut.

    >>> CifarResNet(20)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 10,
        in_channels: int = 3,
        shortcut: Shortcut = "projection",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, 32, ...), got {depth}")
        if shortcut not in ("projection", "padding"):
            raise ValueError(f"shortcut must be 'projection' or 'padding', got {shortcut!r}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()

        def stage(a: int, b: int, stride: int) -> nn.Sequential:
            first = BasicBlock(a, b, stride, shortcut)
            return nn.Sequential(first, *(BasicBlock(b, b, 1, shortcut) for _ in range(blocks - 1)))

        self.layer1 = stage(widths[0], widths[1], 1)
        self.layer2 = stage(widths[1], widths[2], 2)
        self.layer3 = stage(widths[2], widths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def resnet8(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection") -> CifarResNet:
    """ResNet-8, widths 16-32-64 (83,892 parameters for 100 classes)."""
    return CifarResNet(8, (16, 16, 32, 64), num_classes, in_channels, shortcut)


def resnet14(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection") -> CifarResNet:
    """ResNet-14, widths 16-32-64 (181,108 parameters for 100 classes)."""
    return CifarResNet(14, (16, 16, 32, 64), num_classes, in_channels, shortcut)


def resnet20(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection") -> CifarResNet:
    """ResNet-20, widths 16-32-64 (278,324 parameters for 100 classes)."""
    return CifarResNet(20, (16, 16, 32, 64), num_classes, in_channels, shortcut)


def resnet32(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection") -> CifarResNet:
    """ResNet-32, widths 16-32-64 (472,756 parameters for 100 classes)."""
    return CifarResNet(32, (16, 16, 32, 64), num_classes, in_channels, shortcut)


def resnet44(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection") -> CifarResNet:
    """ResNet-44, widths 16-32-64 (667,188 parameters for 100 classes)."""
    return CifarResNet(44, (16, 16, 32, 64), num_classes, in_channels, shortcut)


def resnet56(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection") -> CifarResNet:
    """ResNet-56, widths 16-32-64 (861,620 parameters for 100 classes)."""
    return CifarResNet(56, (16, 16, 32, 64), num_classes, in_channels, shortcut)


def resnet110(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection") -> CifarResNet:
    """ResNet-110, widths 16-32-64 (1,736,564 parameters for 100 classes)."""
    return CifarResNet(110, (16, 16, 32, 64), num_classes, in_channels, shortcut)


def resnet8x4(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection") -> CifarResNet:
    """ResNet-8 four times as wide: stem 32, stages 64-128-256 (1,233,540 parameters for 100 classes)."""
    return CifarResNet(8, (32, 64, 128, 256), num_classes, in_channels, shortcut)


def resnet32x4(num_classes: int = 10, in_channels: int = 3, shortcut: Shortcut = "projection") -> CifarResNet:
    """ResNet-32 four times as wide: stem 32, stages 64-128-256 (7,433,860 parameters for 100 classes)."""
    return CifarResNet(32, (32, 64, 128, 256), num_classes, in_channels, shortcut)
