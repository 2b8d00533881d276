"""The task's own loss on the true labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.knowledge.base import Loss, classes_last, labelled
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import UNLABELLED, Batch


def task_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, mean over the positions that have a label; 0 (with a gradient) if none has.

    Args:
        logits: (B, C), (B, T, C) or (B, C, H, W).
        labels: (B), (B, T) or (B, H, W) class numbers, -100 where there is no label; or class probabilities of the
            logits' shape.
        label_smoothing: ε of Szegedy et al. 2016.

    Raises:
        ValueError: shapes that do not fit.

    >>> task_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    rows = classes_last(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits)
    if labels.is_floating_point() and labels.shape == logits.shape:
        return F.cross_entropy(rows, classes_last(labels).to(rows), label_smoothing=label_smoothing)
    if labels.numel() != len(rows):
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    flat = labels.reshape(-1)
    summed = F.cross_entropy(rows, flat, ignore_index=UNLABELLED, reduction="sum", label_smoothing=label_smoothing)
    return summed / labelled(flat).clamp(min=1)


class TaskLoss(Loss):
    """The loss on the true labels, beside which a student is taught; unlabelled samples (-100) do not count.

    Args:
        criterion: ``(logits, labels) -> scalar`` mean over the labelled; cross-entropy by default.
        label_smoothing: for the default criterion.
        weight: 1 by default; Hinton et al. use 0.1 beside 0.9 for KD.
        name: of the term.

    Memory: linear in the logits.

    >>> from tutelage.record import Record
    >>> from tutelage.views import read_batch
    >>> batch = read_batch((torch.zeros(2, 3), torch.tensor([0, 1])))
    >>> TaskLoss()(Record(torch.zeros(2, 4)), None, batch)
    tensor(1.3863)
    """

    needs_teacher = False
    needs_labels = True
    separable = True

    def __init__(
        self,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        label_smoothing: float = 0.0,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(weight=weight, name=name)
        self.criterion = criterion
        self.label_smoothing = label_smoothing

    def forward(self, student: Record, teacher: Record | None, batch: Batch) -> Tensor:
        assert batch.labels is not None, "binding has checked it"
        if self.criterion is not None:
            return self.criterion(student.logits, batch.labels)
        return task_cross_entropy(student.logits, batch.labels, self.label_smoothing)

    def check(self, student: Record, teacher: Record | None, batch: Batch) -> None:
        logits, labels = student.logits, batch.labels
        assert labels is not None, "binding has checked it"
        if self.criterion is None and not labels.is_floating_point() and labels.numel():
            classes, highest = classes_last(logits).shape[1], int(labels.max())
            if highest >= classes:
                raise ValueError(f"labels: class {highest} appears, and the student has {classes} classes")

    def units(self, batch: Batch) -> Tensor | int:
        labels = batch.labels
        return labelled(labels) if labels is not None and not labels.is_floating_point() else len(batch)
