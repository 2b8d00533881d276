"""Mean teacher: the average of the student's weights over its steps teaches it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.response.rows import TokenResponse, compared_rows
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.schemes.self_distillation.past_self import PastSelf
from tutelage.teachers import Lesson
from tutelage.views import Batch


def consistency(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ_k (softmax(z_s)_k − softmax(z_t)_k)², the mean over samples or positions.

    Args:
        student: logits (B, K), (B, T, K) or (B, K, H, W).
        teacher: the same shape; no gradient flows to it.
        mask: booleans of the logits' shape without classes; positions that are False do not count.

    Returns:
        A scalar between 0 and 2; 0, with a gradient of 0, where no position counts.

    Raises:
        ValueError: shapes that differ, or a mask that does not fit.

    Tarvainen, Valpola 2017, https://arxiv.org/abs/1703.01780

    >>> consistency(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
    tensor(2.)
    """
    p, q = (rows.softmax(1) for rows in compared_rows(student, teacher, mask))
    return (p - q).square().sum() / max(len(p), 1)


class Consistency(TokenResponse):
    """The squared distance of two models' probabilities (:func:`consistency`).

    Args:
        taps: which logits; the models' own by default.
        weight: 100 by default, the authors' for CIFAR-10 with the mean over 10 classes, here as 10 times their sum.
        name: of the term.

    >>> Consistency().weight
    10.0
    """

    def __init__(self, *taps: Tap, weight: Weight = 10.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        pairs = self.tensors(student, teacher)
        return torch.stack([consistency(s, t, self.counted(s, batch)) for s, t in pairs]).mean()


@method(
    section="3.3+",
    role="teacher",
    paper="Tarvainen, Valpola: Mean Teachers Are Better Role Models",
    year=2017,
    link="https://arxiv.org/abs/1703.01780",
    needs=("extra memory",),
    use="No teacher, many samples without labels or noisy ones: the student's own average is steadier than it is.",
)
class EMA(PastSelf):
    """The exponential moving average of the student's weights teaches it: θ' ← d·θ' + (1 − d)·θ after each step.

    In step t (from 1) d is min(1 − 1/t, ``decay``), so the average is the plain mean at first, as in the authors' code
    (whose t begins one later), and the copy's random beginning is forgotten. Buffers (batch norm's statistics) are
    averaged like weights, and the teacher is in eval mode, where the authors run it in train mode. Its samples may lack
    labels. The views decide what noise each of the two sees (:class:`tutelage.Altered`); without any, dropout is the
    student's only one.

    The decay, its beginning and the weight of the consistency are given from memory; neither the paper's text nor the
    authors' code was at hand to check them.

    Any losses stand beside it; :meth:`losses` gives the paper's. ``teacher.copy`` is the averaged network afterwards,
    often the better one to keep.

    Args:
        decay: d, between 0 and 1; the authors' is 0.999 of long trainings, 0.99 in their first part.

    Raises:
        ValueError: a decay out of range.

    Memory: one more network.

    Tarvainen, Valpola 2017, "Mean teachers are better role models: Weight-averaged consistency targets improve
    semi-supervised deep learning results", https://arxiv.org/abs/1703.01780

    >>> from torch import nn
    >>> from tutelage import Distillation
    >>> student, teacher, batch = nn.Linear(4, 3), EMA(decay=0.9), (torch.randn(8, 4), torch.arange(8) % 3)
    >>> d = Distillation(student, teacher, losses=teacher.losses()).bind(batch)
    >>> d(batch).total.backward()
    >>> _ = nn.init.ones_(student.weight)
    >>> _ = d(batch)  # the first step's weights are taken whole
    >>> bool((teacher.copy.weight == student.weight).all())
    True
    """

    def __init__(self, decay: float = 0.999):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA: decay={decay}: expected 0 <= decay < 1")
        self.decay = decay
        self.steps = 0

    def losses(self, weight: Weight = 10.0) -> list[Loss]:
        """The published ones: cross-entropy, and the squared distance of probabilities.

        Args:
            weight: of the second; the authors let it rise over the first epochs (:class:`tutelage.WarmUp`).
        """
        return [TaskLoss(), Consistency(weight=weight)]

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        if self.student_steps.taken():
            self.steps += 1
            self.take(max(1 / self.steps, 1 - self.decay))
        return super().lessons(batch, student)

    def own_state(self) -> dict[str, Any]:
        return {**super().own_state(), "steps": self.steps}

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        self.steps = state["steps"]
