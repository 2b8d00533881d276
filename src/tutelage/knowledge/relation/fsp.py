"""The flow of solution procedure: how features change between two layers, as a Gram matrix."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.pairs import (
    Layers,
    as_map,
    at_least_two,
    same_samples,
)
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch

Pool = Literal["max", "average"]
CHUNK_NUMBERS = 2**23
"""How many numbers (32 MiB of float32) of FSP matrices :func:`fsp` holds at once, about."""


def fsp_matrix(first: Tensor, second: Tensor, pool: Pool = "max") -> Tensor:
    """G_ij = Σ_p A_ip · B_jp / (h·w): the Gram matrix between two layers, over the positions p that they share.

    Where the layers differ in size, the larger is pooled to the smaller, each axis by itself.

    Args:
        first: A, a map (B, C, H, W), a sequence (B, N, C) or rows (B, C).
        second: B, likewise, with any number D of channels.
        pool: ``"max"``, the paper's, or ``"average"``, the CRD study's.

    Returns:
        (B, C, D).

    Raises:
        ValueError: an unknown ``pool``, or other numbers of axes.

    Memory: C·D numbers per sample beside the features.

    >>> fsp_matrix(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0]]]]))
    tensor([[[5.5000]]])
    """
    a, b = _positions(first, second, pool)
    return a @ b.mT / a.shape[2]


def _positions(first: Tensor, second: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Both layers (B, C, P) over the positions that they share."""
    if pool not in get_args(Pool):
        raise ValueError(f"pool={pool!r}: expected one of {get_args(Pool)}")
    first, second = as_map(first), as_map(second)
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    shrink = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
    a, b = ((x if tuple(x.shape[2:]) == size else shrink(x, size)).flatten(2) for x in (first, second))
    return a, b


