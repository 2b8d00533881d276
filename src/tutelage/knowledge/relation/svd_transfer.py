"""Knowledge in singular vectors: each feature map as its main direction, layers as the relation of those."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.pairs import (
    Layers,
    as_map,
    at_least_two,
    channel_projector,
    consecutive,
    same_samples,
)
from tutelage.knowledge.rows import unit_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch

SMALLEST_GAP = 1e-4
"""Squared singular values that lie closer than this part of the largest count as equal in the backward pass."""
CANDIDATES = 3
"""How many more vectors of the student than of the teacher may be chosen from, as in the authors' code."""


class _RightVectors(torch.autograd.Function):
    """The leading right singular vectors of (B, P, C), with a gradient that stays finite where values coincide.

    dv_j = Σ_{i≠j} v_i (v_iᵀ dA v_j) / (λ_j − λ_i) for A = XᵀX. The quotient 1/d is replaced by d / (d² + ε²), which is
    0 at d = 0: a vector that is not determined has no derivative to give.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
        _, values, vectors = torch.linalg.svd(matrices, full_matrices=False)
        ctx.save_for_backward(matrices, values, vectors)
        ctx.count = count
        leading = values[:, :count].clone()
        ctx.mark_non_differentiable(leading)
        return vectors[:, :count].mT.contiguous(), leading

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, values, vectors = ctx.saved_tensors
        squares, leading = values.square(), vectors[:, : ctx.count]
        top = squares[:, None, : ctx.count]
        smallest = (SMALLEST_GAP * squares[:, :1, None]).square()

        def inverse(gap: Tensor) -> Tensor:
            size = gap.square() + smallest
            return gap / size.masked_fill(size == 0, torch.inf)

        along = vectors @ gradient
        within = vectors.mT @ (inverse(top - squares[:, :, None]) * along)
        outside = (gradient - vectors.mT @ along) * inverse(top)  # directions whose singular value is 0
        turned = within + outside
        return x @ turned @ leading + x @ leading.mT @ turned.mT, None


def singular_vectors(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors of each sample's (positions × channels) matrix, and their singular values.

    The gradient flows through the vectors alone. Where singular values coincide or vanish, the vectors are not
    determined, and there the gradient is 0 instead of infinite.

    Args:
        features: a map (B, C, H, W) of any height and width, a sequence (B, N, C) or rows (B, C).
        count: how many, at most min(H·W, C) of which exist.

    Returns:
        (B, C, K) of unit length, and (B, K), the largest first.

    Memory: that of the features; H·W × H·W is never made.

    >>> vectors, values = singular_vectors(torch.tensor([[[[3.0]], [[4.0]]]]), 2)
    >>> vectors.abs().flatten(), values
    (tensor([0.6000, 0.8000]), tensor([[5.]]))
    """
    return _RightVectors.apply(as_map(features).flatten(2).mT, count)


def aligned_vectors(student: Tensor, teacher: Tensor, vectors: int = 1) -> tuple[Tensor, Tensor]:
    """The teacher's leading singular vectors, and for each the student's that is most parallel to it.

    The student's is chosen among its ``vectors`` + 3 leading ones by the largest |cosine|, and turned round where the
    cosine is negative: a singular vector has no sign. The teacher's is turned so that its components sum to ≥ 0. Both
    are multiplied with the teacher's singular values, scaled to unit length over the ``vectors``.

    Args:
        student: features of one layer.
        teacher: the teacher's, with as many channels; no gradient flows to them.
        vectors: K, how many of the teacher's.

    Returns:
        The student's (B, C, K) and the teacher's (B, C, K).

    Raises:
        ValueError: different numbers of samples or channels, or ``vectors`` < 1.

    >>> x = torch.rand(2, 3, 4, 5)
    >>> s, t = aligned_vectors(-x, x)
    >>> torch.allclose(s, t)
    True
    """
    if vectors < 1:
        raise ValueError(f"vectors={vectors}: expected at least 1")
    same_samples(student, teacher)
    channels = as_map(student).shape[1], as_map(teacher).shape[1]
    if channels[0] != channels[1]:
        raise ValueError(
            f"the student's layer has {channels[0]} channels and the teacher's {channels[1]}: singular vectors over "
            "channels are compared; project the student's layer to the teacher's channels"
        )
    theirs, values = singular_vectors(teacher.detach(), vectors)
    theirs = theirs * torch.where(theirs.sum(1, keepdim=True) < 0, -1.0, 1.0)
    mine, _ = singular_vectors(student, vectors + CANDIDATES)
    cosines = (mine.mT @ theirs).detach()
    best = cosines.abs().argmax(1, keepdim=True)
    signs = torch.where(cosines.gather(1, best) < 0, -1.0, 1.0)
    chosen = mine.gather(2, best.expand(-1, mine.shape[1], -1)) * signs
    scale = unit_rows(values).unsqueeze(1)
    return chosen * scale, theirs * scale


