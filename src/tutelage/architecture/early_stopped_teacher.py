"""Early-stopped teachers: of a teacher's own checkpoints, the one from which the student learns best."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.checkpoint import write_json
from tutelage.console import say
from tutelage.distilling import Result, distill
from tutelage.knowledge.base import Loss
from tutelage.models.loading import load_weights
from tutelage.procedures import Leg, Setting, laid_out
from tutelage.run import Epoch, Run
from tutelage.schedule import Stage
from tutelage.teachers import Frozen, Teacher
from tutelage.training import Training
from tutelage.views import Batch

Weights = str | Path | dict[str, Tensor]
"""A file (safetensors, or a state dict of ``torch.save``) or a state dict."""


def _legs(
    setting: Setting,
    checkpoints: Mapping[int, Weights] | Run | None = None,
    teacher_training: Training | None = None,
    trial_epochs: int = 2,
) -> list[Leg]:
    network = setting.teacher.module if isinstance(setting.teacher, Frozen) else setting.teacher
    if not isinstance(network, nn.Module):
        what = type(setting.teacher).__name__
        raise ValueError(f"teacher: expected a network, whose weights can be replaced, got {what}")
    if (checkpoints is None) == (teacher_training is None):
        raise ValueError("checkpoints and teacher_training: give one of them")
    if trial_epochs < 1:
        raise ValueError(f"trial_epochs={trial_epochs}: expected 1 or more")
    return [Leg("student", setting.student, network, setting.losses, setting.stages)]


@method(
    section="4",
    role="procedure",
    paper="Cho, Hariharan: On the Efficacy of Knowledge Distillation",
    year=2019,
    link="https://arxiv.org/abs/1910.01348",
    needs=("extra stages",),
    use="A teacher that is too good for its student, of which checkpoints of its training are kept or can be.",
)
@laid_out(_legs)
def early_stopped_teacher(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    checkpoints: Mapping[int, Weights] | Run | None = None,
    teacher_training: Training | None = None,
    trial_epochs: int = 2,
    test: Iterable[Any] | None = None,
    losses: Sequence[Loss] | None = None,
    stages: Sequence[Stage] | None = None,
    views: Callable[[Any], Batch] | None = None,
    training: Training | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    after_epoch: Callable[[Epoch], None] | None = None,
    **settings: Any,
) -> list[Result]:
    """Distil from the checkpoint of the teacher that teaches best, which is often not its last.

    A copy of the student learns from each checkpoint for ``trial_epochs``; the checkpoint whose pupil is best on the
    validation data (by ``training.monitor``; of equals the earliest) teaches the student for the whole training. The
    teacher's own accuracy is not looked at.

    The paper stops the teacher's training early, compares teachers that were trained for several numbers of epochs, and
    distils completely from each. Here the numbers are those of one training's checkpoints, and the choice is by short
    trials, which is this library's and costs a fraction: a pupil of few epochs says less than one of many, and rather
    prefers earlier checkpoints. A checkpoint in the middle of a falling learning rate is noisier than the end of
    a shorter training. The paper's other half, to stop the *distillation* early, is
    ``KD(weight=tutelage.StopAt(0.9, at=0.5))``; it can stand beside this one.

    Args:
        student: learns from the chosen checkpoint. Every trial begins with its initial weights.
        teacher: the network whose checkpoints they are. It ends with its own final weights.
        train, validation: as in :func:`tutelage.distill`; the validation data choose, and are needed.
        checkpoints: its weights by the number of epochs, or the run that kept them (``Training.keep_every``).
            The weights that the teacher has are a candidate too, under the epochs of the run or as the last one.
        teacher_training: instead of ``checkpoints``: train the teacher on the labels first, with these settings; it
            keeps its weights every ``keep_every`` epochs, by default a quarter of them. Its seed is the student's.
        trial_epochs: epochs of each trial. In trials the losses' schedules pass as they would in the whole training.
        test: looked at once, by the last distillation alone.
        losses: not bound yet; each training learns from a copy of its own.
        stages: instead of ``losses``, for the last distillation; trials then learn by the last stage's losses.
        views: what student and teacher see.
        training: the settings of the student, or give them one by one as further arguments.
        out: with the folders ``teacher`` (if it was trained), ``trial-0002`` and so on, ``student``, and
            ``choice.json``.
        resume, overwrite: as in :func:`tutelage.distill`; finished parts are not trained again.
        after_epoch: called with each epoch's line of the last distillation.
        **settings: fields of :class:`tutelage.Training`.

    Returns:
        The teacher's result if it was trained, one result a trial, and the student's, whose ``teacher`` is the chosen
        network.

    Raises:
        ValueError: no validation data, no checkpoints at all, weights that do not fit, bound losses, or a teacher that
            is no single network.

    Memory: a copy of the teacher and of the student at a time, and the checkpoints that are state dicts.

    Cho, Hariharan 2019, "On the Efficacy of Knowledge Distillation", https://arxiv.org/abs/1910.01348

    >>> import torch
    >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    >>> teacher, student = nn.Linear(8, 3), nn.Linear(8, 3)
    >>> quiet = Training(epochs=2, progress=False)
    >>> results = early_stopped_teacher(student, teacher, data, data, teacher_training=quiet, trial_epochs=1,
    ...                                 training=quiet)
    >>> [result.teacher is None for result in results][:2]  # the teacher's training, then the first trial
    [True, False]
    """
    leg = _legs(Setting(student, teacher, losses, stages), checkpoints, teacher_training, trial_epochs)[-1]
    network = cast(nn.Module, leg.teacher)
    if validation is None:
        raise ValueError("validation: early_stopped_teacher chooses by it and needs it")
    if training is not None and settings:
        raise ValueError(f"training and {', '.join(settings)}: give the settings in one place")
    training = training or Training.of(**settings)
    last = losses if stages is None else stages[-1].losses
    where = Path(out) if out else None
    shared: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
    results: list[Result] = []
    if teacher_training is not None:
        every = teacher_training.keep_every or math.ceil((teacher_training.epochs or 1) / 4)
        taught = dataclasses.replace(teacher_training, keep_every=every, seed=training.seed)
        own = where / "teacher" if where else None
        results.append(distill(network, None, train, validation, training=taught, out=own, **shared))
        checkpoints = results[-1].runs[-1]
    candidates = _candidates(network, checkpoints)
    shared["views"] = views
    found: dict[int, float] = {}
    brief = dataclasses.replace(training, epochs=trial_epochs, steps=None)
    for epoch, weights in candidates.items():
        result = distill(
            copy.deepcopy(student),
            _with(network, epoch, weights),
            train,
            validation,
            losses=copy.deepcopy(last),
            training=brief,
            out=where / f"trial-{epoch:04d}" if where else None,
            **shared,
        )
        value = result.runs[-1].best_value
        assert value is not None, "there are validation data"
        found[epoch] = value
        results.append(result)
    chosen = next(iter(found))
    for epoch, value in found.items():
        if training.better(value, found[chosen]):
            chosen = epoch
    values = ", ".join(f"{epoch}: {value:.4f}" for epoch, value in found.items())
    say(f"early_stopped_teacher: epoch {chosen} teaches best (validation {training.monitor} of the trials {values})")
    if where:
        trials = {str(epoch): value for epoch, value in found.items()}
        write_json(where / "choice.json", {"epoch": chosen, "monitor": training.monitor, "trials": trials})
    results.append(
        distill(
            student,
            _with(network, chosen, candidates[chosen]),
            train,
            validation,
            test=test,
            losses=copy.deepcopy(losses),
            stages=copy.deepcopy(stages),
            training=training,
            out=where / "student" if where else None,
            after_epoch=after_epoch,
            **shared,
        )
    )
    return results


def _candidates(network: nn.Module, checkpoints: Mapping[int, Weights] | Run | None) -> dict[int, Weights]:
    """Weights by epoch, first to last; the network's own are the last ones."""
    if isinstance(checkpoints, Run):
        if not checkpoints.kept and checkpoints.epoch > 1:
            raise ValueError("checkpoints: the teacher's training kept no weights; give it a small keep_every")
        # after its best epoch a training's weights are no earlier stop but a later one, and its own are the best's
        end = checkpoints.epoch if checkpoints.best_epoch is None else checkpoints.best_epoch + 1
        kept: Mapping[int, Weights] = {e: w for e, w in checkpoints.kept.items() if e < end}
    else:
        kept = checkpoints or {}
        if not kept:
            raise ValueError("checkpoints: expected weights by the number of epochs before them, got none")
        end = max(kept) + 1
    return {**dict(sorted(kept.items())), end: network.state_dict()}


def _with(network: nn.Module, epoch: int, weights: Weights) -> nn.Module:
    """A copy of the network with these weights."""
    found = copy.deepcopy(network)
    if isinstance(weights, str | Path):
        load_weights(found, weights)
        return found
    try:
        found.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoints[{epoch}]: not the weights of this network: {error}") from error
    return found