def fsp(
    student_pair: Layers,
    teacher_pair: Layers,
    pool: Pool = "max",
    projections: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """(W₁ G_s W₂ᵀ − G_t)², mean over samples and entries, of the matrices G of :func:`fsp_matrix`.

    The paper has no W, and sums over the C·D entries; the CRD study's code takes this mean. W₁ G_s W₂ᵀ is the matrix
    of the student's layers after a linear map of their channels (and after pooling); what takes fewer products is done.

    Args:
        student_pair: two layers of the student, the earlier first.
        teacher_pair: two layers of the teacher, of any sizes; no gradient flows to them.
        pool: see :func:`fsp_matrix`.
        projections: W₁ and W₂, (teacher's channels, student's channels) of the first and second layer; ``None`` where
            they are as many.

    Returns:
        A scalar ≥ 0, and 0 where the student's layers are the teacher's. It grows with the fourth power of the
        features.

    Raises:
        ValueError: different numbers of samples or (projected) channels, or an unknown ``pool``.

    The gradient is calculated together with the value (and cannot be differentiated again), so that no matrix waits for
    the backward pass.

    Memory: C·D numbers beside the features for each sample of a chunk, about ``CHUNK_NUMBERS`` at once.

    Yim, Joo, Bae, Kim 2017, "A Gift from Knowledge Distillation",
    https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html

    >>> layers = torch.ones(2, 3, 4, 4), torch.ones(2, 5, 2, 2)
    >>> fsp(layers, [2 * x for x in layers])
    tensor(9.)
    """
    (first_s, second_s), (first_t, second_t) = student_pair, teacher_pair
    same_samples(first_s, first_t)
    a, b = _positions(first_s, second_s, pool)
    a_t, b_t = _positions(first_t.detach(), second_t.detach(), pool)
    shape_s = tuple(x.shape[1] if w is None else len(w) for x, w in zip((a, b), projections, strict=True))
    shape_t = (a_t.shape[1], b_t.shape[1])
    if shape_s != shape_t:
        raise ValueError(
            f"the student's layers have {shape_s} channels and the teacher's {shape_t}: "
            "FSP matrices are compared entry by entry; project the student's layers to the teacher's channels"
        )
    entries = shape_t[0] * shape_t[1]
    chunk = max(1, CHUNK_NUMBERS // entries)
    left, right = projections
    if _layers_first(a, b, left, right):
        a, b, left, right = a if left is None else left @ a, b if right is None else right @ b, None, None
    total = cast(Tensor, _Squares.apply(a, b, left, right, a_t, b_t, chunk))
    return total / (len(a) * entries)


def _layers_first(a: Tensor, b: Tensor, left: Tensor | None, right: Tensor | None) -> bool:
    """Whether mapping the layers' channels takes fewer products than mapping their matrix."""
    (_, c, positions), d = a.shape, b.shape[1]
    c_t, d_t = c if left is None else len(left), d if right is None else len(right)
    maps_of_layers = (left is not None) * c_t * c + (right is not None) * d_t * d
    maps_of_matrix = (left is not None) * c_t * c * d + (right is not None) * c_t * d * d_t
    return positions * (maps_of_layers + c_t * d_t) <= positions * c * d + maps_of_matrix


class _Squares(torch.autograd.Function):
    """Σ (W₁ a bᵀ W₂ᵀ / P − a_t b_tᵀ / P_t)² over samples and entries, some samples at a time."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, left: Tensor | None, right: Tensor | None, a_t: Tensor, b_t: Tensor, chunk: int
    ) -> Tensor:
        own = (a, b, left, right)
        wanted = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(x) if wanted and x is not None else None for x in own]
        d_a, d_b, d_left, d_right = gradients
        total = a.new_zeros(())
        for start in range(0, len(a), chunk):
            part = slice(start, start + chunk)
            flow = a[part] @ b[part].mT / a.shape[2]
            difference = flow if left is None else left @ flow
            difference = difference if right is None else difference @ right.T
            difference = torch.baddbmm(difference, a_t[part], b_t[part].mT, alpha=-1 / a_t.shape[2])
            total += difference.square().sum()
            if d_a is None or d_b is None:
                continue
            # the gradient by W₁ flow, and by flow
            outer = 2 * difference if right is None else 2 * difference @ right
            inner = outer if left is None else left.T @ outer
            d_a[part] = inner @ b[part] / a.shape[2]
            d_b[part] = inner.mT @ a[part] / a.shape[2]
            if d_left is not None:
                d_left += (outer @ flow.mT).sum(0)
            if d_right is not None:
                d_right += 2 * (difference.mT @ (flow if left is None else left @ flow)).sum(0)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if d is None else upstream * d for d in ctx.saved_tensors), None, None, None


@method(
    section="2.3",
    role="losses",
    paper="Yim, Joo, Bae, Kim: A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and "
    "Transfer Learning",
    year=2017,
    link="https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html",
    needs=("extra stages",),
    use="A start for the student, before it learns the task: networks of the same stages, best of the same widths.",
)
class FSP(Loss):
    """Flow of solution procedure: the Gram matrix between each named layer and the next, squared difference.

    As published it is a first stage of its own, from whose weights the student then learns the task alone (two
    stages of a recipe); beside other losses it trains in one. The paper's networks have equal channels. Where yours
    do not, a linear map without bias, made when binding, brings the student's layer to the teacher's channels; it
    learns too, and so the matrix is matched up to a linear map.

    Args:
        taps: two layers or more in the order of the forward pass; each is related to the next, and the terms are
            summed. By default every matched stage.
        pool: ``"max"`` or ``"average"``, where neighbouring layers differ in size.
        weight: 1 by default, the paper's λ for every matrix, here of the mean over entries as in the CRD study, whose
            first stage consists of this alone.
        name: of the term.

    Memory: see :func:`fsp`, also for the formula.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Conv2d(1, n, 3), nn.Conv2d(n, n, 3)) for n in (4, 6))
    >>> loss = FSP("0", "1")
    >>> d = Distillation(student, teacher, losses=[loss]).bind(torch.rand(5, 1, 8, 8))
    >>> loss.projectors[0]
    Linear(in_features=4, out_features=6, bias=False)
    """

    default_reads = "stages"

    def __init__(self, *taps: Tap, pool: Pool = "max", weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        if pool not in get_args(Pool):
            raise ValueError(f"{self.name}: pool={pool!r}: expected one of {get_args(Pool)}")
        self.pool: Pool = pool
        self.projectors = nn.ModuleList()

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        at_least_two(self.name, self.pairs)
        self.projectors = nn.ModuleList()
        for s, t in self.tensors(student, teacher):
            mine, theirs = as_map(s).shape[1], as_map(t).shape[1]
            alike = mine == theirs
            self.projectors.append(nn.Identity() if alike else nn.Linear(mine, theirs, bias=False).to(s))

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        mine, theirs = zip(*self.tensors(student, teacher), strict=True)
        weights = [getattr(project, "weight", None) for project in self.projectors]
        steps = zip(pairwise(mine), pairwise(theirs), pairwise(weights), strict=True)
        return torch.stack([fsp(s, t, self.pool, w) for s, t, w in steps]).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={self.pool}"
