"""What a training leaves, and where it stands: everything that must be remembered to go on exactly."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from tutelage.distillation import Distillation
from tutelage.training import Training


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; a checkpoint of the last step was written."""


@dataclass
class Epoch:
    """One line of a run's history: mean losses of the epoch, where it was validated the metrics, and before its first
    step each term's share of the gradient."""

    epoch: int
    step: int
    seconds: float
    lr: float
    losses: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        terms = "  ".join(f"{name} {value:.4g}" for name, value in self.losses.items())
        shown = [n for n in ("accuracy", "nll", "ap50", "pck") if n in self.metrics]
        figures = "  ".join(f"{n} {self.metrics[n]:.4f}" for n in shown)
        return f"epoch {self.epoch + 1:3d}  {terms}  {figures}  ({self.seconds:.1f} s)"


@dataclass
class Run:
    """A training's history and position.

    Args:
        history: one line an epoch.
        last: the student's weights after the last finished epoch.
        best: its weights when the monitored figure was best; ``None`` without validation.
        kept: the student's weights, or the files of them in the run's folder, by the number of epochs before them
            (``Training.keep_every``).
        best_value, best_epoch: that figure and when it was.
        epoch, batches, step: the epoch under way, the batches of it that are done, the optimiser steps of all.
        since_best: validations since the best one.
        sums: [sum, batches] of each term in the epoch under way.
        shares: each term's share of the gradient on its first batch.
    """

    history: list[Epoch] = field(default_factory=list)
    last: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] | None = None
    kept: dict[int, Path | dict[str, Tensor]] = field(default_factory=dict)
    best_value: float | None = None
    best_epoch: int | None = None
    epoch: int = 0
    batches: int = 0
    step: int = 0
    since_best: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def validated(self, line: Epoch, metrics: dict[str, float], training: Training) -> bool:
        """Note a validation; returns whether it is the best so far.

        Raises:
            ValueError: the monitored figure is not among the metrics (top5 of few classes, agreement with no teacher).
        """
        line.metrics = metrics
        if training.monitor not in metrics:
            raise ValueError(f"monitor={training.monitor!r}: the validation has only {', '.join(metrics)}")
        value = metrics[training.monitor]
        better = training.better(value, self.best_value)
        if better:
            self.best_value, self.best_epoch, self.since_best = value, line.epoch, 0
        else:
            self.since_best += 1
        return better

    def state(self, d: Distillation, train: Any, scheduler: LRScheduler) -> dict[str, Any]:
        """What a checkpoint holds beside the weights and the optimiser: plain values and tensors only."""
        position = {k: v for k, v in vars(self).items() if k not in ("history", "last", "best", "kept")}
        return {
            "position": position,
            "history": [asdict(line) for line in self.history],
            "scheduler": scheduler.state_dict(),
            "side_learners": {name: learner.own_state() for name, learner in d.side_learners().items()},
            "teacher": d.teacher.own_state(),
            "data": train.own_state() if hasattr(train, "own_state") else {},
            "random": random_state(),
        }

    @classmethod
    def restored(cls, state: dict[str, Any], d: Distillation, train: Any, scheduler: LRScheduler) -> Run:
        """Give everything its :meth:`state` back, except the random numbers, and return the run."""
        scheduler.load_state_dict(state["scheduler"])
        for name, learner in d.side_learners().items():
            learner.load_own_state(state["side_learners"][name])
        d.teacher.load_own_state(state["teacher"])
        if hasattr(train, "load_own_state"):
            train.load_own_state(state["data"])
        return cls(history=[Epoch(**line) for line in state["history"]], **state["position"])


def seed_epoch(seed: int, epoch: int, loader: Iterable[Any]) -> None:
    """Make an epoch reproducible by itself: the global generators, and those that the loader keeps for its order.

    Args:
        seed: of the run.
        epoch: 0 for the first; -1 before training.
        loader: a ``DataLoader``'s own generators are seeded too, and ``set_epoch`` is called where it exists.
    """
    number = (seed * 1_000_003 + epoch + 1) % 2**32
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  (the legacy generator is what users' transforms draw from)
    torch.manual_seed(number)
    sampler = getattr(loader, "sampler", None)
    owners: tuple[Any, ...] = (loader, sampler, getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    for owner in owners:
        # accelerate hides the generator of a loader that it shared out under the second name
        for generator in (getattr(owner, "generator", None), getattr(owner, "synchronized_generator", None)):
            if isinstance(generator, torch.Generator):
                generator.manual_seed(number)
        if epoch >= 0 and hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)


def random_state() -> dict[str, Any]:
    """The state of every global generator, as plain values and tensors."""
    kind, keys, *rest = cast(tuple, np.random.get_state())  # noqa: NPY002
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, keys.tolist(), *rest],
        "python": [version, list(internal), gauss],
    }


def restore_random(state: dict[str, Any]) -> None:
    """Undo what happened to the global generators since :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one of the same kind acts as usual.

    >>> import os
    >>> with stop_signals() as asked:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     asked == [signal.SIGTERM]
    True
    """
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.getsignal(number)
            signal.signal(number, note)
        except ValueError:  # not the main thread: signals are somebody else's
            before.pop(number, None)
    try:
        yield asked
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