def radial_relation(first: Tensor, second: Tensor, width: float = 8.0) -> Tensor:
    """exp(−(a_ik − b_jk)² / width) for each component i of a layer's k-th vector and each j of the next one's.

    Args:
        first: (B, C, K).
        second: (B, D, K).
        width: the denominator.

    Returns:
        (B, D, C, K).

    >>> radial_relation(torch.zeros(1, 2, 1), torch.zeros(1, 3, 1)).shape
    torch.Size([1, 3, 2, 1])
    """
    return torch.exp(-(second.unsqueeze(2) - first.unsqueeze(1)).square() / width)


def singular_value(student_pair: Layers, teacher_pair: Layers, vectors: int = 1, width: float = 8.0) -> Tensor:
    """Σ (R_s − R_t)², mean over samples: R relates the aligned singular vectors of a layer to those of the next.

    The vectors are those of :func:`aligned_vectors`, the relation is :func:`radial_relation`. As in the CRD study the
    sum goes over all components; the authors' code sums over the batch too, and then clips this gradient to the norm
    of the task's, so that no weight belongs to it.

    Args:
        student_pair: two layers of the student, the earlier first.
        teacher_pair: two layers of the teacher, of as many channels each and any sizes; no gradient flows to them.
        vectors: how many singular vectors of the teacher, at most.
        width: of the radial basis; 8 in the authors' code.

    Returns:
        A scalar ≥ 0, and 0 where the student's layers are the teacher's, or multiples of them.

    Raises:
        ValueError: different numbers of samples or channels, or an argument out of range.

    Memory: C·D·``vectors`` numbers per sample beside the features.

    Lee, Kim, Song 2018, "Self-supervised Knowledge Distillation Using Singular Value Decomposition",
    https://arxiv.org/abs/1807.06819

    >>> layers = torch.rand(2, 3, 4, 6), torch.rand(2, 5, 2, 3)
    >>> singular_value([2 * x for x in layers], layers) < 1e-9
    tensor(True)
    """
    if not width > 0:
        raise ValueError(f"width={width}: expected a positive number")
    (first_s, second_s), (first_t, second_t) = student_pair, teacher_pair
    return _related(aligned_vectors(first_s, first_t, vectors), aligned_vectors(second_s, second_t, vectors), width)


def _related(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], width: float) -> Tensor:
    count = min(first[0].shape[2], second[0].shape[2])  # a layer of one position has one vector only
    mine, theirs = (
        radial_relation(a[:, :, :count], b[:, :, :count], width) for a, b in zip(first, second, strict=True)
    )
    return (mine - theirs).square().sum() / len(mine)


@method(
    section="2.3",
    role="losses",
    paper="Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition",
    year=2018,
    link="https://arxiv.org/abs/1807.06819",
    use="Feature maps too large to compare whole: only their main direction over channels, from layer to layer.",
)
class SVDTransfer(Loss):
    """Singular vectors: each layer's main direction over channels, and a radial-basis relation to the next layer's.

    The paper trains student and task together throughout. Where channels differ, a 1×1 convolution (a linear layer
    for sequences), made when binding, brings the student's layer to the teacher's; the authors' networks have equal
    ones.

    Args:
        taps: two layers or more in the order of the forward pass; each is related to the next, and the terms are
            summed. By default every matched stage.
        vectors: how many singular vectors of the teacher; 1 by default, as in the authors' code.
        width: of the radial basis.
        weight: 1 by default, as in the CRD study, which takes this scale. The authors' code has no weight: it clips.
        name: of the term.

    Memory and formula: :func:`singular_value`. A step takes a singular value decomposition of each sample's layers.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Conv2d(1, n, 3), nn.Conv2d(n, n, 3)) for n in (4, 6))
    >>> loss = SVDTransfer("0", "1")
    >>> d = Distillation(student, teacher, losses=[loss]).bind(torch.rand(5, 1, 8, 8))
    >>> loss.pairs
    [('0', '0'), ('1', '1')]
    """

    default_reads = "stages"

    def __init__(self, *taps: Tap, vectors: int = 1, width: float = 8.0, weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        if vectors < 1 or not width > 0:
            raise ValueError(
                f"{self.name}: vectors={vectors}, width={width}: expected at least 1, and a positive number"
            )
        self.vectors, self.width = vectors, width
        self.projectors = nn.ModuleList()

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        at_least_two(self.name, self.pairs)
        self.projectors = nn.ModuleList(channel_projector(s, t) for s, t in self.tensors(student, teacher))

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        both = zip(self.projectors, self.tensors(student, teacher), strict=True)
        layers = [aligned_vectors(project(s), t, self.vectors) for project, (s, t) in both]
        return torch.stack([_related(a, b, self.width) for a, b in consecutive(layers)]).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, vectors={self.vectors}, width={self.width}"
