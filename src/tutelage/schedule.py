"""When: weights that change while training goes on, and stages that follow one another.

A weight schedule is a function of progress, the part of the stage's training that is done (0 at the first step,
1 at the end). An "until" of 20 of 240 epochs is ``20 / 240``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tutelage.knowledge.base import Loss


def _fraction(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value}: expected a part of the training between 0 and 1 (epochs / all epochs)")
    return value


@dataclass(frozen=True)
class Constant:
    """The same weight throughout.

    >>> Constant(3.0)(0.7)
    3.0
    """

    weight: float

    def __call__(self, progress: float) -> float:
        return self.weight


@dataclass(frozen=True)
class WarmUp:
    """From 0 linearly up to ``weight`` at ``until``, then constant.

    >>> [WarmUp(2.0, until=0.5)(p) for p in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 1.0, 2.0, 2.0]
    """

    weight: float
    until: float

    def __post_init__(self) -> None:
        _fraction("until", self.until)

    def __call__(self, progress: float) -> float:
        return self.weight * (1.0 if progress >= self.until else progress / self.until)


@dataclass(frozen=True)
class RampUp:
    """From nearly 0 up to ``weight`` at ``until`` as weight·exp(−5·(1 − p/until)²), slow at both ends; then constant.

    It is what methods with a teacher that learns too begin with (Laine & Aila 2017, https://arxiv.org/abs/1610.02242).

    >>> [round(RampUp(2.0, until=0.5)(p), 3) for p in (0.0, 0.25, 0.5, 1.0)]
    [0.013, 0.573, 2.0, 2.0]
    """

    weight: float
    until: float

    def __post_init__(self) -> None:
        _fraction("until", self.until)

    def __call__(self, progress: float) -> float:
        return self.weight if progress >= self.until else self.weight * math.exp(-5 * (1 - progress / self.until) ** 2)


@dataclass(frozen=True)
class Ramp:
    """Linearly from ``start`` to ``end`` over the whole training.

    >>> Ramp(1.0, 0.0)(0.25)
    0.75
    """

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * min(max(progress, 0.0), 1.0)


@dataclass(frozen=True)
class Cosine:
    """From ``start`` to ``end`` along half a cosine: flat at both ends.

    >>> round(Cosine(1.0, 0.0)(0.5), 6)
    0.5
    """

    start: float
    end: float = 0.0

    def __call__(self, progress: float) -> float:
        p = min(max(progress, 0.0), 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * p))


@dataclass(frozen=True)
class StopAt:
    """``weight`` until ``at``, then 0: early-stopped distillation.

    >>> StopAt(1.0, at=0.8)(0.79), StopAt(1.0, at=0.8)(0.8)
    (1.0, 0.0)
    """

    weight: float
    at: float

    def __post_init__(self) -> None:
        _fraction("at", self.at)

    def __call__(self, progress: float) -> float:
        return self.weight if progress < self.at else 0.0


@dataclass(frozen=True)
class StartAt:
    """0 until ``at``, then ``weight``: a term that needs a student who has learned something already.

    >>> StartAt(0.1, at=2 / 3)(0.66), StartAt(0.1, at=2 / 3)(0.67)
    (0.0, 0.1)
    """

    weight: float
    at: float

    def __post_init__(self) -> None:
        _fraction("at", self.at)

    def __call__(self, progress: float) -> float:
        return self.weight if progress >= self.at else 0.0


Schedule = Constant | WarmUp | RampUp | Ramp | Cosine | StopAt | StartAt | Callable[[float], float]
Weight = float | Schedule


def weight_at(weight: Weight, progress: float) -> float:
    """The weight now.

    >>> weight_at(2.0, 0.5), weight_at(Ramp(0.0, 1.0), 0.5)
    (2.0, 0.5)
    """
    return float(weight(progress)) if callable(weight) else float(weight)


@dataclass
class Stage:
    """One part of a training that has its own losses, length and learning rate (a hint stage, a fine-tuning stage).

    Args:
        losses: as for :class:`tutelage.Distillation`.
        epochs: the stage's length.
        lr: its learning rate; ``None`` takes the run's.
        name: of its folder in the run's.

    >>> from tutelage import KD, FitNets, TaskLoss
    >>> stages = [Stage([FitNets("layer2")], epochs=2), Stage([TaskLoss(), KD()], epochs=8)]
    """

    losses: Sequence[Loss]
    epochs: int
    lr: float | None = None
    name: str | None = None
