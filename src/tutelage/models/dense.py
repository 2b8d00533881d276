"""A detector and a key point estimator that train in seconds on a processor: the small network with dense heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tutelage.models.small import SmallCNN


class Detected(NamedTuple):
    """What :class:`SmallDetector` says of each cell.

    Args:
        logits: (B, num_classes, H, W); class 0 is the background.
        boxes: (B, 4, H, W), distances to the box's left, top, right and bottom from the cell's middle, in cells.
    """

    logits: Tensor
    boxes: Tensor


class _Stages(nn.Module):
    """The stages of :class:`SmallCNN` as they are there, without its classifier: cells of 4 pixels."""

    def __init__(self, width: int, depth: int, in_channels: int) -> None:
        super().__init__()
        whole = SmallCNN(width, depth, in_channels, num_classes=1)
        self.stage1, self.stage2, self.stage3, self.pool = whole.stage1, whole.stage2, whole.stage3, whole.pool

    def features(self, images: Tensor) -> Tensor:
        return self.stage3(self.pool(self.stage2(self.pool(self.stage1(images)))))


class SmallDetector(_Stages):
    """The three stages of :class:`SmallCNN`, pooled once more to cells of 8 pixels, and a class and a box for each.

    Both heads are one 3x3 convolution.

    Args:
        width: the channels of the first stage.
        depth: convolutions in each stage.
        in_channels: 1 for grey images, 3 for colour.
        num_classes: with the background, which is class 0.

    Tappable parts: ``stage1``, ``stage2``, ``stage3``, ``classes``, ``boxes``, and the fields ``@logits``, ``@boxes``.
    A file holds one output: export :class:`Joined`.

    >>> found = SmallDetector(width=8)(torch.zeros(2, 1, 48, 48))
    >>> found.logits.shape, found.boxes.shape
    (torch.Size([2, 11, 6, 6]), torch.Size([2, 4, 6, 6]))
    """

    def __init__(self, width: int = 16, depth: int = 1, in_channels: int = 1, num_classes: int = 11) -> None:
        super().__init__(width, depth, in_channels)
        self.classes = nn.Conv2d(4 * width, num_classes, 3, padding=1)
        self.boxes = nn.Conv2d(4 * width, 4, 3, padding=1)

    def forward(self, images: Tensor) -> Detected:
        """Classes and boxes of images (B, in_channels, H, W), for cells (B, ..., H/8, W/8)."""
        features = self.pool(self.features(images))
        return Detected(self.classes(features), self.boxes(features))


class Joined(nn.Module):
    """A detector whose class logits and boxes are one tensor (B, num_classes + 4, H, W), for a file with one output.

    Args:
        detector: whose output has fields ``logits`` and ``boxes``; not copied.

    >>> Joined(SmallDetector(width=8))(torch.zeros(2, 1, 48, 48)).shape
    torch.Size([2, 15, 6, 6])
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        """Logits and then boxes along the channels."""
        found = self.detector(images)
        return torch.cat([found.logits, found.boxes], 1)


class SmallKeypoints(_Stages):
    """The three stages of :class:`SmallCNN` and, in cells of 4 pixels, a heat map for each key point.

    Args:
        width: the channels of the first stage.
        depth: convolutions in each stage.
        in_channels: 1 for grey images, 3 for colour.
        points: how many key points.

    Tappable parts: ``stage1``, ``stage2``, ``stage3``, ``maps``.

    >>> SmallKeypoints(width=8)(torch.zeros(2, 1, 48, 48)).shape
    torch.Size([2, 5, 12, 12])
    """

    def __init__(self, width: int = 16, depth: int = 1, in_channels: int = 1, points: int = 5) -> None:
        super().__init__(width, depth, in_channels)
        self.maps = nn.Conv2d(4 * width, points, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Heat maps (B, points, H/4, W/4) of images (B, in_channels, H, W)."""
        return self.maps(self.features(images))
