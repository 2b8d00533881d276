"""What response losses share: logits as rows that count, true classes beside them, and rows as z-scores."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.knowledge.base import Loss, ResponseLoss, class_axis, classes_last, labelled
from tutelage.knowledge.rows import unit_rows
from tutelage.record import Record, in_float32
from tutelage.views import UNLABELLED, Batch


def positive(name: str, value: float) -> None:
    """Refuse what is not above 0 with a ``ValueError`` that names the field.

    >>> positive("temperature", 0.0)
    Traceback (most recent call last):
    ...
    ValueError: temperature=0.0: expected a positive number
    """
    if not value > 0:
        raise ValueError(f"{name}={value}: expected a positive number")


def compared_rows(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both logits as rows (N, C), half precision in float32, the teacher's without gradient.

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W).
        teacher: logits of the same shape.
        mask: booleans of the logits' shape without classes; rows that are False are left out.

    Raises:
        ValueError: the shapes differ, or the mask's does not fit.

    >>> s, t = compared_rows(torch.ones(2, 3, 5), torch.ones(2, 3, 5), torch.tensor([[1, 1, 0], [1, 0, 0]]) > 0)
    >>> s.shape, t.shape
    (torch.Size([3, 5]), torch.Size([3, 5]))
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    rows_s, rows_t = classes_last(in_float32(student)), classes_last(in_float32(teacher.detach()))
    if mask is None:
        return rows_s, rows_t
    if mask.numel() != len(rows_s):
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit logits of shape {tuple(student.shape)}")
    return rows_s[mask.reshape(-1)], rows_t[mask.reshape(-1)]


def target_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the positions that have a label, as rows (N, C) in float32, and their labels (N).

    Args:
        logits: (B, C), (B, T, C) or (B, C, H, W).
        target: class numbers (B), (B, T) or (B, H, W), -100 where there is none.

    Raises:
        ValueError: the shapes do not fit, or the target is no class number.

    >>> rows, labels = target_rows(torch.ones(3, 5), torch.tensor([4, -100, 0]))
    >>> rows.shape, labels
    (torch.Size([2, 5]), tensor([4, 0]))
    """
    if target.is_floating_point():
        raise ValueError(f"target is {target.dtype}: expected whole numbers of classes, not their probabilities")
    if target.numel() * logits.shape[class_axis(logits)] != logits.numel():
        raise ValueError(
            f"target of shape {tuple(target.shape)} does not fit logits of shape {tuple(logits.shape)}: "
            "expected one class number for each position"
        )
    flat = target.reshape(-1)
    known = flat != UNLABELLED
    return classes_last(in_float32(logits))[known], flat[known]


def labelled_rows(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`compared_rows` of the positions that have a label, and their labels (N).

    Raises:
        ValueError: as the two functions.

    >>> [len(x) for x in labelled_rows(torch.ones(3, 5), torch.ones(3, 5), torch.tensor([4, -100, 0]))]
    [2, 2, 2]
    """
    _, labels = target_rows(student, target)
    return *compared_rows(student, teacher, target != UNLABELLED), labels


def without_class(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's number at its label (N, 1), and its other numbers (N, C − 1) in their order.

    Raises:
        ValueError: fewer than two classes.

    >>> without_class(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1]))
    (tensor([[2.]]), tensor([[1., 3.]]))
    """
    classes = rows.shape[1]
    if classes < 2:
        raise ValueError(f"{classes} class: expected two or more, of which one is true and the others are not")
    labels = labels[:, None]
    others = torch.arange(classes - 1, device=rows.device).expand(len(rows), -1)
    return rows.gather(1, labels), rows.gather(1, others + (others >= labels))


def z_directions(rows: Tensor) -> Tensor:
    """Each row of the last axis minus its mean, of unit L2 norm; a constant row becomes 0, with gradient 0.

    It is the z-score over √(C − 1) (unbiased standard deviation) or √C (biased), and the inner product of two is
    their Pearson correlation. Constant means: no spread beyond the rounding of the numbers themselves.

    >>> z_directions(torch.tensor([[1.0, 3.0], [7.0, 7.0]]))
    tensor([[-0.7071,  0.7071],
            [ 0.0000,  0.0000]])
    """
    # Minus the greatest first, which a z-score does not see: then a constant row is exactly 0 whatever its mean is
    # rounded to.
    centred = rows - rows.detach().amax(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    spread, level = (x.detach().abs().amax(-1, keepdim=True) for x in (centred, rows))
    about = torch.finfo(rows.dtype)
    # The second bound is where a division by the spread overflows in the backward pass.
    constant = spread <= (4 * about.eps * level).clamp(min=about.tiny**0.75)
    # Scaled to 1 before the norm, whose squares would underflow.
    return unit_rows(centred.masked_fill(constant, 0.0) / spread.masked_fill(constant, 1.0))


class TokenResponse(ResponseLoss):
    """Base of response losses without labels: the mean over samples and positions, of sequences over their tokens.

    Of sequences (logits (B, T, C), labels (B, T)) the tokens labelled -100 (padding, prompts) do not count. Of whole
    samples all count, labelled or not.
    """

    separable = True

    def counted(self, logits: Tensor, batch: Batch) -> Tensor | None:
        """Which positions count; ``None`` where all do."""
        if logits.ndim != 3 or batch.labels is None or batch.labels.shape != logits.shape[:2]:
            return None
        return batch.labels != UNLABELLED

    def units(self, batch: Batch) -> Tensor | int:
        labels = batch.labels
        if labels is not None and labels.ndim == 2 and not labels.is_floating_point():
            return labelled(labels)
        return len(batch)


def check_target(name: str, logits: Tensor, labels: Tensor | None) -> None:
    """Refuse labels that are no class numbers, do not fit the logits or name a class that they lack.

    Args:
        name: of the term, for the message.
        logits: (B, C), (B, T, C) or (B, C, H, W).
        labels: class numbers, one for each position.

    Raises:
        ValueError: one of the three.
    """
    assert labels is not None, "binding has checked it"
    try:
        _, known = target_rows(logits, labels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    classes = logits.shape[class_axis(logits)]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < classes:
        wrong = int(known.max()) if int(known.max()) >= classes else int(known.min())
        raise ValueError(f"{name}: class {wrong} appears among the labels, and the logits have {classes} classes")


class LabelledResponse(ResponseLoss):
    """Base of response losses that need the true classes: the mean over the positions that have one."""

    needs_labels = True
    separable = True

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        super().check(student, teacher, batch)
        for s, _ in self.tensors(student, teacher):
            check_target(self.name, s, batch.labels)

    def units(self, batch: Batch) -> Tensor | int:
        assert batch.labels is not None, "binding has checked it"
        return labelled(batch.labels)


class LabelsAlone(Loss):
    """Base of response losses whose teacher is made of the labels: the mean over the positions that have one."""

    needs_teacher = False
    needs_labels = True
    separable = True

    def check(self, student: Record, teacher: Record | None, batch: Batch) -> None:
        check_target(self.name, student.logits, batch.labels)

    def units(self, batch: Batch) -> Tensor | int:
        assert batch.labels is not None, "binding has checked it"
        return labelled(batch.labels)
