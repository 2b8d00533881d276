"""How long and how a training runs: its settings, the optimisers and learning rates that have names."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tutelage.errors import nearest

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
HIGHER_IS_BETTER = ("accuracy", "top5", "macro_f1", "agreement", "ap50", "pck")


@dataclass
class Training:
    """The settings of one training.

    Args:
        epochs: passes over the data; give this or ``steps``.
        steps: optimiser steps, for data without an end.
        optimizer: ``"sgd"`` (Nesterov), ``"adamw"`` or a function of the parameters that makes one. Projectors and
            critics' students exist only after binding, so a ready optimiser cannot be taken.
        lr: learning rate of a named optimiser.
        weight_decay: of a named optimiser.
        momentum: of SGD.
        scheduler: ``"cosine"`` to 0, ``"step"`` (÷10 at 62.5 %, 75 % and 87.5 %), ``"onecycle"``, ``"constant"``, or a
            function of the optimiser that makes one; it is stepped after every optimiser step.
        cycles: of ``"cosine"``: it falls to 0 and begins anew so often, in equal parts of the training.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"`` autocast; losses calculate in float32 all the same.
        accumulate: batches in one optimiser step; every term is normalised over all of them.
        clip: the largest norm of the gradient.
        seed: of everything random. Each epoch is seeded from it afresh.
        monitor: the validation figure that chooses the best weights: one of :class:`tutelage.Metrics`; ``"ap50"`` of
            detectors; ``"pck"`` or ``"error"`` of key points.
        patience: stop after so many validations in a row without a better ``monitor``.
        checkpoint_every: optimiser steps between checkpoints inside an epoch; one is always written at its end.
        evaluate_every: epochs between validations; the last epoch is always validated.
        keep_every: epochs between two copies of the student's weights that stay (``Run.kept``), in the run's folder if
            there is one: the route of its training.
        log_every: steps between two looks at the losses (each look waits for the device).
        trackers: of accelerate, such as ``["tensorboard"]``; logs go to the run's folder.
        channels_last: put both networks in that memory format, which is faster for convolutions.
        cpu: stay on the processor.
        timeout: seconds that one of several processes waits for the others before it ends with an error; by default
            what torch takes (30 minutes on processors, 10 on GPUs). It must be enough to write a checkpoint. On
            processors one that dies is noticed at once; this is for one that hangs.
        progress: show bars and lines.
        gradient_shares: at the beginning of each epoch, note each term's share of the gradient on a batch, if there is
            more than one term (:func:`tutelage.gradients.gradient_shares`).

    Raises:
        ValueError: a field that is out of range or an unknown name; the message says which.

    >>> Training(epochs=3, optimizer="adamw").lr
    0.05
    >>> Training(epochs=3, optimizer="adam")
    Traceback (most recent call last):
    ...
    ValueError: optimizer='adam': expected one of sgd, adamw or a function; nearest: 'adamw'
    """

    epochs: int | None = None
    steps: int | None = None
    optimizer: str | MakeOptimizer = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    momentum: float = 0.9
    scheduler: str | MakeScheduler = "cosine"
    cycles: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: int = 1
    clip: float | None = None
    seed: int = 0
    monitor: str = "accuracy"
    patience: int | None = None
    checkpoint_every: int | None = None
    evaluate_every: int = 1
    keep_every: int | None = None
    log_every: int = 10
    trackers: list[str] | None = None
    channels_last: bool = False
    cpu: bool = False
    timeout: float | None = None
    progress: bool = True
    gradient_shares: bool = True

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs={self.epochs}, steps={self.steps}: give one of them")
        whole = ("epochs", "steps", "accumulate", "patience", "checkpoint_every", "evaluate_every", "keep_every")
        for name in (*whole, "cycles", "log_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more")
        for name, number in (("lr", self.lr), ("clip", self.clip), ("timeout", self.timeout)):
            if number is not None and not number > 0:
                raise ValueError(f"{name}={number}: expected a positive number")
        _known("optimizer", self.optimizer, ("sgd", "adamw"))
        _known("scheduler", self.scheduler, ("cosine", "step", "onecycle", "constant"))
        if self.cycles > 1 and self.scheduler != "cosine":
            raise ValueError(f"cycles={self.cycles}: only scheduler='cosine' has cycles, and it is {self.scheduler!r}")
        _known("precision", self.precision, ("no", "bf16", "fp16"))
        _known("monitor", self.monitor, (*HIGHER_IS_BETTER, "nll", "ece", "teacher_kl", "error"))

    @classmethod
    def of(cls, **settings: Any) -> Training:
        """Settings by name, with the nearest right name for a wrong one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise TypeError(f"no training setting is called {name!r}{nearest(name, names)}")
        return cls(**settings)

    def better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` of the monitored figure beats the best so far."""
        if best is None or best != best:  # anything is better than NaN
            return True
        return value > best if self.monitor in HIGHER_IS_BETTER else value < best

    def total_steps(self, batches: int | None) -> int:
        """Optimiser steps of the whole training, for an epoch of so many ``batches`` (``None``: not known)."""
        if self.epochs is None:
            return self.steps or 0
        if batches is None:
            raise ValueError("train has no length: give steps instead of epochs")
        return self.epochs * math.ceil(batches / self.accumulate)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        parameters = list(parameters)
        if callable(self.optimizer):
            return self.optimizer(parameters)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )

    def make_scheduler(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        schedulers = torch.optim.lr_scheduler
        if callable(self.scheduler):
            return self.scheduler(optimizer)
        if self.cycles > 1:
            return schedulers.LambdaLR(optimizer, functools.partial(_in_cycles, steps=steps, cycles=self.cycles))
        if self.scheduler == "cosine":
            return schedulers.CosineAnnealingLR(optimizer, T_max=steps)
        if self.scheduler == "step":
            milestones = [round(steps * part) for part in (0.625, 0.75, 0.875)]
            return schedulers.MultiStepLR(optimizer, milestones=milestones, gamma=0.1)
        if self.scheduler == "onecycle":
            # one step more than is made, or the last one would ask for a learning rate beyond the cycle
            return schedulers.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps + 1)
        return schedulers.LambdaLR(optimizer, _unchanged)

    def description(self) -> dict[str, Any]:
        """The settings as plain values, to write into the run's folder."""
        return {k: v if isinstance(v, int | float | str | list | None) else _name(v) for k, v in vars(self).items()}


def _in_cycles(step: int, steps: int, cycles: int) -> float:
    """The part of the learning rate in a cosine that begins anew ``cycles`` times.

    >>> [round(_in_cycles(step, steps=8, cycles=2), 3) for step in range(8)]
    [1.0, 0.854, 0.5, 0.146, 1.0, 0.854, 0.5, 0.146]
    """
    return (1 + math.cos(math.pi * (step * cycles % steps) / steps)) / 2


def _unchanged(step: int) -> float:
    return 1.0


def _name(function: Any) -> str:
    if isinstance(function, functools.partial):
        return f"{_name(function.func)}({', '.join(f'{k}={v}' for k, v in function.keywords.items())})"
    return getattr(function, "__qualname__", type(function).__name__)


def _known(field: str, value: Any, names: tuple[str, ...]) -> None:
    if isinstance(value, str) and value not in names:
        functions = " or a function" if field in ("optimizer", "scheduler") else ""
        raise ValueError(f"{field}={value!r}: expected one of {', '.join(names)}{functions}{nearest(value, names, 1)}")
