"""Snapshot distillation: in one training with a cyclic learning rate, the end of each cycle teaches the next."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.response.rows import TokenResponse, compared_rows, positive
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.schedule import StartAt, Weight
from tutelage.schemes.self_distillation.past_self import PastSelf
from tutelage.teachers import Lesson
from tutelage.views import Batch


def asymmetric_kd(student: Tensor, teacher: Tensor, temperature: float = 3.0, mask: Tensor | None = None) -> Tensor:
    """KL(softmax(z_t / T) ‖ softmax(z_s)), mean over samples and positions: the teacher alone is softened.

    So the student learns to be less sure, and not to say the same at another temperature. There is no T².

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W).
        teacher: logits of the same shape; no gradient flows to them.
        temperature: T > 0 of the teacher.
        mask: booleans of the logits' shape without classes; positions that are False do not count. If none counts, the
            value is 0, with a gradient of 0.

    Returns:
        A scalar ≥ 0 in nats, and 0 where z_s is z_t / T up to a constant.

    Raises:
        ValueError: ``temperature`` is not positive, or the shapes differ.

    Yang, Xie, Su, Yuille 2019, https://arxiv.org/abs/1812.00123

    >>> asymmetric_kd(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]), temperature=3.0)
    tensor(0.)
    """
    positive("temperature", temperature)
    rows_s, rows_t = compared_rows(student, teacher, mask)
    log_q, log_p = rows_s.log_softmax(1), (rows_t / temperature).log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(len(rows_s), 1)


class AsymmetricKD(TokenResponse):
    """Soft targets from a softened teacher for a student that is not softened (:func:`asymmetric_kd`).

    Args:
        taps: which logits; the models' own by default.
        temperature: T of the teacher; 3 by default.
        weight: 1 by default, beside labels of weight 1 + 1/T.
        name: of the term.

    >>> AsymmetricKD(temperature=2.0)
    AsymmetricKD(logits, weight=1.0, temperature=2.0)
    """

    def __init__(self, *taps: Tap, temperature: float = 3.0, weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        positive(f"{self.name}: temperature", temperature)
        self.temperature = temperature

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        pairs = self.tensors(student, teacher)
        return torch.stack([asymmetric_kd(s, t, self.temperature, self.counted(s, batch)) for s, t in pairs]).mean()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


@method(
    section="3.3",
    role="teacher",
    paper="Yang, Xie, Su, Yuille: Snapshot Distillation: Teacher-Student Optimization in One Generation",
    year=2019,
    link="https://arxiv.org/abs/1812.00123",
    needs=("labels", "extra memory"),
    use="No teacher and time for one training alone, which is long enough for a few cycles of the learning rate.",
)
class Snapshot(PastSelf):
    """The network as it was at the end of a cycle of its learning rate teaches it during the next cycle.

    With :meth:`losses` the total is CE(z, y) in the first cycle, and afterwards, z' being what the last snapshot says,

        (1 + 1/T) · CE(z, y) + KL(softmax(z'/T) ‖ softmax(z)).

    The snapshots need the end of each cycle to be worth something: train with ``scheduler="cosine"`` and as many
    ``cycles`` of :class:`tutelage.Training` as here. What is asked for is a schedule by the training's progress, so a
    resumed run goes on with the right snapshot. Any losses stand beside it; in the first cycle only those that need no
    teacher apply. ``teacher.copy`` is the last snapshot.

    The formula, with T on the teacher's side alone, λ_S = 1 + 1/T, λ_T = 1, T = 3 and 4 cycles, is that of a public
    re-implementation, which was read and not run; the paper's own text could only be read in part, and no code of its
    authors was found.

    Args:
        cycles: how many, 2 or more.

    Raises:
        ValueError: fewer than two cycles.

    Memory: one more network.

    Yang, Xie, Su, Yuille 2019, "Snapshot Distillation: Teacher-Student Optimization in One Generation",
    https://arxiv.org/abs/1812.00123

    >>> from torch import nn
    >>> from tutelage import Distillation
    >>> student, teacher, batch = nn.Linear(4, 3), Snapshot(cycles=2), (torch.randn(8, 4), torch.arange(8) % 3)
    >>> d = Distillation(student, teacher, losses=teacher.losses()).bind(batch)
    >>> first = sorted(d(batch).values)
    >>> d.progress = 0.5
    >>> first, sorted(d(batch).values)
    (['TaskLoss'], ['AsymmetricKD', 'TaskLoss', 'TaskLoss_2'])
    """

    def __init__(self, cycles: int = 4):
        if cycles < 2:
            raise ValueError(f"Snapshot: cycles={cycles}: expected 2 or more, as the first has no teacher")
        self.cycles = cycles
        self.cycle = 0

    def losses(self, temperature: float = 3.0) -> list[Loss]:
        """The published ones.

        Args:
            temperature: T.
        """
        more = StartAt(1 / temperature, at=1 / self.cycles)
        return [TaskLoss(), TaskLoss(weight=more), AsymmetricKD(temperature=temperature)]

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        if self._dry:  # when binding, so that losses see what they will be given
            return super().lessons(batch, student)
        # beyond the rounding of a step's part of all steps
        cycle = min(math.floor(batch.progress * self.cycles + 1e-9), self.cycles - 1)
        if cycle != self.cycle:
            self.take()
            self.cycle = cycle
        return super().lessons(batch, student) if cycle else [Lesson(student, None)]

    def own_state(self) -> dict[str, Any]:
        return {**super().own_state(), "cycle": self.cycle}

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        self.cycle = state["cycle"]
