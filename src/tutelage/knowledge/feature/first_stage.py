"""Losses with a first stage of their own, in which networks learn beside the teacher while the student rests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tutelage.knowledge.base import Loss, Tap
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


class Learned(nn.Module):
    """Whether anything has been learned yet: a buffer, so that it is saved and carried over with what was learned.

    >>> bool(Learned().yes)
    False
    """

    yes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("yes", torch.tensor(False))


class FirstStage(Loss):
    """Base of losses whose first stage trains something on the teacher's features alone.

    In the first stage the student is read at its input, where its forward pass ends, so nothing in it changes. The
    next stage goes on with what the first one learned, is refused without it, and begins with fresh
    ``students_parts``, which the first stage cannot build.

    A subclass calls ``super().build`` first, and :meth:`taught` whenever its first stage gives a loss.

    Args:
        taps: of both models, also in the first stage.
        first: whether this is the first stage.
        weight: of the term.
        name: of the term; the same in both stages.

    Class attributes that a subclass sets:
        first_stage: how to write the first stage's loss, for the message without it.
        students_parts: names of the ``nn.ModuleList`` that read the student; empty in the first stage.

    >>> FirstStage("layer2", first=True, weight=1.0).first
    True
    """

    first_stage = ""
    students_parts: tuple[str, ...] = ()

    def __init__(self, *taps: Tap, first: bool, weight: Weight, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        self.first = first
        self.learned = Learned()

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        chosen = super().resolve(student, teacher, batch)
        if self.first:
            self.pairs = [(":input", theirs) for _, theirs in self.pairs]
        return chosen

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        self.learned = Learned()

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        if not self.first and not bool(self.learned.yes):
            raise ValueError(
                f"{self.name}: its first stage has taught it nothing; let a stage with {self.first_stage} of the same "
                f"name ({self.name!r}) and the same layers go before"
            )

    def taught(self) -> None:
        """Note that the first stage trains; evaluation and binding teach nothing."""
        if self.training:
            self.learned.yes.fill_(True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for part in self.students_parts:
            own = getattr(self, part).state_dict(prefix=f"{prefix}{part}.")
            if not any(key.startswith(f"{prefix}{part}.") for key in state_dict):
                state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *rest)
