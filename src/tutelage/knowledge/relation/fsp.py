"""The flow of solution procedure: how features change between two layers, as a Gram matrix."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    if pool not in get_args(Pool):
        raise ValueError(f"pool={pool!r}: expected one of {get_args(Pool)}")
    first, second = as_map(first), as_map(second)
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    shrink = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
    a, b = ((x if tuple(x.shape[2:]) == size else shrink(x, size)).flatten(2) for x in (first, second))
    return a @ b.mT / (size[0] * size[1])


def fsp(student_pair: Layers, teacher_pair: Layers, pool: Pool = "max") -> Tensor:
    """(G_s − G_t)², mean over samples and entries, of the matrices of :func:`fsp_matrix`.

    The paper sums over the C·D entries; the CRD study's code takes this mean.

    Args:
        student_pair: two layers of the student, the earlier first.
        teacher_pair: two layers of the teacher, of as many channels each and any sizes; no gradient flows to them.
        pool: see :func:`fsp_matrix`.

    Returns:
        A scalar ≥ 0, and 0 where the student's layers are the teacher's. It grows with the fourth power of the
        features.

    Raises:
        ValueError: different numbers of samples or channels (project the student's first), or an unknown ``pool``.

    Memory: C·D numbers beside the features for each sample of a chunk, about ``CHUNK_NUMBERS`` at once; where there are
    several chunks, each is calculated again in the backward pass.

    Yim, Joo, Bae, Kim 2017, "A Gift from Knowledge Distillation",
    https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html

    >>> layers = torch.ones(2, 3, 4, 4), torch.ones(2, 5, 2, 2)
    >>> fsp(layers, [2 * x for x in layers])
    tensor(9.)
    """
    (first_s, second_s), (first_t, second_t) = student_pair, teacher_pair
    same_samples(first_s, first_t)
    shape_s, shape_t = ((as_map(a).shape[1], as_map(b).shape[1]) for a, b in (student_pair, teacher_pair))
    if shape_s != shape_t:
        raise ValueError(
            f"the student's layers have {shape_s} channels and the teacher's {shape_t}: "
            "FSP matrices are compared entry by entry; project the student's layers to the teacher's channels"
        )
    entries = shape_s[0] * shape_s[1]
    chunk = max(1, CHUNK_NUMBERS // entries)
    layers = (first_s, second_s, first_t.detach(), second_t.detach())
    if len(first_s) <= chunk or not torch.is_grad_enabled():
        total = _squares(*layers, pool)
    else:
        parts = zip(*(layer.split(chunk) for layer in layers), strict=True)
        total = torch.stack([_squares_again(*part, pool) for part in parts]).sum()
    return total / (len(first_s) * entries)


def _squares_again(*part: Any) -> Tensor:
    return checkpoint(_squares, *part, use_reentrant=False, preserve_rng_state=False)


def _squares(first_s: Tensor, second_s: Tensor, first_t: Tensor, second_t: Tensor, pool: Pool) -> Tensor:
    return (fsp_matrix(first_s, second_s, pool) - fsp_matrix(first_t, second_t, pool)).square().sum()


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
    do not, a 1×1 convolution (a linear layer for sequences), made when binding, brings the student's layer to the
    teacher's channels; it learns too, and so the matrix is matched up to a linear map.

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
    Conv2d(4, 6, kernel_size=(1, 1), stride=(1, 1))
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
        self.projectors = nn.ModuleList(channel_projector(s, t) for s, t in self.tensors(student, teacher))

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        both = self.tensors(student, teacher)
        mine = [project(s) for project, (s, _) in zip(self.projectors, both, strict=True)]
        theirs = [t for _, t in both]
        steps = zip(consecutive(mine), consecutive(theirs), strict=True)
        return torch.stack([fsp(s, t, self.pool) for s, t in steps]).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pool={self.pool}"
