"""Teachers that are a frozen copy of the student as it was, or as it was on average."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tutelage.record import Record
from tutelage.taps import Observer
from tutelage.teachers import Lesson, Teacher
from tutelage.views import Batch


class PastSelf(Teacher):
    """Base of teachers that are a copy of the student: frozen, in eval mode, and saved with the run.

    A subclass decides in :meth:`lessons` when the copy changes. :attr:`copy` is made when binding, with the weights
    that the student has then.

    Memory: one more network, and its activations without a graph.
    """

    copy: nn.Module

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        self.copy = copy.deepcopy(student).requires_grad_(False).eval()
        self._student, self._seen = (student,), _version(student)
        self._observer, self._dry = Observer(self.copy, teacher_reads), True
        return student_reads

    def said(self, batch: Batch) -> Record:
        """What the copy says of what the teacher sees."""
        if not self._observer.addresses:
            return Record()
        if any(m.training for m in self.copy.modules()):
            self.copy.eval()
        with torch.set_grad_enabled(batch.differentiable):
            record = (self._observer.dry_run if self._dry else self._observer)(batch.teacher)
        self._dry = False
        return record

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        return [Lesson(student, self.said(batch))]

    def take(self, part: float = 1.0) -> None:
        """Move the copy towards the student: θ' ← (1 − part)·θ' + part·θ, buffers too; those of whole numbers are
        taken as they are."""
        with torch.no_grad():
            for mine, theirs in zip(_state(self.copy), _state(self._student[0]), strict=True):
                if mine.is_floating_point():
                    mine.lerp_(theirs.to(mine), part)
                else:
                    mine.copy_(theirs)

    def stepped(self) -> bool:
        """Whether the student's weights were changed in place since this was last asked: once a step, however many
        batches it is made of."""
        now = _version(self._student[0])
        changed, self._seen = now != self._seen, now
        return changed

    def apply(self, change: Callable[[nn.Module], Any]) -> None:
        if hasattr(self, "copy"):
            change(self.copy)

    def own_state(self) -> dict[str, Any]:
        return {"copy": self.copy.state_dict(), "stepped": _version(self._student[0]) != self._seen}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.copy.load_state_dict(state["copy"])
        # the student's weights were loaded just now, which is no step; one that the copy had not seen yet still is
        self._seen = -1 if state["stepped"] else _version(self._student[0])


def _version(network: nn.Module) -> int:
    """How often the parameters were changed in place, which every optimiser does."""
    return sum(p._version for p in network.parameters())


def _state(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]
