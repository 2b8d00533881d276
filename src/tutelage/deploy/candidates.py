"""What may become the student of a compression: what a builder makes of the teacher, or a smaller network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from tutelage.architecture.builders import StudentBuilder
from tutelage.architecture.prune import Prune as Prune  # a candidate like every builder

Precision = Literal["float32", "int8"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")


@dataclass(frozen=True, eq=False)
class Shrink:
    """A candidate: a smaller network, with its first weights.

    >>> Shrink(nn.Linear(2, 1)).label
    'Linear'
    """

    model: nn.Module
    name: str | None = None

    @property
    def label(self) -> str:
        """What it is called, in tables and as a folder."""
        return self.name or type(self.model).__name__


Candidate = StudentBuilder | Shrink
