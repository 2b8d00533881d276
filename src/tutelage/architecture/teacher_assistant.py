"""Teacher assistants: networks of middle size that carry knowledge across a capacity gap."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.catalogue import method
from tutelage.distilling import Result, distill
from tutelage.knowledge.base import Loss
from tutelage.run import Epoch
from tutelage.schedule import Stage
from tutelage.teachers import Frozen, Teacher


@method(
    section="4",
    role="procedure",
    paper="Mirzadeh et al.: Improved Knowledge Distillation via Teacher Assistant",
    year=2020,
    link="https://arxiv.org/abs/1902.03393",
    needs=("extra stages", "other models"),
    use="A teacher so much larger than the student that a smaller one teaches better, and time for several trainings.",
)
def teacher_assistant(
    student: nn.Module,
    assistants: Sequence[nn.Module],
    teacher: nn.Module | Teacher,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    losses: Sequence[Loss] | None = None,
    stages: Sequence[Stage] | None = None,
    assistant_losses: Sequence[Loss] | None = None,
    out: str | Path | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
    **training: Any,
) -> list[Result]:
    """Distil by steps: teacher → first assistant → ... → last assistant → student.

    Each leg is one :func:`tutelage.distill` with the same settings, whose student (with its best weights on
    validation) teaches the next. As its teacher it is frozen and in eval mode, and stays so.

    Args:
        student: the last and smallest.
        assistants: between teacher and student, from the largest to the smallest; at least one.
        teacher: the first and largest.
        train, validation: as in :func:`tutelage.distill`, read by every leg.
        losses: not bound yet; each leg learns from a copy of its own. Their addresses must exist in every network
            that they read, so ``*`` or no address at all is safest with networks of different depth.
        stages: instead of ``losses``; copied as well.
        assistant_losses: what the assistants learn by, if that is something else; copied as well.
        out: each leg's folder is in it: ``assistant-1``, ``assistant-2``, ..., ``student``.
        after_epoch: called with each epoch's line of the student's own training.
        **training: further arguments of :func:`tutelage.distill`. With ``resume=True`` finished legs are not trained
            again, and the chain goes on where it stopped.

    Returns:
        One result a leg, the student's last.

    Raises:
        ValueError: no assistant, one network in two places, or losses that were bound already.

    >>> import torch
    >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    >>> big, middle, small = (nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 3)) for w in (64, 16, 4))
    >>> results = teacher_assistant(small, [middle], big, data, data, epochs=1, progress=False)
    >>> [result.student is network for result, network in zip(results, (middle, small))], results[1].teacher is middle
    ([True, True], True)
    """
    learners = [*assistants, student]
    if len(learners) < 2:
        raise ValueError("assistants: expected one network or more between teacher and student")
    first = teacher.module if isinstance(teacher, Frozen) else teacher
    if len({id(network) for network in (*learners, first)}) <= len(learners):
        raise ValueError("assistants: the same network stands in two places of the chain; give copies")
    staged = (loss for stage in stages or () for loss in stage.losses)
    for loss in (*(losses or ()), *(assistant_losses or ()), *staged):
        if loss.pairs:
            raise ValueError(f"losses: {loss.name} was bound to other networks already; give a new one")
    names = [*(f"assistant-{n}" for n in range(1, len(learners))), "student"]
    results: list[Result] = []
    for name, learner in zip(names, learners, strict=True):
        apart = assistant_losses is not None and learner is not student
        result = distill(
            learner,
            teacher,
            train,
            validation,
            losses=copy.deepcopy(assistant_losses if apart else losses),
            stages=None if apart else copy.deepcopy(stages),
            out=Path(out) / name if out else None,
            after_epoch=after_epoch if learner is student else None,
            **training,
        )
        results.append(result)
        teacher = result.student
    return results
