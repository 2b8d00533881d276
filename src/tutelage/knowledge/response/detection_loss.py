"""A detector's own loss on the true classes and boxes, beside which a student is taught."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tutelage.errors import nearest
from tutelage.knowledge.base import Loss, Tap, classes_last, labelled
from tutelage.knowledge.response.rows import check_target
from tutelage.knowledge.response.task import task_cross_entropy
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import UNLABELLED, Batch


def detection_loss(
    logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, background: int = 0, box_weight: float = 1.0
) -> Tensor:
    """(Σ cross-entropy + λ · Σ over the regions with an object of smooth L1 of the four sides) / (labelled regions).

    Args:
        logits: class logits of the regions, (N, C), (B, A, C) or (B, C, H, W).
        boxes: regressed boxes, (N, 4), (B, A, 4) or (B, 4, H, W).
        labels: the regions' classes, (N), (B, A) or (B, H, W); ``background`` where there is no object, -100 where the
            region does not count. If none counts, the value is 0, with a gradient of 0.
        target_boxes: the true boxes, of the shape of ``boxes``; read at the regions with an object.
        background: its class number.
        box_weight: λ.

    Returns:
        A scalar ≥ 0.

    Raises:
        ValueError: the shapes do not fit.

    Girshick 2015, "Fast R-CNN", https://arxiv.org/abs/1504.08083 (smooth L1 with its corner at 1).

    >>> import torch
    >>> logits, boxes = torch.zeros(2, 4), torch.zeros(2, 4)
    >>> detection_loss(logits, boxes, torch.tensor([0, 1]), torch.full((2, 4), 2.0))  # log 4 + 4 · 1.5 / 2
    tensor(4.3863)
    """
    if target_boxes.shape != boxes.shape:
        raise ValueError(f"boxes differ in shape: predicted {tuple(boxes.shape)}, target {tuple(target_boxes.shape)}")
    if labels.numel() != boxes.numel() // 4:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit boxes of shape {tuple(boxes.shape)}")
    counted = labels != UNLABELLED
    objects = (counted & (labels != background)).reshape(-1)
    mine, truth = classes_last(in_float32(boxes))[objects], classes_last(in_float32(target_boxes))[objects]
    sides = F.smooth_l1_loss(mine, truth.to(mine), reduction="sum") / labelled(labels).clamp(min=1)
    return task_cross_entropy(logits, labels) + box_weight * sides


class DetectionLoss(Loss):
    """The task's own loss of a detector: cross-entropy of the classes and smooth L1 of the boxes.

    Beside :class:`DetectionResponse`, whose batches it reads, it is the loss on the truth; it needs no teacher.

    Args:
        taps: two, the class logits and the boxes; ``"@logits"`` and ``"@boxes"`` by default.
        box_weight: λ of the boxes.
        background: its class number.
        targets: the batch's field that holds the true boxes.
        weight: 1 by default; μ of Chen et al. 2017 beside their soft classes.
        name: of the term.

    Memory: linear in the outputs. See :func:`detection_loss` for the formula.

    >>> DetectionLoss()
    DetectionLoss(@logits, @boxes, weight=1.0, box_weight=1.0)
    """

    needs_teacher = False
    needs_labels = True

    def __init__(
        self,
        *taps: Tap,
        box_weight: float = 1.0,
        background: int = 0,
        targets: str = "boxes",
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*(taps or ("@logits", "@boxes")), weight=weight, name=name)
        for field, value in (("box_weight", box_weight), ("background", background)):
            if not value >= 0:
                raise ValueError(f"{self.name}: {field}={value}: expected a number >= 0")
        self.box_weight, self.background, self.targets = box_weight, background, targets

    def at(self, *taps: Tap) -> Loss:
        if len(taps) != 2:
            raise ValueError(f"{type(self).__name__}: {len(taps)} taps: expected two, the class logits and the boxes")
        return super().at(*taps)

    def check(self, student: Record, teacher: Record | None, batch: Batch) -> None:
        logits, boxes = self._said(student)
        check_target(self.name, logits, batch.labels)
        truth = self._truth(batch)
        if len(classes_last(boxes)) != len(classes_last(logits)) or truth.shape != boxes.shape:
            raise ValueError(
                f"{self.name}: class logits {tuple(logits.shape)}, boxes {tuple(boxes.shape)} and the batch's "
                f"{self.targets!r} {tuple(truth.shape)}: expected the same regions, and boxes of one shape"
            )

    def forward(self, student: Record, teacher: Record | None, batch: Batch) -> Tensor:
        assert batch.labels is not None, "binding has checked it"
        logits, boxes = self._said(student)
        return detection_loss(logits, boxes, batch.labels, self._truth(batch), self.background, self.box_weight)

    def units(self, batch: Batch) -> Tensor | int:
        assert batch.labels is not None, "binding has checked it"
        return labelled(batch.labels)

    def _said(self, student: Record) -> tuple[Tensor, Tensor]:
        if len(self.pairs) != 2:
            raise ValueError(f"{self.name}: its taps name {len(self.pairs)} tensors: expected class logits and boxes")
        (logits, _), (boxes, _) = self.pairs
        return student[logits], student[boxes]

    def _truth(self, batch: Batch) -> Tensor:
        fields = batch.student.kwargs
        if self.targets not in fields:
            raise ValueError(
                f"{self.name}: the batch has no field {self.targets!r} with the true boxes"
                f"{nearest(self.targets, fields)}"
            )
        return fields[self.targets]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, box_weight={self.box_weight}"
