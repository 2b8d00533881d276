"""Born-again networks: generations of one architecture, each taught by the one before."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.algorithms.multi_teacher.averaged_ensemble import AveragedEnsemble
from tutelage.catalogue import method
from tutelage.checkpoint import plain_state, write_json, write_weights
from tutelage.console import say
from tutelage.distilling import Result
from tutelage.evaluation import evaluate
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.procedures import Leg, Setting, laid_out, seed_of, train_legs
from tutelage.run import Epoch, Run
from tutelage.schedule import Stage
from tutelage.schemes.self_distillation.fresh import fresh_network
from tutelage.teachers import Teacher
from tutelage.views import Batch


def _legs(
    setting: Setting, generations: int = 3, fresh: Callable[[], nn.Module] | None = None, ensemble: int = 0
) -> list[Leg]:
    if generations < 1 or not 0 <= ensemble <= generations:
        raise ValueError(
            f"generations={generations}, ensemble={ensemble}: expected 1 generation or more, and no more than these in "
            "the ensemble"
        )
    # the last is the student itself; its seeds are far from those of epochs and of the recipe's networks
    networks = [
        fresh_network(setting.student, (setting.seed + 1) * 7_919 + n, fresh) for n in range(1, generations)
    ] + [setting.student]
    losses = setting.losses
    if losses is None and setting.stages is None:
        losses = [KD(temperature=1.0, weight=1.0)]
    legs = []
    above = setting.teacher
    for n, network in enumerate(networks, 1):
        name = "student" if network is setting.student else f"generation-{n}"
        legs.append(Leg(name, network, above) if above is None else Leg(name, network, above, losses, setting.stages))
        above = network
    return legs


@method(
    section="3.3",
    role="procedure",
    paper="Furlanello, Lipton, Tschannen, Itti, Anandkumar: Born-Again Neural Networks",
    year=2018,
    link="https://arxiv.org/abs/1805.04770",
    needs=("extra stages",),
    use="No larger teacher, and time for several trainings: a better network of the same form, or an ensemble of them.",
)
@laid_out(_legs)
def born_again(
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    generations: int = 3,
    fresh: Callable[[], nn.Module] | None = None,
    ensemble: int = 0,
    losses: Sequence[Loss] | None = None,
    stages: Sequence[Stage] | None = None,
    test: Iterable[Any] | None = None,
    views: Callable[[Any], Batch] | None = None,
    out: str | Path | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
    **training: Any,
) -> list[Result]:
    """Train one architecture again and again, each generation taught by the one before.

    Generation k minimises KL(softmax(z_{k−1}) ‖ softmax(z_k)), without labels and at temperature 1, as published; the
    first learns from the teacher or, without one (the paper's own teacher), from the labels. Each starts from fresh
    weights and is a network of its own: the one before teaches frozen, in eval mode, with its best weights on
    validation.

    The paper's variants are losses: ``[TaskLoss(), KD(temperature=1, weight=1)]`` (BAN+L, worse in its tables),
    ``[CWTM()]`` and ``[DKPP()]``. Its gain saturates after a few generations; that of the ensemble is larger.

    Args:
        student: the last generation.
        teacher: teaches the first; of any architecture. ``None``: the first learns from the labels.
        train, validation: as in :func:`tutelage.distill`, read by every generation.
        generations: how many networks are trained, as long as ``training`` says each.
        fresh: makes the networks of the earlier generations. By default they are copies of the student whose parts set
            their weights anew by ``reset_parameters``; see
            :func:`tutelage.schemes.self_distillation.fresh.fresh_network`.
        ensemble: of how many of the last generations the average of probabilities is the last result, an
            :class:`tutelage.AveragedEnsemble`; 0: of none. The paper's leaves out the one that learned from labels.
        losses: of those that have a teacher; each learns from a copy of its own. By default KL alone.
        stages: instead of ``losses``; copied as well.
        test, views: as in :func:`tutelage.distill`.
        out: each generation's folder is in it: ``generation-1``, ..., ``student``; and ``ensemble``.
        after_epoch: called with each epoch's line of the student's own training.
        **training: further arguments of :func:`tutelage.distill`. With ``resume=True`` finished generations are not
            trained again. The fresh weights depend on the seed alone, so an interrupted procedure ends as it would
            have.

    Returns:
        One result a generation, the student's last, and after it the ensemble's, if one is asked for. Each generation's
        accuracy is printed too.

    Raises:
        ValueError: numbers that make no sense, losses that were bound already, or fresh weights that nobody knows to
            make.

    Memory: that of all generations' weights.

    Furlanello, Lipton, Tschannen, Itti, Anandkumar 2018, "Born-Again Neural Networks", https://arxiv.org/abs/1805.04770

    >>> import torch
    >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    >>> results = born_again(nn.Linear(8, 3), None, data, data, generations=2, ensemble=2, epochs=1, progress=False)
    >>> [type(result.student).__name__ for result in results], results[1].teacher is results[0].student
    (['Linear', 'Linear', 'AveragedEnsemble'], True)
    """
    legs = _legs(Setting(student, teacher, losses, stages, seed_of(training)), generations, fresh, ensemble)
    common: dict[str, Any] = {"test": test, "views": views, "out": out}
    results = train_legs(legs, train, validation, after_epoch=after_epoch, **common, **training)
    if ensemble:
        results.append(_averaged(results[-ensemble:], validation, **common))
    for name, result in zip([*(leg.name for leg in legs), "ensemble"], results, strict=False):
        if result.metrics is not None:
            say(f"{name}: {result.metrics.title} {result.metrics.value:.4f}")
    return results


def _averaged(results: Sequence[Result], validation: Any, test: Any, views: Any, out: str | Path | None) -> Result:
    """The result of the averaged generations: nothing is trained, so its history is one validation."""
    last, mean = results[-1], AveragedEnsemble([r.student for r in results], average="probabilities")
    run = Run()
    known = evaluate(mean, validation, views=views) if validation is not None else None
    if known is not None:
        run = Run([Epoch(0, 0, 0.0, 0.0, {}, known.known())], best_epoch=0)
    figures = evaluate(mean, test, views=views) if test is not None else known
    folder = Path(out) / "ensemble" if out else None
    if folder is not None and os.environ.get("RANK", "0") == "0":
        folder.mkdir(exist_ok=True)
        write_weights(folder / "student.safetensors", plain_state(mean))
        write_json(folder / "result.json", {"best": figures.known()} if figures is not None else {})
    return dataclasses.replace(last, student=mean, runs=[run], metrics=figures, last_metrics=figures, out=folder)
