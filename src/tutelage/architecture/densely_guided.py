"""Densely guided distillation: each network of a chain learns from all the larger ones, of which some are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.architecture.teacher_assistant import chain, leg_names
from tutelage.catalogue import method
from tutelage.distilling import Result
from tutelage.knowledge.base import Loss
from tutelage.procedures import Leg, Setting, laid_out, train_legs
from tutelage.record import Record
from tutelage.run import Epoch
from tutelage.schedule import Stage
from tutelage.taps import UnknownTap
from tutelage.teachers import Frozen, Lesson, Teacher
from tutelage.views import Batch


class SeveralTeachers(Teacher):
    """Several frozen networks that teach side by side, of which some are left out of each batch at random.

    Each network that is not left out gives one lesson, of weight 1 / (number of these), so the labels count once and a
    loss weighs what it weighs with one teacher. A network that is left out does not run. What a loss owns (a projector)
    it owns once for each network. The losses' teacher addresses are looked up in the first network, and must exist in
    all.

    Args:
        teachers: the networks.
        drop: how many are left out of a batch, drawn from torch's global generator; at least one always teaches.

    Raises:
        ValueError: no network, one of them twice, or ``drop`` below 0.
        TypeError: something else than a network.

    Memory: that of all networks, and of the losses once for each.

    >>> from tutelage import KD, Distillation
    >>> teacher = SeveralTeachers([nn.Linear(8, 3), nn.Linear(8, 3)], drop=1)
    >>> d = Distillation(nn.Linear(8, 3), teacher, losses=[KD()]).bind(torch.ones(4, 8))
    >>> bool(d(torch.ones(4, 8)).total > 0)
    True
    """

    def __init__(self, teachers: Sequence[nn.Module], drop: int = 0):
        if not teachers:
            raise ValueError("teachers: expected at least one network")
        if drop < 0:
            raise ValueError(f"drop={drop}: expected a whole number, 0 or more")
        if len({id(network) for network in teachers}) < len(teachers):
            raise ValueError("teachers: the same network appears twice; give copies")
        self.teachers = [Frozen(network) for network in teachers]
        self.drop = min(drop, len(teachers) - 1)
        self._bound = False

    def names(self, student: nn.Module) -> tuple[nn.Module, nn.Module]:
        for teacher in self.teachers[1:]:
            teacher.names(student)
        return self.teachers[0].names(student)

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        for i, teacher in enumerate(self.teachers):
            try:
                teacher.bind(student, student_reads, teacher_reads)
            except UnknownTap as error:
                raise UnknownTap(f"teacher {i} lacks a tap that every teacher must have: {error}") from None
        self._bound = False
        return student_reads

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        kept = list(range(len(self.teachers)))
        if self._bound and self.drop:
            kept = sorted(torch.randperm(len(kept))[self.drop :].tolist())
        self._bound = True  # binding, the first call, is with all
        return [
            Lesson(student, lesson.teacher, 1 / len(kept), key=f"teacher{i}")
            for i in kept
            for lesson in self.teachers[i].lessons(batch, student)
        ]

    def apply(self, change: Callable[[nn.Module], Any]) -> None:
        for teacher in self.teachers:
            teacher.apply(change)


def _legs(setting: Setting, assistants: Sequence[nn.Module], drop: int = 1) -> list[Leg]:
    networks = chain(setting, assistants)
    return [
        Leg(name, networks[n], SeveralTeachers(networks[:n], drop), setting.losses, setting.stages)
        for n, name in enumerate(leg_names(networks), 1)
    ]


@method(
    section="4+",
    role="procedure",
    paper="Son, Na, Choi, Hwang: Densely Guided Knowledge Distillation using Multiple Teacher Assistants",
    year=2021,
    link="https://arxiv.org/abs/2009.08825",
    needs=("extra stages", "other models"),
    use="A chain of two assistants or more, whose errors shall not add up: each learns from all that are larger.",
)
@laid_out(_legs)
def densely_guided(
    student: nn.Module,
    assistants: Sequence[nn.Module],
    teacher: nn.Module | Frozen,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    drop: int = 1,
    losses: Sequence[Loss] | None = None,
    stages: Sequence[Stage] | None = None,
    out: str | Path | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
    **training: Any,
) -> list[Result]:
    """Distil by steps in which everybody above teaches: assistant k from the teacher and the assistants before it.

    With n assistants the student's loss is, as the paper's equation 7 divided by its n + 1 teachers,
    (1 − λ) · CE(z, y) + λ · mean_i T² · KL(softmax(z_i / T) ‖ softmax(z / T)), the mean over those that are not left
    out of the batch; so the weights of losses mean what they mean with one teacher. The authors' code sums the
    divergences instead and counts the labels once: with m teachers in each batch give KD the m-fold weight. With the
    code's default, λ = 1 (``losses=[KD(temperature=5, weight=1)]``), the two differ by a factor of everything.

    The code leaves out a fixed number of teachers from each batch, one by default, and so does this.

    Args:
        student: the last and smallest.
        assistants: between teacher and student, from the largest to the smallest; with one, the student has two
            teachers.
        teacher: the first and largest.
        train, validation: as in :func:`tutelage.distill`, read by every leg.
        drop: how many teachers are left out of a batch at random; where there are not more than that, one stays.
        losses: each leg learns from a copy of its own, and must find its addresses in every network above it.
        stages: instead of ``losses``; copied as well.
        out: each leg's folder is in it: ``assistant-1``, ``assistant-2``, ..., ``student``.
        after_epoch: called with each epoch's line of the student's own training.
        **training: further arguments of :func:`tutelage.distill`. With ``resume=True`` finished legs are not trained
            again.

    Returns:
        One result a leg, the student's last.

    Raises:
        ValueError: no assistant, no teacher, one network in two places, ``drop`` below 0, or losses that were bound.

    Memory: that of all networks, which run side by side; their logits one after the other.

    Son, Na, Choi, Hwang 2021, "Densely Guided Knowledge Distillation using Multiple Teacher Assistants",
    https://arxiv.org/abs/2009.08825

    >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    >>> big, middle, small = (nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 3)) for w in (64, 16, 4))
    >>> results = densely_guided(small, [middle], big, data, data, epochs=1, progress=False)
    >>> [result.student is network for result, network in zip(results, (middle, small))]
    [True, True]
    """
    legs = _legs(Setting(student, teacher, losses, stages), assistants, drop)
    return train_legs(legs, train, validation, out=out, after_epoch=after_epoch, **training)
