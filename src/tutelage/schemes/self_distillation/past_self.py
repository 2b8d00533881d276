"""Teachers that are a frozen copy of the student as it was, or as it was on average."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tutelage.record import Record
from tutelage.steps import Steps
from tutelage.taps import Observer
from tutelage.teachers import Lesson, Teacher
from tutelage.views import Batch


class PastSelf(Teacher):
    """Base of teachers that are a copy of the student: frozen, in eval mode, and saved with the run.

    A subclass decides in :meth:`lessons` when the copy changes, perhaps when :attr:`student_steps` says that the
    student has. Both are made when binding, the copy with the weights that the student has then.

    Memory: one more network, and its activations without a graph.
    """

    copy: nn.Module
    student_steps: Steps

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        self.copy = copy.deepcopy(student).requires_grad_(False).eval()
        self._student, self.student_steps = (student,), Steps(student)
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

    def apply(self, change: Callable[[nn.Module], Any]) -> None:
        if hasattr(self, "copy"):
            change(self.copy)

    def own_state(self) -> dict[str, Any]:
        return {"copy": self.copy.state_dict(), "stepped": self.student_steps.pending()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.copy.load_state_dict(state["copy"])
        self.student_steps.restore(state["stepped"])


def _state(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]
