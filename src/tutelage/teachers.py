"""The teacher role: who teaches whom, and the one policy for frozen networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from tutelage.acceleration import Form, accelerated, known_speed
from tutelage.knowledge.base import Loss
from tutelage.record import Record
from tutelage.speedup import choose
from tutelage.taps import Observer
from tutelage.views import Batch, Inputs


@dataclass
class Lesson:
    """One who learns and one who teaches, on one batch.

    Args:
        student: the learner's record.
        teacher: the teacher's record, or ``None`` where somebody learns from the labels alone; losses that need a
            teacher pass such a lesson over.
        weight: of this lesson among the batch's lessons.
        key: names the pair of networks where there are several, the same in every batch and without a dot. What a loss
            owns (a projector, a critic, a memory) it owns once for each key.
    """

    student: Record
    teacher: Record | None
    weight: float = 1.0
    key: str = ""


class Teacher:
    """Base of the teacher role. Given a batch and what the student said of it, it returns lessons.

    Most subclasses override only :meth:`lessons`. A teacher that is the student itself (peers, exits) reads the
    student's record instead of running a network, and says with :meth:`bind` what it wants to find there.
    """

    def names(self, student: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The two modules in which the losses' student and teacher addresses are looked up."""
        return student, student

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        """Take note of what the losses read; return the addresses to tap in the student."""
        return student_reads

    def check(self, losses: Sequence[Loss]) -> None:
        """Refuse losses that it cannot teach with, by a ``ValueError``; called when binding, their taps resolved."""

    def ahead(self, batch: Batch) -> None:
        """Called before the student's forward pass of a step: what a network does now, it does while no graph of the
        student is held, so that the two need the larger of their memories and not the sum."""

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        raise NotImplementedError(f"{type(self).__name__} does not say how it teaches")

    def apply(self, change: Callable[[nn.Module], Any]) -> None:
        """Give every network that the teacher owns to ``change`` (to move it to a device)."""

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint must hold to resume; nothing for frozen teachers."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`own_state` gave."""


class NoTeacher(Teacher):
    """The student alone with the labels: the control of every comparison."""

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        return [Lesson(student, None)]


