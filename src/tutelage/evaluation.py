"""How good a model is, and how well it agrees with its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tutelage.knowledge.base import classes_last
from tutelage.record import in_float32, logits_of
from tutelage.tasks import Figures, Task, task_of
from tutelage.views import UNLABELLED, Batch, judging, move


@dataclass(frozen=True)
class Metrics(Figures):
    """What an evaluation of a classifier found; fractions are between 0 and 1.

    Args:
        accuracy: top-1.
        top5: top-5, where there are more than five classes.
        macro_f1: mean over classes of the F1 score.
        nll: mean negative log-likelihood of the true label, in nats.
        ece: expected calibration error, 15 bins.
        samples: how many labelled samples (positions, for dense outputs) these are of.
        agreement: how often the student's and the teacher's first choice are the same.
        teacher_kl: mean KL(teacher ‖ student) at temperature 1, in nats.
    """

    main: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "accuracy"
    accuracy: float
    macro_f1: float
    nll: float
    ece: float
    samples: int
    top5: float | None = None
    agreement: float | None = None
    teacher_kl: float | None = None


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Every module in eval mode and no gradients inside; each as it was afterwards.

    >>> model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    >>> with evaluating(model):
    ...     [m.training for m in model]
    [False, False]
    >>> [m.training for m in model]
    [True, False]
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    student: nn.Module,
    loader: Iterable[Any],
    teacher: nn.Module | None = None,
    *,
    views: Any = None,
    device: torch.device | str | None = None,
) -> Figures:
    """Accuracy, macro F1, NLL and calibration of a classifier, and its agreement with a teacher.

    If the loader's data set carries another :class:`tutelage.tasks.Task`, that task's figures instead.

    No mode and no buffer of either model changes. With several processes each computes every n-th batch and all
    return the figures of the whole set.

    Args:
        student: returns logits (B, C), (B, T, C) or (B, C, H, W), alone or as ``output.logits``; or what the
            task reads.
        loader: batches with labels; positions labelled -100 do not count.
        teacher: if given, compared with.
        views: as in training, for models that see different things.
        device: by default the student's.

    Raises:
        ValueError: the loader is empty or has no labels.

    >>> from tutelage.evaluation import evaluate
    >>> evaluate(nn.Identity(), [(torch.eye(3), torch.tensor([0, 1, 1]))], device="cpu").accuracy
    0.6666666865348816
    """
    return evaluate_together({"student": student}, loader, teacher, views=views, device=device)["student"]


def evaluate_together(
    students: Mapping[str, nn.Module],
    loader: Iterable[Any],
    teacher: nn.Module | None = None,
    *,
    views: Any = None,
    device: torch.device | str | None = None,
) -> dict[str, Figures]:
    """Several students in one pass over the data, in which the teacher runs once for all of them.

    Returns:
        :func:`evaluate` of each by its name, and of a teacher, on what it sees, under ``"teacher"``.

    Raises:
        ValueError: as :func:`evaluate`; or a student is called ``"teacher"``.

    >>> data = [(torch.eye(3), torch.tensor([0, 1, 1]))]
    >>> found = evaluate_together({"a": nn.Identity(), "b": nn.Flatten()}, data, nn.Identity(), device="cpu")
    >>> list(found), found["b"].agreement
    (['a', 'b', 'teacher'], 1.0)
    """
    if "teacher" in students:
        raise ValueError("students: 'teacher' is the teacher's own name; expected another")
    models = {**students, **({"teacher": teacher} if teacher is not None else {})}
    first = next(iter(models.values()))
    device = device or next(first.parameters()).device
    views = judging(views)
    world, rank = _world()
    if getattr(loader, "world_size", 1) > 1:
        world, rank = 1, 0  # the loader itself gives each process its share
    if (task := task_of(loader)) is not None:
        with evaluating(*models.values()):
            batches = (move(raw, device) for number, raw in enumerate(loader) if number % world == rank)
            return _judged(task, models, teacher, map(views, batches))
    collections: dict[str, dict[str, Any]] = {}
    samples = torch.zeros((), dtype=torch.long, device=device)
    seen = 0
    with evaluating(*models.values()):
        for number, raw in enumerate(loader):
            seen += 1
            mine = number % world == rank
            if not mine and collections:
                continue
            batch = views(move(raw, device))
            if batch.labels is None:
                raise ValueError("evaluation needs labels, and the batches have none")
            labels = batch.labels.reshape(-1)
            # every process must know the number of classes, but only one counts the first batch
            kept = (labels != UNLABELLED) & mine
            labels = labels[kept]
            samples += len(labels)
            theirs = _rows(batch.teacher.call(teacher))[kept] if teacher is not None else None
            for name, model in models.items():
                logits = theirs if model is teacher else _rows(batch.student.call(model))[kept]
                assert logits is not None
                if name not in collections:
                    collections[name] = _collection(
                        logits.shape[1], model is not teacher and theirs is not None, device
                    )
                if len(labels):
                    _update(collections[name], logits, labels, theirs if model is not teacher else None)
    if not seen:
        raise ValueError("evaluation: the loader is empty")
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(samples)
    if not collections or not int(samples):
        raise ValueError("evaluation: no sample has a label (all are -100)")
    return {
        name: Metrics(samples=int(samples), **{n: float(metric.compute()) for n, metric in collection.items()})
        for name, collection in collections.items()
    }


def _judged(
    task: Task, models: Mapping[str, nn.Module], teacher: nn.Module | None, batches: Iterable[Batch]
) -> dict[str, Figures]:
    looks: dict[str, list[Any]] = {name: [] for name in models}
    for batch in batches:
        if batch.labels is None:
            raise ValueError("evaluation needs labels, and the batches have none")
        for name, model in models.items():
            seen = batch.teacher if model is teacher else batch.student
            looks[name].append(task.look(seen.call(model), batch))
    if dist.is_available() and dist.is_initialized():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, looks)
        looks = {name: [look for part in parts for look in part[name]] for name in models}
    if not any(looks.values()):
        raise ValueError("evaluation: the loader is empty")
    theirs = looks.get("teacher")
    return {name: task.figures(seen, theirs if name != "teacher" else None) for name, seen in looks.items()}


def _update(
    collection: dict[str, Any], logits: torch.Tensor, labels: torch.Tensor, theirs: torch.Tensor | None
) -> None:
    probabilities = logits.softmax(1)
    for name in ("accuracy", "top5", "macro_f1", "ece"):
        if name in collection:
            collection[name].update(probabilities, labels)
    collection["nll"].update(F.cross_entropy(logits, labels, reduction="none"))
    if theirs is not None:
        log_p, log_q = theirs.log_softmax(1), logits.log_softmax(1)
        collection["agreement"].update((theirs.argmax(1) == logits.argmax(1)).float())
        collection["teacher_kl"].update((log_p.exp() * (log_p - log_q)).sum(1))


def _rows(output: Any) -> torch.Tensor:
    logits = logits_of(output)
    if logits is None:
        raise ValueError(f"evaluation: no logits in an output of type {type(output).__name__}")
    return classes_last(in_float32(logits))


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def _collection(classes: int, with_teacher: bool, device: Any) -> dict:
    import torchmetrics
    from torchmetrics import classification as tm

    found = {
        "accuracy": tm.MulticlassAccuracy(classes, average="micro"),
        "macro_f1": tm.MulticlassF1Score(classes, average="macro"),
        "ece": tm.MulticlassCalibrationError(classes, n_bins=15),
        "nll": torchmetrics.MeanMetric(),
    }
    if classes > 5:
        found["top5"] = tm.MulticlassAccuracy(classes, average="micro", top_k=5)
    if with_teacher:
        found |= {"agreement": torchmetrics.MeanMetric(), "teacher_kl": torchmetrics.MeanMetric()}
    return {name: metric.to(device) for name, metric in found.items()}
