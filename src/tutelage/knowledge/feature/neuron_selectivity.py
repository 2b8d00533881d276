"""Neuron selectivity transfer: the student's channels, as a set of spatial patterns, are to be the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tutelage.catalogue import method
from tutelage.connectors import match_size
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.pairs import as_map, same_samples
from tutelage.knowledge.rows import unit_rows
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch

Kernel = Literal["linear", "polynomial", "gaussian"]
CHUNK_NUMBERS = 2**23
"""How many numbers (32 MiB of float32) of Gram matrices a chunk of :func:`neuron_selectivity` may hold, about."""


def selectivity_patterns(features: Tensor) -> Tensor:
    """Where each channel is active: its map flattened and of unit L2 norm; a silent channel stays 0.

    Args:
        features: a map (B, C, H, W) or a sequence (B, N, C).

    Returns:
        (B, C, H·W) or (B, C, N).

    >>> selectivity_patterns(torch.tensor([[[[3.0, 4.0]], [[0.0, 0.0]]]]))
    tensor([[[0.6000, 0.8000],
             [0.0000, 0.0000]]])
    """
    return unit_rows(as_map(features).flatten(2))


def neuron_selectivity(
    student: Tensor,
    teacher: Tensor,
    kernel: Kernel = "polynomial",
    bandwidth: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """MMD² = mean_ij k(s_i, s_j) + mean_ij k(t_i, t_j) − 2·mean_ij k(s_i, t_j), mean over samples.

    s and t are a sample's patterns, one for each channel (:func:`selectivity_patterns`). The kernels of the paper:

    - ``"linear"``: k(x, y) = x·y, so that the mean patterns are compared;
    - ``"polynomial"``: (x·y)², degree 2 without constant, which compares the positions' Gram matrices;
    - ``"gaussian"``: exp(−|x − y|² / 2σ²), with σ² the mean of the squared distances between pairs.

    Two things were left to choose: σ² is each sample's own, over all pairs of its C + D patterns (each with itself
    among them), and it is a constant, through which no gradient flows. Patterns that are all equal cost 0.

    Args:
        student: a map (B, C, H, W), or a sequence (B, N, C).
        teacher: (B, D, H', W'), or (B, N, D); no gradient flows to it. The larger map is average-pooled to the size
            of the smaller, each axis by itself, before it is normalised.
        kernel: one of the three.
        bandwidth: a σ² for all samples, instead of each sample's own.
        chunk: samples that are treated at once; by default as many as hold about ``CHUNK_NUMBERS`` numbers.

    Returns:
        A scalar ≥ 0 (to rounding), and 0 for equal sets of patterns: the channels' order and factors do not count.

    Raises:
        ValueError: shapes that cannot be compared, an unknown kernel, a ``bandwidth`` that is not positive or has no
            Gaussian kernel, a ``chunk`` below 1.

    Memory: linear in the features for the linear kernel. For the polynomial the smaller of 2·P² and C² + D² + C·D
    numbers per sample, for P positions; for the Gaussian the latter, twice. One chunk's at a time, in the backward
    pass too, where each is calculated again if there are several. Never C·D·P.

    Huang, Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
    https://arxiv.org/abs/1707.01219

    >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    >>> neuron_selectivity(student, teacher), neuron_selectivity(student, 5 * student)
    (tensor(2.), tensor(0.))
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel={kernel!r}: expected one of {get_args(Kernel)}")
    if bandwidth is not None and (kernel != "gaussian" or not bandwidth > 0):
        raise ValueError(f"bandwidth={bandwidth} with kernel={kernel!r}: expected a positive σ² of kernel='gaussian'")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1")
    _check(student, teacher)
    same_samples(student, teacher)
    student, teacher = in_float32(student), in_float32(teacher.detach())
    if student.ndim == 4:
        student, teacher = match_size(student, teacher)
    s, t = selectivity_patterns(student), selectivity_patterns(teacher)
    if kernel == "linear":
        return (s.mean(1) - t.mean(1)).square().sum(1).mean()
    channels, positions = s.shape[1] ** 2 + t.shape[1] ** 2 + s.shape[1] * t.shape[1], 2 * s.shape[2] ** 2
    discrepancy: Callable[[Tensor, Tensor], Tensor]
    if kernel == "gaussian":
        discrepancy, numbers = partial(_gaussian, bandwidth=bandwidth), 2 * channels
    elif positions <= channels:
        discrepancy, numbers = _polynomial_by_positions, positions
    else:
        discrepancy, numbers = _polynomial_by_channels, channels
    chunk = min(len(s), chunk or max(1, CHUNK_NUMBERS // numbers))
    parts = []
    for pair in zip(s.split(chunk), t.split(chunk), strict=True):
        if chunk < len(s) and torch.is_grad_enabled():
            parts.append(checkpoint(discrepancy, *pair, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(discrepancy(*pair))
    return torch.cat(parts).mean()


def _check(student: Tensor, teacher: Tensor) -> None:
    tokens = student.ndim == 3 and student.shape[1] != teacher.shape[1]
    if student.ndim != teacher.ndim or student.ndim not in (3, 4) or tokens:
        raise ValueError(
            f"patterns of shapes {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher) cannot be "
            "compared: expected two maps (B, C, H, W), or two sequences (B, N, C) of the same tokens"
        )


def _polynomial_by_positions(s: Tensor, t: Tensor) -> Tensor:
    # Σ_ij (s_i·t_j)² is the inner product of the Gram matrices of positions
    difference = s.mT @ s / s.shape[1] - t.mT @ t / t.shape[1]
    return difference.square().sum((1, 2))


def _polynomial_by_channels(s: Tensor, t: Tensor) -> Tensor:
    within, across = [(x @ y.mT).square().mean((1, 2)) for x, y in ((s, s), (t, t))], (s @ t.mT).square().mean((1, 2))
    return within[0] + within[1] - 2 * across


def _gaussian(s: Tensor, t: Tensor, bandwidth: float | None) -> Tensor:
    lengths = [x.square().sum(2) for x in (s, t)]

    def distances(i: int, j: int) -> Tensor:
        # patterns have length 1 or 0, so that little is lost in this difference
        products = (s, t)[i] @ (s, t)[j].mT
        return (lengths[i].unsqueeze(2) + lengths[j].unsqueeze(1) - 2 * products).clamp(min=0)

    if bandwidth is None:
        # the mean over all pairs is twice the variance
        patterns = torch.cat([s, t], dim=1).detach()
        variance = 2 * (patterns - patterns.mean(1, keepdim=True)).square().sum(2).mean(1)
        # below that, distances are rounding and the patterns equal
        scale = variance.masked_fill(variance < 16 * torch.finfo(s.dtype).eps, torch.inf).reshape(-1, 1, 1)
    else:
        scale = torch.full_like(s[:, :1, :1], bandwidth)

    def mean(i: int, j: int) -> Tensor:
        # k − 1, whose constant cancels in MMD² without taking digits along
        return torch.expm1(-distances(i, j) / (2 * scale)).mean((1, 2))

    return mean(0, 0) + mean(1, 1) - 2 * mean(0, 1)


@method(
    section="2.2",
    role="losses",
    paper="Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
    year=2017,
    link="https://arxiv.org/abs/1707.01219",
    use="Feature maps of any channel counts: the set of the channels' patterns, with nothing to learn beside.",
)
class NeuronSelectivity(Loss):
    """Neuron selectivity transfer: MMD between the channels' normalised spatial patterns.

    Args:
        taps: the layers, as many as wanted; by default every matched stage, as in the CRD study. They are summed. The
            authors read the last convolutional one.
        kernel: ``"linear"``, ``"polynomial"`` (the default) or ``"gaussian"``.
        weight: 50 by default, which belongs to the mean of MMD² over samples that :func:`neuron_selectivity` is: it
            is the authors' code's for the polynomial kernel and the CRD study's. The paper's own weights of the other
            two kernels were not at hand.
        name: of the term.

    See :func:`neuron_selectivity` for the formula and the memory.

    >>> NeuronSelectivity()
    NeuronSelectivity(stages, weight=50.0, kernel=polynomial)
    """

    default_reads = "stages"

    def __init__(self, *taps: Tap, kernel: Kernel = "polynomial", weight: Weight = 50.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        if kernel not in get_args(Kernel):
            raise ValueError(f"{self.name}: kernel={kernel!r}: expected one of {get_args(Kernel)}")
        self.kernel: Kernel = kernel

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        return torch.stack([neuron_selectivity(s, t, self.kernel) for s, t in self.tensors(student, teacher)]).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"
