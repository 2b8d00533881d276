"""Key points as heat maps: each map's peak is where its point is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import in_float32, logits_of
from tutelage.tasks import Figures
from tutelage.views import Batch


@dataclass(frozen=True)
class KeypointMetrics(Figures):
    """What an evaluation of key points found; shares are between 0 and 1.

    Args:
        pck: share of correct key points: those found within :attr:`Keypoints.within` pixels of the true ones.
        error: mean distance from the true ones, in pixels.
        samples: how many images these are of.
        agreement: the share of key points that the student and the teacher put within that distance of each other.
    """

    main: ClassVar[str] = "pck"
    title: ClassVar[str] = "PCK"
    pck: float
    error: float
    samples: int
    agreement: float | None = None


def gaussian_maps(points: Tensor, size: int, stride: int, sigma: float = 1.0) -> Tensor:
    """exp(−‖cell − point‖² / 2σ²): heat maps (B, K, size, size) whose values are those at the cells' middles.

    Args:
        points: (B, K, 2) x and y in pixels.
        size: cells of a side.
        stride: pixels of a cell's side.
        sigma: σ in cells.

    >>> gaussian_maps(torch.tensor([[[6.0, 2.0]]]), size=2, stride=4)
    tensor([[[[0.6065, 1.0000],
              [0.3679, 0.6065]]]])
    """
    middles = torch.arange(size) + 0.5
    x, y = ((points[..., axis, None] / stride - middles).square() for axis in (0, 1))
    return (-(y[..., :, None] + x[..., None, :]) / (2 * sigma**2)).exp()


def peaks(maps: Tensor, stride: int) -> Tensor:
    """Where the heat maps (B, K, H, W) are greatest, as x and y in pixels (B, K, 2).

    Between the cells the peak is that of the parabola through the logarithms of the greatest value and its two
    neighbours, which is exact for a Gaussian; beside the border it is the cell's middle.

    >>> peaks(gaussian_maps(torch.tensor([[[13.0, 18.5]]]), size=8, stride=4), stride=4)
    tensor([[[13.0000, 18.5000]]])
    """
    maps = in_float32(maps)
    height, width = maps.shape[2:]
    flat = maps.flatten(2).argmax(2)
    row, column = flat // width, flat % width
    logs = F.pad(maps.clamp(min=1e-6).log(), (1, 1, 1, 1)).flatten(2)

    def at(down: int, right: int) -> Tensor:
        place = (row + 1 + down) * (width + 2) + column + 1 + right
        return logs.gather(2, place[..., None])[..., 0]

    def offset(before: Tensor, here: Tensor, after: Tensor, inside: Tensor) -> Tensor:
        bend = 2 * here - before - after
        moved = ((after - before) / (2 * bend.clamp(min=1e-6))).clamp(-0.5, 0.5)
        return torch.where(inside & (bend > 1e-6), moved, 0.0)

    here = at(0, 0)
    x = column + 0.5 + offset(at(0, -1), here, at(0, 1), (column > 0) & (column < width - 1))
    y = row + 0.5 + offset(at(-1, 0), here, at(1, 0), (row > 0) & (row < height - 1))
    return torch.stack([x, y], -1) * stride


class Keypoints:
    """The task of data whose labels are heat maps (B, K, H, W) and whose field ``points`` are their points (B, K, 2).

    Args:
        stride: pixels of a cell's side.
        within: how near a point must be to be correct, in pixels.
    """

    name = "key points"

    def __init__(self, stride: int, within: float = 2.0):
        self.stride, self.within = stride, within

    def loss(self) -> Loss:
        return TaskLoss(F.mse_loss)

    def look(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        maps = logits_of(output)
        if maps is None:
            raise ValueError(f"evaluation: no heat maps in an output of type {type(output).__name__}")
        return peaks(maps, self.stride).cpu(), batch.student.kwargs["points"].cpu()

    def figures(self, looks: list[Any], theirs: list[Any] | None = None) -> KeypointMetrics:
        found, truth = (torch.cat(parts) for parts in zip(*looks, strict=True))
        distance = (found - truth).norm(dim=2)
        alike = None
        if theirs is not None:
            apart = (found - torch.cat([points for points, _ in theirs])).norm(dim=2)
            alike = float((apart <= self.within).double().mean())
        pck = float((distance <= self.within).double().mean())
        return KeypointMetrics(pck, float(distance.double().mean()), len(found), alike)
