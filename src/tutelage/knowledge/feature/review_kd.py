"""Knowledge review: each of the teacher's layers is learnt from all deeper layers of the student together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.feature.batch_norm import BatchNorm
from tutelage.knowledge.relation.pairs import as_map
from tutelage.record import Record, in_float32
from tutelage.schedule import WarmUp, Weight
from tutelage.taps import embedding
from tutelage.views import Batch

LEVELS = (4, 2, 1)
"""The sizes to which the maps are pooled beside the full one, each weighing half of the one before."""
PUBLISHED_WEIGHT = WarmUp(1.0, until=20 / 240)
"""Reached after 20 of the authors' 240 epochs."""


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_l w_l · mean (pool_l(F_s) − pool_l(F_t))² / Σ_l w_l: the maps whole, and pooled to 4×4, 2×2 and 1×1.

    The whole map has w = 1, and each pooled size half the weight of the size before: 1, ½, ¼, ⅛. A size that is not
    smaller than the map is left out, and the next one takes its weight, as in the authors' code; an axis that is
    shorter than the size keeps its length.

    Args:
        student: a map (B, C, H, W).
        teacher: of the same shape; no gradient flows to it.

    Returns:
        A scalar ≥ 0, and 0 for equal maps.

    Raises:
        ValueError: the shapes differ, or are no maps.

    Memory: linear in the maps.

    Chen, Liu, Zhao, Jia 2021, "Distilling Knowledge via Knowledge Review", https://arxiv.org/abs/2104.09044

    >>> ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    >>> hierarchical_context(ramp, ramp + 2), hierarchical_context(ramp, ramp.flip(3))
    (tensor(4.), tensor(18.6667))
    """
    if student.ndim != 4 or student.shape != teacher.shape:
        raise ValueError(
            f"maps of shapes {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher): expected two equal "
            "shapes (B, C, H, W)"
        )
    difference = in_float32(student) - in_float32(teacher).detach()
    height, width = difference.shape[2:]
    value, weight, total = difference.square().mean(), 1.0, 1.0
    for level in LEVELS:
        size = (min(level, height), min(level, width))
        if size != (height, width):
            weight /= 2
            total += weight
            # pooling is linear: of the difference is the difference of
            value = value + weight * F.adaptive_avg_pool2d(difference, size).square().mean()
    return value / total


class AttentionFusion(nn.Module):
    """One step of the review: a layer of the student and what came from the deeper ones, weighed at every position.

    With x the layer through a 1×1 convolution, y the carried map at x's size, and a, b two maps between 0 and 1 from
    a 1×1 convolution and a sigmoid on both, the new carried map is a·x + b·y at the teacher's size (nearest
    neighbours); its 3×3 convolution is what is compared with the teacher. The deepest layer has no y, and is carried
    as x.

    Args:
        channels: of the student's layer.
        carried: of the carried map.
        teacher: of the teacher's layer.
        fuse: whether there is a deeper layer.

    >>> answer, carried = AttentionFusion(4, 8, 16, fuse=False)(torch.ones(2, 4, 6, 6), None, (3, 3))
    >>> answer.shape, carried.shape
    (torch.Size([2, 16, 3, 3]), torch.Size([2, 8, 3, 3]))
    """

    def __init__(self, channels: int, carried: int, teacher: int, fuse: bool):
        super().__init__()
        reduce = nn.Conv2d(channels, carried, 1, bias=False)
        answer = nn.Conv2d(carried, teacher, 3, padding=1, bias=False)
        for convolution in (reduce, answer):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(reduce, BatchNorm(carried))
        self.attend = nn.Sequential(nn.Conv2d(2 * carried, 2, 1), nn.Sigmoid()) if fuse else None
        self.answer = nn.Sequential(answer, BatchNorm(teacher))

    def forward(self, features: Tensor, carried: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The answer to the teacher's layer, and what is carried to the next shallower layer.

        Args:
            features: (B, channels, H, W) of the student.
            carried: (B, carried, h, w) of the step before; ``None`` for the deepest layer.
            size: of the teacher's layer.
        """
        x = self.reduce(features)
        if self.attend is not None:
            assert carried is not None, "only the deepest layer has nothing before it"
            y = _resized(carried, x.shape[2:])
            a, b = self.attend(torch.cat([x, y], dim=1)).split(1, dim=1)
            x = a * x + b * y
        x = _resized(x, size)
        return self.answer(x), x


