"""Procedures: several trainings one after another, laid out before the first of them begins.

A procedure is a function ``procedure(student=..., teacher=..., train=..., validation=..., ...)`` that trains more than
once and returns one :class:`tutelage.Result` a training, its *leg*. As each leg's networks are known beforehand, a
layout can say what they are: a recipe is checked with it before a teacher is trained, and the last leg's step is timed
with it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tutelage.distilling import Result, distill
from tutelage.errors import nearest
from tutelage.knowledge.base import Loss
from tutelage.run import Epoch
from tutelage.schedule import Stage
from tutelage.teachers import Teacher

GIVEN = (
    *("student", "teacher", "train", "validation", "test", "views", "training"),
    *("losses", "stages", "out", "resume", "overwrite", "after_epoch"),
)
"""What every procedure is called with; its other arguments are its own."""


@dataclass(frozen=True)
class Setting:
    """What a layout is made of, beside the procedure's own arguments.

    Args:
        student: learns in the last leg.
        teacher: teaches in the first, if there is one.
        losses, stages: as for :func:`tutelage.distill`, not bound yet.
        seed: of fresh weights.

    Raises:
        ValueError: both losses and stages, or a loss that was bound already.
    """

    student: nn.Module
    teacher: nn.Module | Teacher | None = None
    losses: Sequence[Loss] | None = None
    stages: Sequence[Stage] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.losses is not None and self.stages is not None:
            raise ValueError("losses and stages: give one of them")
        refuse_bound(*(self.losses or ()), *(loss for stage in self.stages or () for loss in stage.losses))


def setting_of(keywords: dict[str, Any]) -> Setting:
    """The setting that a recipe's built fields make."""
    return Setting(keywords["student"], *(keywords.get(name) for name in ("teacher", "losses", "stages")))  # type: ignore


@dataclass
class Leg:
    """One training of a procedure.

    Args:
        name: of its folder in the procedure's.
        student: who learns.
        teacher: who teaches; with the networks of earlier legs as they are after these.
        losses, stages: each leg learns from a copy of its own; neither means what :func:`tutelage.distill` does then.
    """

    name: str
    student: nn.Module
    teacher: nn.Module | Teacher | None
    losses: Sequence[Loss] | None = None
    stages: Sequence[Stage] | None = None


Procedure = TypeVar("Procedure", bound=Callable[..., list[Result]])


def laid_out(layout: Callable[..., list[Leg]]) -> Callable[[Procedure], Procedure]:
    """Function decorator that joins a procedure to its layout, a function of a :class:`Setting` and of the procedure's
    own arguments, which refuses wrong ones with a ``ValueError``."""

    def enter(procedure: Procedure) -> Procedure:
        procedure.layout = layout  # type: ignore[attr-defined]
        return procedure

    return enter


def train_legs(
    legs: Sequence[Leg],
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    out: str | Path | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
    **settings: Any,
) -> list[Result]:
    """Train one leg after the other.

    Args:
        legs: in their order.
        train, validation: read by every leg.
        out: each leg's folder is in it, by its name.
        after_epoch: called with each epoch's line of the last leg.
        **settings: further arguments of :func:`tutelage.distill`. With ``resume=True`` finished legs are not trained
            again.
    """
    results = []
    for leg in legs:
        result = distill(
            leg.student,
            leg.teacher,
            train,
            validation,
            losses=copy.deepcopy(leg.losses),
            stages=copy.deepcopy(leg.stages),
            out=Path(out) / leg.name if out else None,
            after_epoch=after_epoch if leg is legs[-1] else None,
            **settings,
        )
        results.append(result)
    return results


def lay_out(procedure: Callable[..., list[Result]] | None, setting: Setting) -> list[Leg]:
    """The legs of a procedure with its own arguments in it; none, or one without a layout, counts as a single leg.

    Raises:
        ValueError: what the layout refuses.
    """
    layout = getattr(_function(procedure), "layout", None)
    if layout is None:
        return [Leg("student", setting.student, setting.teacher, setting.losses, setting.stages)]
    return layout(setting, **{name: p.default for name, p in _own(procedure).items()})


def check(procedure: Any) -> None:
    """Refuse what cannot be called as a procedure, before anything is trained.

    Raises:
        ValueError: it is no function, lacks an argument that procedures have, or its own arguments are incomplete,
            unknown or not its own; the message names the field of a recipe.

    >>> from tutelage import teacher_assistant
    >>> check(teacher_assistant)
    Traceback (most recent call last):
    ...
    ValueError: procedure.init_args: the field 'assistants' of teacher_assistant is missing
    """
    function = _function(procedure)
    if not inspect.isfunction(function):
        raise ValueError(f"procedure: expected a function that trains several times, got {type(procedure).__name__}")
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and (lacking := set(GIVEN) - set(parameters)):
        raise ValueError(f"procedure: {function.__name__} does not take {', '.join(sorted(lacking))}")
    own = _own(procedure)
    for name in getattr(procedure, "keywords", {}):
        if name in GIVEN:
            raise ValueError(f"procedure.init_args.{name}: the recipe gives it; write it as a field of the recipe")
        if name not in own:
            raise ValueError(f"procedure.init_args.{name}: no such field of {function.__name__}{nearest(name, own)}")
    for name, p in own.items():
        if p.default is p.empty:
            raise ValueError(f"procedure.init_args: the field {name!r} of {function.__name__} is missing")


def refuse_bound(*losses: Loss) -> None:
    """Refuse losses that were bound to networks already, as each leg needs fresh ones."""
    for loss in losses:
        if loss.pairs:
            raise ValueError(f"losses: {loss.name} was bound to other networks already; give a new one")


def seed_of(settings: dict[str, Any]) -> int:
    """The seed among the arguments of :func:`tutelage.distill`."""
    training = settings.get("training")
    return training.seed if training is not None else settings.get("seed", 0)


def _function(procedure: Any) -> Any:
    return procedure.func if isinstance(procedure, functools.partial) else procedure


def _own(procedure: Any) -> dict[str, inspect.Parameter]:
    """The parameters that a recipe does not give, with what is known of them as their defaults."""
    known = getattr(procedure, "keywords", {})
    parameters = inspect.signature(_function(procedure)).parameters
    own = {n: p for n, p in parameters.items() if n not in GIVEN and p.kind is not p.VAR_KEYWORD}
    return {n: p.replace(default=known[n]) if n in known else p for n, p in own.items()}
