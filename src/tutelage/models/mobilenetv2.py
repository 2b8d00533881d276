"""MobileNetV2 for 32x32 images: Sandler et al., arXiv:1801.04381.

Inverted residuals: a 1x1 convolution widens ``t``-fold, a 3x3 depthwise convolution mixes space, and a 1x1
convolution without activation narrows again. The half-width network of arXiv:1910.10699 has the strides of
the ImageNet network but for the second stage, which keeps its resolution, so that a 32x32 image ends at
2x2.
"""

from __future__ import annotations

import torch
from torch import nn

# Channels at width 1, blocks, stride of the first block. The expansion of stage 1 is 1.
STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


def _conv(a: int, b: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(b),
        nn.ReLU(),
    ]


class InvertedResidual(nn.Module):
    """Widen, filter in depth, narrow; plus the input where the shape is the same."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = in_channels * expansion
        self.conv = nn.Sequential(
            *_conv(in_channels, middle, 1),
            *_conv(middle, middle, 3, stride, groups=middle),
            nn.Conv2d(middle, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 for small images.

    Args:
        width: the factor of the channels of the stages and the stem; the last 1280 channels stay.
        expansion: ``t``, how much wider a block is inside than outside.
        num_classes: the number of logits.
        in_channels: 3 for colour images, 1 for grey.

    Tappable parts: ``stem``, ``stages.0`` to ``stages.6``, ``head``, ``avgpool``, ``linear``. For a 32x32 image
    the stages are 16, 16, 8, 4, 4, 2 and 2 pixels wide.

    >>> MobileNetV2(0.5)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, width: float = 0.5, expansion: int = 6, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        channels = int(32 * width)
        self.stem = nn.Sequential(*_conv(in_channels, channels, 3, 2))
        stages = []
        for i, (base, blocks, stride) in enumerate(STAGES):
            out = int(base * width)
            t = 1 if i == 0 else expansion
            first = InvertedResidual(channels, out, stride, t)
            rest = (InvertedResidual(out, out, 1, t) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *rest))
            channels = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(*_conv(channels, 1280, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.linear.weight, 0, 0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, in_channels, H, W)``."""
        x = self.stages(self.stem(x))
        return self.linear(self.avgpool(self.head(x)).flatten(1))


def mobilenetv2_half(num_classes: int = 10, in_channels: int = 3) -> MobileNetV2:
    """MobileNetV2 of half width, expansion 6 (812,836 parameters for 100 classes)."""
    return MobileNetV2(0.5, 6, num_classes, in_channels)