class Frozen(Teacher):
    """A network that teaches and never changes: wholly in eval mode, without gradients, not copied.

    It is no submodule of anything, so it appears in no optimiser, no DDP, no checkpoint and no export. After each
    forward pass it is what it was, bit for bit.

    Args:
        module: the network. When it is bound, it is put in eval mode and its parameters stop requiring gradients.
        batch_statistics: for methods whose authors normalise with the batch's own statistics (Overhaul): a *copy* of
            the network runs with its batch-norm layers in train mode, without changing their running averages.
        speed: ``"plain"``: the network itself answers. Otherwise an accelerated *copy* does, from the first batch after
            binding on, and the network itself stays what is evaluated and reported. ``"auto"`` tries ``bf16``,
            ``channels_last`` and ``fold`` on that batch and keeps what pays, by the clock; a list names accelerations
            (:func:`tutelage.acceleration.accelerated`), which are kept whatever the clock says. The choice is printed
            and part of a checkpoint: a resumed run goes on with it. Losses that derive the teacher's outputs with
            respect to its inputs get the plain network.
        max_divergence: an acceleration is left out if with it the mean KL(plain ‖ accelerated) of the logits on that
            batch is above this, in nats; 0 lets nothing pass that changes a bit.
        max_error: or if a tensor that is read differs by more than this part of its norm.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: an unknown ``speed``, or a negative bound.

    Memory: with ``speed`` one more network, and another one while it is chosen.

    >>> teacher = Frozen(nn.Linear(4, 2))
    >>> _ = teacher.bind(nn.Linear(4, 2), ["@logits"], ["@logits"])
    >>> any(p.requires_grad for p in teacher.module.parameters())
    False
    """

    def __init__(
        self,
        module: nn.Module,
        batch_statistics: bool = False,
        speed: Literal["plain", "auto"] | Sequence[str] = "plain",
        max_divergence: float = 0.01,
        max_error: float = 0.05,
    ):
        if not isinstance(module, nn.Module):
            raise TypeError(f"teacher: expected an nn.Module or a Teacher, got {type(module).__name__}")
        self.module = copy.deepcopy(module) if batch_statistics else module
        if batch_statistics:
            for layer in self.module.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    # Without running averages a layer in eval mode normalises with the batch.
                    layer.track_running_stats = False
                    layer.running_mean = layer.running_var = None
        for name, bound in (("max_divergence", max_divergence), ("max_error", max_error)):
            if not bound >= 0:
                raise ValueError(f"{name}={bound}: expected 0 or more")
        self.speed, self.bounds = known_speed(speed), (max_divergence, max_error)
        self.observer: Observer | None = None
        self._dry = True
        self._said: tuple[Batch, Record] | None = None  # ahead of the student
        self._chosen: tuple[list[str], bytes | None] | None = None  # accelerations, and the file of int8
        self._form: Form | None = None

    def names(self, student: nn.Module) -> tuple[nn.Module, nn.Module]:
        self._refuse_shared(student)
        self.module.eval()  # where a loss chooses its own taps, the next thing is a forward pass
        return student, self.module

    def _refuse_shared(self, student: nn.Module) -> None:
        if self.module is student:
            raise ValueError(
                "teacher: this is the student object itself, which would freeze it; give a copy "
                "(copy.deepcopy(student)) or another network"
            )
        shared = {id(p) for p in self.module.parameters()} & {id(p) for p in student.parameters()}
        if shared:
            raise ValueError(f"teacher: shares {len(shared)} parameter tensors with the student; give it its own")

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        self._refuse_shared(student)
        self.module.requires_grad_(False)
        self.module.eval()
        self.observer, self._dry = Observer(self.module, teacher_reads), True
        self._chosen = self._form = None
        return student_reads

    def ahead(self, batch: Batch) -> None:
        # What overrides lessons may want to change the network, the inputs or whether it is asked at all.
        self._said = (batch, self._answer(batch)) if type(self).lessons is Frozen.lessons else None

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        said, self._said = self._said, None
        return [Lesson(student, said[1] if said and said[0] is batch else self._answer(batch))]

    def _answer(self, batch: Batch) -> Record:
        assert self.observer is not None, "bind first"
        if not self.observer.addresses:
            return Record()  # no loss reads it, so it need not run
        if self.module.training or any(m.training for m in self.module.modules()):
            self.module.eval()  # somebody called .train() on it between two steps
        if self.speed and not self._dry and not batch.differentiable:
            with torch.no_grad():
                return self._faster(self.observer, batch.teacher)
        # no_grad and not inference_mode, whose tensors autograd refuses to save when a loss multiplies them
        # (and with a graph only where a loss derives the teacher's outputs with respect to its inputs)
        with torch.set_grad_enabled(batch.differentiable):
            run = self.observer.dry_run if self._dry else self.observer
            record = run(batch.teacher)
        self._dry = False
        return record

    def _faster(self, plain: Observer, inputs: Inputs) -> Record:
        """What the accelerated copy says; the first call after binding chooses it.

        Binding itself is too early: a run that is resumed takes back what it chose only after it.
        """
        if self._chosen is None:
            several = dist.is_available() and dist.is_initialized()
            if not several or dist.get_rank() == 0:
                self._form = choose(plain, inputs, self.speed, *self.bounds)
                self._chosen = (list(self._form.names), self._form.file) if self._form else ([], None)
            if several:  # the first process's choice, or each would have another teacher
                choice = [self._chosen]
                dist.broadcast_object_list(choice, src=0)
                self._chosen = choice[0]
        assert self._chosen is not None
        names, file = self._chosen
        if not names:
            return plain(inputs)
        if self._form is None:
            self._form = accelerated(plain, names, file=file)
        return self._form(inputs)

    def apply(self, change: Callable[[nn.Module], Any]) -> None:
        change(self.module)
        self._form = None  # to be made again from the changed network

    def own_state(self) -> dict[str, Any]:
        """What was chosen; nothing for plain networks, which need nothing to resume."""
        if self._chosen is None:
            return {}
        names, file = self._chosen
        held = None if file is None else torch.from_numpy(np.frombuffer(file, np.uint8).copy())
        return {"speed": self.speed, "chosen": names, "file": held}

    def load_own_state(self, state: dict[str, Any]) -> None:
        if not state:
            return
        asked = known_speed(state["speed"])
        if asked != self.speed:
            raise ValueError(
                f"speed={self.speed or 'plain'!r}: the run was begun with {asked!r}; expected the same to resume it"
            )
        held = state["file"]
        self._chosen, self._form = (list(state["chosen"]), None if held is None else held.numpy().tobytes()), None


def as_teacher(teacher: nn.Module | Teacher | None) -> Teacher:
    """The teacher role from what users give: a network, a role, or nothing.

    >>> type(as_teacher(nn.Linear(2, 2))).__name__, type(as_teacher(None)).__name__
    ('Frozen', 'NoTeacher')
    """
    if teacher is None:
        return NoTeacher()
    return teacher if isinstance(teacher, Teacher) else Frozen(teacher)
