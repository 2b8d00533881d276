"""Tasks other than classification: the data set says how its truth is learned and how a model is judged."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Protocol

from tutelage.knowledge.base import Loss
from tutelage.views import Batch


class Figures:
    """What an evaluation found; subclasses are frozen dataclasses.

    Class attributes:
        main: the field that models are compared by: a share between 0 and 1, of which more is better.
        title: what that figure is called in a report.
    """

    main: ClassVar[str]
    title: ClassVar[str]
    samples: int
    agreement: float | None

    @property
    def value(self) -> float:
        """The main figure."""
        return getattr(self, self.main)

    def known(self) -> dict[str, float]:
        """The figures that there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}  # type: ignore[call-overload]


class Task(Protocol):
    """What a data set whose truth is no class number carries as its attribute ``task``.

    Attributes:
        name: in messages.
    """

    name: str

    def loss(self) -> Loss:
        """The loss on the truth alone: a teacher's own training, and the student's without a teacher."""

    def look(self, output: Any, batch: Batch) -> Any:
        """What is kept of one batch to judge by, in plain values and tensors on the processor."""

    def figures(self, looks: list[Any], theirs: list[Any] | None = None) -> Figures:
        """The figures of all batches' looks, and of the teacher's looks at the same batches the agreement."""


def task_of(data: Any) -> Task | None:
    """The task that a loader's data set carries; ``None`` for classification.

    >>> from tutelage.data import fashion_detection_loaders, fashion_loaders
    >>> task_of(fashion_detection_loaders(limit=10, validation=10).train).name, task_of(fashion_loaders().train)
    ('detection', None)
    """
    while data is not None:  # a data set may lie inside another, such as a part of it
        task = getattr(data, "task", None)
        if task is not None:
            return task
        data = getattr(data, "dataset", None)
    return None
