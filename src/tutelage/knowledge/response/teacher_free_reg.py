"""Teacher-free regularisation: a virtual teacher that is always right, made by hand."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from tutelage.catalogue import method
from tutelage.knowledge.response.rows import LabelsAlone, positive, target_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch

Softened = Literal["probabilities", "log-probabilities"]


def virtual_teacher(
    classes: int, correct: float = 0.99, temperature: float = 20.0, softened: Softened = "log-probabilities"
) -> tuple[float, float]:
    """What the virtual teacher, softened, says of the true class and of each other class.

    Before softening it gives the true class the probability a and each of the K − 1 others (1 − a) / (K − 1).

    Args:
        classes: K ≥ 2.
        correct: a, above 1/K and up to 1.
        temperature: T > 0, the virtual teacher's own; the student has none.
        softened: what softmax(· / T) is applied to. With log-probabilities, as of any other teacher, T = 1 gives back
            a and (1 − a) / (K − 1), and T = 20 about what the paper's figure 3 shows. The authors' code takes the
            probabilities themselves as logits, which is far from (a, 1 − a) even at T = 1, but at T = 20 differs from
            the other by little: both are nearly uniform.

    Raises:
        ValueError: an argument outside its range.

    >>> [round(p, 4) for p in virtual_teacher(5, 0.6, temperature=1.0)]
    [0.6, 0.1]
    >>> [round(p, 4) for p in virtual_teacher(10)]
    [0.135, 0.0961]
    """
    _check_virtual(correct, temperature, softened)
    if classes < 2 or correct <= 1 / classes:
        raise ValueError(f"correct={correct}: expected more than 1 / {classes}, for {classes} >= 2 classes")
    other = (1 - correct) / (classes - 1)
    if softened == "probabilities":
        gap = (correct - other) / temperature
    else:
        gap = (math.log(correct) - math.log(other)) / temperature if other > 0 else math.inf
    return 1 / (1 + (classes - 1) * math.exp(-gap)), math.exp(-gap) / (1 + (classes - 1) * math.exp(-gap))


def _check_virtual(correct: float, temperature: float, softened: str, name: str = "") -> None:
    positive(f"{name}temperature", temperature)
    if not 0 < correct <= 1:
        raise ValueError(f"{name}correct={correct}: expected a probability above that of chance, up to 1")
    if softened not in ("probabilities", "log-probabilities"):
        raise ValueError(f"{name}softened={softened!r}: expected 'probabilities' or 'log-probabilities'")


def teacher_free(
    student: Tensor,
    target: Tensor,
    correct: float = 0.99,
    temperature: float = 20.0,
    softened: Softened = "log-probabilities",
) -> Tensor:
    """KL(u ‖ softmax(z_s)), mean over the labelled samples and positions; u is the :func:`virtual_teacher`.

    u has two different values, so no (B, C) target is made: the sum is taken over the student's log-probabilities.
    The student is not softened and there is no T², as in the authors' code; the paper writes τ on both sides.

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W).
        target: the true classes (B), (B, T) or (B, H, W); positions labelled -100 do not count. If none counts, the
            value is 0, with a gradient of 0.
        correct: a, the virtual teacher's probability of the true class.
        temperature: T, the virtual teacher's own.
        softened: see :func:`virtual_teacher`.

    Returns:
        A scalar ≥ 0 in nats, and 0 for a student that predicts u.

    Raises:
        ValueError: an argument outside its range, or shapes that do not fit.

    Yuan, Tay, Li, Wang, Feng 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization",
    https://arxiv.org/abs/1909.11723

    >>> import torch
    >>> teacher_free(torch.zeros(1, 4), torch.tensor([2]), correct=0.7, temperature=1.0)
    tensor(0.4458)
    """
    rows, labels = target_rows(student, target)
    true, other = virtual_teacher(rows.shape[1], correct, temperature, softened)
    log_q = rows.log_softmax(1)
    said = (true - other) * log_q.gather(1, labels[:, None]).sum() + other * log_q.sum()
    negative_entropy = true * math.log(true) + ((rows.shape[1] - 1) * other * math.log(other) if other else 0.0)
    return (len(labels) * negative_entropy - said) / max(len(labels), 1)


@method(
    section="2.1",
    role="losses",
    paper="Yuan, Tay, Li, Wang, Feng: Revisiting Knowledge Distillation via Label Smoothing Regularization",
    year=2020,
    link="https://arxiv.org/abs/1909.11723",
    use="No teacher at all: soft targets from the labels, near to uniform and always right.",
)
class TeacherFreeReg(LabelsAlone):
    """Teacher-free regularisation (Tf-KD_reg): KL to a virtual teacher that is always right.

    It needs no teacher. Samples and tokens labelled -100 do not count. The paper's other half, a network that learns
    from an earlier training of itself (Tf-KD_self), is :func:`tutelage.teacher_free_self`.

    Args:
        correct: a, the virtual teacher's probability of the true class; 0.99, as published.
        temperature: T of the virtual teacher; 20, as for the authors' ResNet-18 on CIFAR-100 (10 to 40 for others).
        softened: what T is applied to, see :func:`virtual_teacher`.
        weight: α; 0.1, beside ``TaskLoss(weight=0.9)``, as for that ResNet-18. It belongs to the sum over classes
            here: the authors' KL divergence is a mean over classes too, which they multiply by the 100 classes. For
            MobileNetV2 and ShuffleNetV2 they multiply 0.95 by 1 instead, which is 0.0095 here beside 0.05.
        name: of the term.

    Memory: linear in the logits. See :func:`teacher_free` for the formula. With ``softened="probabilities"`` values
    and gradients were compared with the authors' code.

    >>> TeacherFreeReg()
    TeacherFreeReg(logits, weight=0.1, correct=0.99, temperature=20.0)
    """

    def __init__(
        self,
        *,
        correct: float = 0.99,
        temperature: float = 20.0,
        softened: Softened = "log-probabilities",
        weight: Weight = 0.1,
        name: str | None = None,
    ):
        super().__init__(weight=weight, name=name)
        _check_virtual(correct, temperature, softened, f"{self.name}: ")
        self.correct, self.temperature, self.softened = correct, temperature, softened

    def forward(self, student: Record, teacher: Record | None, batch: Batch) -> Tensor:
        assert batch.labels is not None, "binding has checked it"
        return teacher_free(student.logits, batch.labels, self.correct, self.temperature, self.softened)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, correct={self.correct}, temperature={self.temperature}"
