"""Two networks that train in seconds on a processor: a perceptron and a three-stage convolutional one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class MLP(nn.Module):
    """Linear-ReLU layers on the flattened input, then ``linear``, the classifier.

    Args:
        in_features: the size of one flattened input.
        hidden: the width of each hidden layer; empty for a linear classifier.
        num_classes: the number of logits.

    Tappable parts: ``hidden.0``, ``hidden.1``, ... (each one Linear-ReLU pair) and ``linear``.

    >>> MLP(28 * 28, hidden=(64,), num_classes=10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = (256, 128), num_classes: int = 10) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        self.hidden = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)))
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, num_classes)`` of ``x`` of shape ``(N, ...)`` with ``in_features`` values an item."""
        return self.linear(self.hidden(x.flatten(1)))


def _stage(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [
            nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class SmallCNN(nn.Module):
    """Three stages of 3x3 conv-BN-ReLU with 2x2 max pooling between them, global mean, ``linear``.

    Stage ``i`` has ``width * 2**(i-1)`` channels and ``depth`` convolutions. Any image size from 4x4 up.

    Args:
        width: the channels of the first stage.
        depth: convolutions in each stage.
        in_channels: 1 for grey images, 3 for colour.
        num_classes: the number of logits.

    Tappable parts: ``stage1``, ``stage2``, ``stage3`` (before the pooling), ``pool`` (called twice),
    ``avgpool``, ``linear``.

    >>> student = SmallCNN(width=8)
    >>> sum(p.numel() for p in student.parameters())
    6274
    >>> student(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: int = 16, depth: int = 1, in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"width and depth must be at least 1, got width={width}, depth={depth}")
        self.stage1 = _stage(in_channels, width, depth)
        self.stage2 = _stage(width, 2 * width, depth)
        self.stage3 = _stage(2 * width, 4 * width, depth)
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.pool(self.stage1(x))
        x = self.pool(self.stage2(x))
        return self.linear(self.avgpool(self.stage3(x)).flatten(1))
