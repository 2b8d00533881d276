"""Teacher assistants: networks of middle size that carry knowledge across a capacity gap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.catalogue import method
from tutelage.distilling import Result
from tutelage.knowledge.base import Loss
from tutelage.procedures import Leg, Setting, laid_out, refuse_bound, train_legs
from tutelage.run import Epoch
from tutelage.schedule import Stage
from tutelage.teachers import Frozen, Teacher


def chain(setting: Setting, assistants: Sequence[nn.Module]) -> list[nn.Module]:
    """The teacher's network, the assistants and the student, checked.

    Raises:
        ValueError: no assistant, no teacher's network, or one network in two places.
    """
    if not assistants:
        raise ValueError("assistants: expected one network or more between teacher and student")
    first = setting.teacher.module if isinstance(setting.teacher, Frozen) else setting.teacher
    if not isinstance(first, nn.Module):
        raise ValueError(f"teacher: assistants need a network above them, got {type(first).__name__}")
    networks = [first, *assistants, setting.student]
    if len({id(network) for network in networks}) < len(networks):
        raise ValueError("assistants: the same network stands in two places of the chain; give copies")
    return networks


def leg_names(networks: Sequence[nn.Module]) -> list[str]:
    """The folders of the legs in which all but the first of a :func:`chain` learn.

    >>> leg_names([nn.Identity(), nn.Identity(), nn.Identity()])
    ['assistant-1', 'student']
    """
    return [*(f"assistant-{n}" for n in range(1, len(networks) - 1)), "student"]


def _legs(
    setting: Setting, assistants: Sequence[nn.Module], assistant_losses: Sequence[Loss] | None = None
) -> list[Leg]:
    networks = chain(setting, assistants)
    refuse_bound(*(assistant_losses or ()))
    legs = [
        Leg(name, learner, above, setting.losses, setting.stages)
        for name, (above, learner) in zip(leg_names(networks), pairwise(networks), strict=True)
    ]
    legs[0].teacher = setting.teacher  # a role says how its network teaches
    if assistant_losses is not None:
        for leg in legs[:-1]:
            leg.losses, leg.stages = assistant_losses, None
    return legs


@method(
    section="4",
    role="procedure",
    paper="Mirzadeh et al.: Improved Knowledge Distillation via Teacher Assistant",
    year=2020,
    link="https://arxiv.org/abs/1902.03393",
    needs=("extra stages", "other models"),
    use="A teacher so much larger than the student that a smaller one teaches better, and time for several trainings.",
)
@laid_out(_legs)
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
        ValueError: no assistant, no teacher, one network in two places, or losses that were bound already.

    >>> import torch
    >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    >>> big, middle, small = (nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 3)) for w in (64, 16, 4))
    >>> results = teacher_assistant(small, [middle], big, data, data, epochs=1, progress=False)
    >>> [result.student is network for result, network in zip(results, (middle, small))], results[1].teacher is middle
    ([True, True], True)
    """
    legs = _legs(Setting(student, teacher, losses, stages), assistants, assistant_losses)
    return train_legs(legs, train, validation, out=out, after_epoch=after_epoch, **training)
