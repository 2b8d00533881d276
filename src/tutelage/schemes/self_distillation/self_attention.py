"""Self attention distillation: where a network's later layers are active, its earlier ones learn to be."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.console import say
from tutelage.knowledge.base import Loss, Reads, Tap
from tutelage.knowledge.relation.pairs import consecutive, same_samples
from tutelage.record import Record, in_float32
from tutelage.schedule import StartAt, Weight
from tutelage.views import Batch

PUBLISHED = StartAt(0.1, at=2 / 3)


def attention_mimicry(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ_positions (Φ(s) − Φ(t))², mean over samples, with Φ(A) = softmax over positions of resize(Σ_c A_c²).

    The attention of the smaller map is enlarged bilinearly, with aligned corners, to the size of the larger (each axis
    by itself) before the softmax.

    Args:
        student: an earlier layer (B, C, H, W), or a sequence (B, N, C).
        teacher: a later layer (B, D, H', W'), or (B, N, D) of the same tokens; no gradient flows to it.

    Returns:
        A scalar from 0, for equal attention, to 2.

    Raises:
        ValueError: other numbers of axes, of samples or of tokens.

    Hou, Ma, Liu, Loy 2019, "Learning Lightweight Lane Detection CNNs by Self Attention Distillation",
    https://arxiv.org/abs/1908.00821

    >>> attention_mimicry(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]]))  # 2 · tanh(½)²
    tensor(0.4271)
    """
    tokens = student.ndim == 3 and student.shape[1] != teacher.shape[1]
    if student.ndim != teacher.ndim or student.ndim not in (3, 4) or tokens:
        raise ValueError(
            f"attention of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared: expected two "
            "maps (B, C, H, W), or two sequences (B, N, C) of the same tokens"
        )
    same_samples(student, teacher)
    channels = 1 if student.ndim == 4 else 2
    s, t = (in_float32(x).square().sum(channels) for x in (student, teacher.detach()))
    if student.ndim == 4:
        size = [max(a, b) for a, b in zip(s.shape[1:], t.shape[1:], strict=True)]
        s, t = (F.interpolate(x[:, None], size, mode="bilinear", align_corners=True) for x in (s, t))
    return (s.flatten(1).softmax(1) - t.flatten(1).softmax(1)).square().sum(1).mean()


@method(
    section="3.3",
    role="losses",
    paper="Hou, Ma, Liu, Loy: Learning Lightweight Lane Detection CNNs by Self Attention Distillation",
    year=2019,
    link="https://arxiv.org/abs/1908.00821",
    needs=("several layers",),
    use="Feature maps and sparse labels, no teacher: a late and cheap term; early layers look where late ones do.",
)
class SelfAttention(Loss):
    """Self attention distillation (SAD): each layer mimics the spatial attention of the next one, which is detached.

    The total over layers A_1 … A_M in order is Σ_m :func:`attention_mimicry` (A_m, A_{m+1}). It needs no teacher, and
    reads the student (each peer of a cohort) alone, beside whatever else is transferred.

    It begins late, for it is the attention of a network that has learned something that teaches: the authors add it
    after 40 000 of 60 000 iterations, or 1200 of 1800 epochs. Positions are summed and not averaged, as the authors say
    where asked (the Torch code that they published averages, and has label maps in the place of attention). With many
    channels, or large activations, the softmax is nearly all at one position, and its gradient small.

    Args:
        taps: two layers or more in the order of the forward pass; by default every stage of the student.
        weight: γ, 0.1 from two thirds of the training on, as published; 0 before.
        name: of the term.

    Raises:
        ValueError: fewer than two layers, or layers that cannot be compared.

    Memory: linear in the features, without channels.

    >>> SelfAttention()
    SelfAttention(stages, weight=StartAt(weight=0.1, at=0.6666666666666666))
    """

    default_reads: Reads = "stages"
    needs_teacher = False

    def __init__(self, *taps: Tap, weight: Weight = PUBLISHED, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        # a teacher beside it, of fewer stages, has no say in which are read
        chosen = super().resolve(student, student, replace(batch, teacher=batch.student))
        if len(self.pairs) < 2:
            raise ValueError(
                f"{self.name}: each layer mimics the next one, which needs at least two; got "
                f"{', '.join(s for s, _ in self.pairs)} (`tutelage inspect` lists what can be named)"
            )
        if chosen:
            say(f"{self.name} reads {' ← '.join(s for s, _ in self.pairs)}")
        return False

    def forward(self, student: Record, teacher: Record | None, batch: Batch) -> Tensor:
        layers = [student[address] for address, _ in self.pairs]
        return torch.stack([attention_mimicry(s, t) for s, t in consecutive(layers)]).sum()
