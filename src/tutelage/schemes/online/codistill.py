"""All peers of codistillation in one process, in turn and repeatable."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.algorithms.multi_teacher.averaged_ensemble import AveragedEnsemble
from tutelage.console import say
from tutelage.data.shards import shard
from tutelage.distilling import Result, distill
from tutelage.knowledge.base import Loss
from tutelage.procedures import Leg, Setting, laid_out
from tutelage.run import Epoch
from tutelage.schedule import Stage
from tutelage.schemes.online.codistillation import Codistillation
from tutelage.schemes.online.exchange import Exchange
from tutelage.schemes.online.turns import Turns
from tutelage.teachers import Teacher
from tutelage.training import Training
from tutelage.views import Batch


def _legs(setting: Setting, others: Sequence[nn.Module], shards: Sequence[Any] | None = None) -> list[Leg]:
    """The student's training as it is after an exchange: the others teach, frozen."""
    role = _role(setting.teacher)
    peers = [setting.student, *others]
    if len({id(p) for p in peers}) < len(peers) or len(peers) < 2:
        raise ValueError("others: expected one network or more, each of its own, none of them the student")
    if shards is not None and len(shards) != len(peers):
        raise ValueError(f"shards: expected one for each of {len(peers)} peers, got {len(shards)}")
    losses = role.losses() if setting.losses is None and setting.stages is None else setting.losses
    together = others[0] if len(others) == 1 else AveragedEnsemble(others, average="probabilities")
    return [Leg("student", setting.student, together, losses, setting.stages)]


@laid_out(_legs)
def codistill(
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    others: Sequence[nn.Module],
    shards: Sequence[Iterable[Any]] | None = None,
    losses: Sequence[Loss] | None = None,
    stages: Sequence[Stage] | None = None,
    test: Iterable[Any] | None = None,
    views: Callable[[Any], Batch] | None = None,
    training: Training | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    after_epoch: Callable[[Epoch], None] | None = None,
    **settings: Any,
) -> list[Result]:
    """Train all peers of :class:`tutelage.Codistillation` in one process: for study, and on one machine.

    Each peer is the same training that it is in a process of its own, in lockstep: it runs until it needs the weights
    that another leaves at the same step, and then the next one runs. Their order is fixed and each has random numbers
    of its own, so the results are repeatable, and those of processes that wait for each other (``lockstep=True``).

    Args:
        student: peer 0.
        teacher: a :class:`tutelage.Codistillation`, which says ``every``, ``burn_in`` and ``patience``; the rest is set
            here. ``None``: its defaults.
        train: is divided among the peers (:func:`tutelage.data.shard`). As long as ``training`` says is as long as each
            goes through its own part.
        validation: as in :func:`tutelage.distill`, for every peer.
        others: peers 1, 2, ..., of any architectures, with first weights of their own.
        shards: each peer's batches, the student's first, instead of parts of ``train``.
        losses: of each peer, a copy each; by default cross-entropy and KL.
        stages, test, views: as in :func:`tutelage.distill`.
        training: the settings, or give them one by one. Peer i's seed is theirs + i.
        out: each peer's folder is in it: ``student``, ``peer-1``, ...; and the weights that they exchange.
        resume, overwrite: as in :func:`tutelage.distill`, for every peer.
        after_epoch: called with each epoch's line of the student.

    Returns:
        One result a peer: the others' in their order, and the student's last.

    Raises:
        ValueError: no other peer, a network twice, or what :func:`tutelage.distill` refuses.
        TypeError: a teacher of another kind.

    Memory: of N peers N² networks, as each has a copy of every other.

    Anil, Pereyra, Passos, Ormandi, Dahl, Hinton 2018, https://arxiv.org/abs/1804.03235

    >>> import torch
    >>> data = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(4)]
    >>> role = Codistillation(every=1, burn_in=1)
    >>> results = codistill(nn.Linear(4, 3), role, data, data, others=[nn.Linear(4, 3)], epochs=2, progress=False)
    >>> [result.runs[-1].step for result in results], sorted(results[-1].history[-1]["losses"])
    ([4, 4], ['KD', 'TaskLoss', 'loss'])
    """
    leg = _legs(Setting(student, teacher, losses, stages), others, shards)[0]
    role, peers = _role(teacher), [student, *others]
    count = len(peers)
    parts = shards or [shard(train, i, count) for i in range(count)]
    turns = Turns(count)
    with contextlib.ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(out) / "exchange"
            if overwrite and folder.is_dir():
                for i in range(count):
                    Exchange(folder).forget(i, after=-1)
        times: dict[str, Any] = {"every": role.every, "burn_in": role.burn_in, "patience": role.patience}
        roles = [Codistillation(folder, i, count, **times, lockstep=True, networks=peers) for i in range(count)]

        def peer(i: int) -> Result:
            roles[i].pause = lambda: turns.pass_on(i)
            result = distill(
                peers[i],
                roles[i],
                parts[i],
                validation,
                test=test,
                losses=copy.deepcopy(leg.losses),
                stages=copy.deepcopy(stages),
                views=views,
                out=Path(out) / ("student" if i == 0 else f"peer-{i}") if out else None,
                resume=resume,
                overwrite=overwrite,
                after_epoch=after_epoch if i == 0 else None,
                **_of_peer(i, training, settings),
            )
            roles[i].end()
            return result

        results = turns.run([partial(peer, i) for i in range(count)])
    for i, result in enumerate(results):
        if result.metrics is not None:
            say(f"peer {i}: {result.metrics.title} {result.metrics.value:.4f}")
    return [*results[1:], results[0]]


def _role(teacher: Any) -> Codistillation:
    if teacher is None:
        return Codistillation()
    if not isinstance(teacher, Codistillation):
        raise TypeError(f"teacher: codistill takes a Codistillation or none, got {type(teacher).__name__}")
    return teacher


def _of_peer(i: int, training: Training | None, settings: dict[str, Any]) -> dict[str, Any]:
    """A peer's settings: a seed of its own, and bars for the first alone, as two cannot be drawn at once."""
    if training is not None:
        own = dataclasses.replace(training, seed=training.seed + i, progress=training.progress and i == 0)
        return {"training": own, **settings}
    return {**settings, "seed": settings.get("seed", 0) + i, "progress": settings.get("progress", True) and i == 0}