def _resized(features: Tensor, size: Sequence[int]) -> Tensor:
    size = tuple(size)
    return features if tuple(features.shape[2:]) == size else F.interpolate(features, size, mode="nearest")


@method(
    section="2.2+",
    role="losses",
    paper="Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review",
    year=2021,
    link="https://arxiv.org/abs/2104.09044",
    use="Convolutional networks of several stages, for accuracy first: among the strongest of the feature losses.",
)
class ReviewKD(Loss):
    """Knowledge review: the student's stages, fused from the deepest to the shallowest, answer the teacher's stages.

    Every stage of the teacher, also an early one, is compared with a map that holds the student's stage and all
    deeper ones (:class:`AttentionFusion`, learned, made from the real shapes when binding), by the loss of
    :func:`hierarchical_context`; the stages are summed.

    The authors read residual networks before the last ReLU of each stage (the teacher always), and the pooled
    embedding as a map of 1×1, which comes first in the review. Here the default is every matched stage as the network
    returns it, and what the last linear layers read; name addresses for others.

    Args:
        taps: maps (B, C, H, W) or vectors (B, C), the shallowest first.
        channels: of the map that is carried from stage to stage; never more than the student's deepest layer has.
        weight: 1 by default, reached linearly over the first 20 of 240 epochs as published. It belongs to the mean
            over samples, channels and positions. The authors' CIFAR-100 runs have 0.6 (ResNet-56 → 20) to 8, most
            of them 5 (wide ResNets, ResNet-32x4 → 8x4), and ImageNet's ResNet-34 → 18 has 1, with one epoch of
            warm-up.
        name: of the term.

    Raises:
        ValueError: ``channels`` below 1, or tensors that are neither maps nor vectors.

    A batch of one vector is normalised with the running averages (:class:`BatchNorm`). Memory: the fusions' maps,
    ``channels`` + the teacher's at every position.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Conv2d(1, n, 3), nn.Conv2d(n, n, 3, 2)) for n in (4, 6))
    >>> loss = ReviewKD("0", "1", weight=1.0)
    >>> d = Distillation(student, teacher, losses=[loss]).bind(torch.rand(5, 1, 8, 8))
    >>> loss.fusions[0].answer[0]
    Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
    """

    default_reads = "stages"

    def __init__(
        self,
        *taps: Tap,
        channels: int = 512,
        weight: Weight = PUBLISHED_WEIGHT,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        if channels < 1:
            raise ValueError(f"{self.name}: channels={channels}: expected at least 1")
        self.channels = channels
        self.fusions = nn.ModuleList()

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        chosen = super().resolve(student, teacher, batch)
        if chosen:
            with suppress(ValueError):  # a network without a linear layer has its stages alone
                self.pairs.append((embedding(student, batch.student), embedding(teacher, batch.teacher)))
        return chosen

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        both = self.tensors(student, teacher)
        for (s_at, t_at), (s, t) in zip(self.pairs, both, strict=True):
            if s.ndim not in (2, 4) or t.ndim not in (2, 4):
                raise ValueError(
                    f"{self.name}: {s_at!r} is {tuple(s.shape)} and {t_at!r} {tuple(t.shape)}: "
                    "expected maps (B, C, H, W) or vectors (B, C)"
                )
        carried = min(self.channels, both[-1][0].shape[1])
        self.fusions = nn.ModuleList(
            AttentionFusion(s.shape[1], carried, t.shape[1], fuse=i + 1 < len(both)).to(s)
            for i, (s, t) in enumerate(both)
        )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        losses = []
        carried = None
        for fusion, (s, t) in zip(reversed(self.fusions), reversed(self.tensors(student, teacher)), strict=True):
            t = as_map(t)
            answer, carried = fusion(as_map(s), carried, t.shape[2:])
            losses.append(hierarchical_context(answer, t))
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, channels={self.channels}"
