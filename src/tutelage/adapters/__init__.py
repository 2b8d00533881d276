"""A distillation inside somebody else's training loop: Hugging Face's Trainer, Lightning.

Import :mod:`tutelage.adapters.transformers` or :mod:`tutelage.adapters.lightning`; here is what both share.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.distillation import Distillation
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.views import Batch


def first_batch(loader: Iterable) -> Any:
    """The first batch of a loader, to bind with; every random number generator is as before.

    Raises:
        ValueError: the loader is empty.

    >>> from torch.utils.data import DataLoader
    >>> loader = DataLoader(range(100), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    >>> torch.equal(first_batch(loader), next(iter(loader)))
    True
    """
    # accelerate's loaders count themselves as running until they are exhausted: take the one they hold
    loader = getattr(loader, "base_dataloader", loader)
    with _same_random_numbers(loader):
        for batch in loader:
            return batch
    raise ValueError("the training loader is empty: there is no first batch to bind the distillation with")


@contextmanager
def _same_random_numbers(loader: Iterable) -> Iterator[None]:
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
    held = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
    generators = [g for g in held if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (augmentations draw from it)
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda):
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def population(data: Any) -> int | None:
    """The number of samples of a data set, if it knows it.

    >>> population([1, 2, 3]), population(iter([1]))
    (3, None)
    """
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def task_value(distillation: Distillation, output: Any, batch: Batch) -> Tensor | None:
    """The task's loss on the student's output alone: by the distillation's ``TaskLoss``, else cross-entropy.

    Returns:
        A scalar, or ``None`` without labels (or, where no ``TaskLoss`` says how to compare them, without classes).
    """
    if batch.labels is None:
        return None
    task = next((loss for loss in distillation.losses.values() if isinstance(loss, TaskLoss)), None)
    if task is None and batch.labels.is_floating_point():
        return None
    with torch.autocast(distillation.device.type, enabled=False):
        return (task or TaskLoss())(Record(output), None, batch)


def beside_state(distillation: Distillation) -> dict[str, Any]:
    """What a checkpoint needs beside the distillation's ``state_dict()``: side learners, and teachers that change."""
    beside = {name: learner.own_state() for name, learner in distillation.side_learners().items()}
    return {"teacher": distillation.teacher.own_state(), "beside": beside}


def load_beside_state(distillation: Distillation, state: dict[str, Any]) -> None:
    """Take back what :func:`beside_state` gave."""
    if state["teacher"]:
        distillation.teacher.load_own_state(state["teacher"])
    for name, learner in distillation.side_learners().items():
        learner.load_own_state(state["beside"][name])
