"""The capacity gap between a teacher and a student, measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tutelage.architecture.probes import Seen, linear_probe, look, places, ridge_r2
from tutelage.architecture.remedies import Gap, Probe, Reached, Size, recommend
from tutelage.distillation import Distillation
from tutelage.distilling import distill
from tutelage.evaluation import Metrics, evaluate, evaluate_together
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.run import random_state, restore_random
from tutelage.tasks import task_of
from tutelage.training import Training
from tutelage.views import UNLABELLED, Batch, Inputs, SameView, move


def capacity_gap(
    student: nn.Module,
    teacher: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    *,
    temperatures: Sequence[float] = (1.0, 4.0),
    samples: int = 2000,
    views: Callable[[Any], Batch] | None = None,
    training: Training | None = None,
    **settings: Any,
) -> Gap:
    """Measure how much of a teacher a student can take over, by short trainings and probes of copies.

    One copy of the student learns from the labels alone and one for each temperature from the teacher's answers alone
    (``KD``), all from the same initial weights with the same budget and the same order of data. Their last weights are
    judged on the held-out data; nothing is chosen by these but the temperature that is called best.
    Linear probes then read each stage of the teacher and of the best taught copy, fitted on training data as the loader
    gives them. See :mod:`tutelage.architecture.probes` for the formulas.

    A short training shows what is reachable in a short training. Give it the budget that you can spare, and compare
    pairs with the same.

    Both networks, their modes and all random numbers, those of the loaders' generators too, are as before.

    Args:
        student: with the initial weights of a distillation.
        teacher: trained.
        train: labelled batches.
        validation: held-out labelled batches; not the test data, as what is decided by the answer is chosen by them.
        temperatures: at which the teacher's answers are learned.
        samples: of each loader, for the probes.
        views: what student and teacher see.
        training: of every copy; by default 5 epochs of AdamW at 0.005 with one cycle. Or single settings by name.
        **settings: fields of :class:`tutelage.Training`.

    Raises:
        ValueError: no temperature, an empty loader, other outputs than (B, C) logits, or different classes.

    Memory: a copy of both networks, and the features of ``samples``.

    >>> data = [(torch.randn(32, 8), torch.arange(32) % 3)]
    >>> gap = capacity_gap(nn.Linear(8, 3), nn.Linear(8, 3), data, data, temperatures=[2.0], epochs=1)
    >>> gap.samples, [reached.name for reached in gap.taught], [probe.network for probe in gap.probes]
    (32, ['answers alone, T=2'], ['teacher', 'student'])
    """
    from tutelage.deploy.footprint import macs

    if not temperatures or min(temperatures) <= 0:
        raise ValueError(f"temperatures={list(temperatures)}: expected one positive number or more")
    if training is not None and settings:
        raise ValueError(f"training and {', '.join(settings)}: give the settings in one place")
    if samples < 2:
        raise ValueError(f"samples={samples}: expected 2 or more")
    if task_of(train) is not None:
        raise ValueError("capacity_gap measures classifiers; these data have another task")
    usual = {"epochs": 5, "optimizer": "adamw", "lr": 0.005, "weight_decay": 0.05, "scheduler": "onecycle"}
    if "steps" in settings:
        usual.pop("epochs")
    training = training or Training.of(**{**usual, "progress": False, "gradient_shares": False, **settings})
    network = copy.deepcopy(teacher)

    def trained(name: str, temperature: float | None = None) -> tuple[Reached, nn.Module]:
        losses = [TaskLoss()] if temperature is None else [KD(temperature=temperature, weight=1.0)]
        taught_by = None if temperature is None else network
        learner = copy.deepcopy(student)
        distill(learner, taught_by, train, training=training, losses=losses, views=views)
        network.to(next(learner.parameters()).device)
        found = cast(Metrics, evaluate(learner, validation, network, views=views))
        return Reached(name, found.accuracy, found.agreement, found.teacher_kl, temperature), learner

    with _random_kept(train, validation):
        pair = Distillation(copy.deepcopy(student), network.to(next(student.parameters()).device), [KD()], views)
        pair.bind(
            move(next(iter(train)), pair.device)
        )  # a pair that cannot be compared is refused before it is trained
        alone, _ = trained("labels alone")
        taught = [trained(f"answers alone, T={t:g}", t) for t in temperatures]
        learner = max(taught, key=lambda pair: pair[0].agreement or 0.0)[1]
        own = cast(Metrics, evaluate_together({"student": learner}, validation, network, views=views)["teacher"])
        batch = (views or SameView())(move(next(iter(validation)), next(learner.parameters()).device))
        mine, theirs = places(learner, batch.student), places(network, batch.teacher)
        fitted, judged = (
            look((learner, mine), (network, theirs), loader, samples, views) for loader in (train, validation)
        )
        sizes = [
            Size(sum(p.numel() for p in model.parameters()), macs(model, _first(inputs)))
            for model, inputs in ((network, batch.teacher), (learner, batch.student))
        ]
    labels, said = judged[2][judged[2] != UNLABELLED], [seen.logits.argmax(1) for seen in fitted[:2]]
    embeddings = [
        seen.features[addresses[-1]]
        for part in (fitted, judged)
        for seen, addresses in ((part[0], mine), (part[1], theirs))
    ]
    gap = Gap(
        samples=own.samples,
        teacher=Reached("teacher", own.accuracy),
        alone=alone,
        taught=[reached for reached, _ in taught],
        fit=float((said[0] == said[1]).double().mean()),
        confidence=float(fitted[1].logits.softmax(1).amax(1).mean()),
        majority=float(labels.bincount().max() / len(labels)),
        probes=[*_probes("teacher", 1, theirs, fitted, judged), *_probes("student", 0, mine, fitted, judged)],
        embedding_r2=ridge_r2(*embeddings),
        teacher_size=sizes[0],
        student_size=sizes[1],
    )
    return recommend(gap)


def _probes(
    network: str, side: int, addresses: list[str], fitted: tuple[Seen, Seen, Tensor], judged: tuple[Seen, Seen, Tensor]
) -> list[Probe]:
    """A network's probes, for the labels and for the teacher's first choice."""
    classes = judged[1].logits.shape[1]
    found = []
    for address in addresses:
        x, unseen = (cast(Seen, part[side]).features[address] for part in (fitted, judged))
        shares = []
        for y, truth in ((fitted[2], judged[2]), (fitted[1].logits.argmax(1), judged[1].logits.argmax(1))):
            known, judging = y != UNLABELLED, truth != UNLABELLED
            shares.append(linear_probe(x[known], y[known], unseen[judging], truth[judging], classes=classes))
        found.append(Probe(network, address, x.shape[1], *shares))
    return found


def _first(inputs: Inputs) -> Any:
    """One sample, as the model is called with it."""

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) else value

    return tuple(map(first, inputs.args)) or {k: first(v) for k, v in inputs.kwargs.items()}


@contextmanager
def _random_kept(*loaders: Any) -> Iterator[None]:
    """Leave the global random numbers, and those that loaders draw their order from, as they were."""
    before = random_state()
    owners = [o for loader in loaders for o in (loader, getattr(loader, "sampler", None))]
    own = {id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)}
    states = [(generator, generator.get_state()) for generator in own.values()]
    try:
        yield
    finally:
        restore_random(before)
        for generator, state in states:
            generator.set_state(state)
