"""Teacher-free distillation by self-training: a network learns from an earlier training of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.catalogue import method
from tutelage.distilling import Result
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.procedures import Leg, Setting, laid_out, seed_of, train_legs
from tutelage.run import Epoch
from tutelage.schedule import Stage
from tutelage.schemes.self_distillation.fresh import fresh_network
from tutelage.teachers import Frozen


def _legs(setting: Setting, fresh: Callable[[], nn.Module] | None = None) -> list[Leg]:
    losses = setting.losses
    if losses is None and setting.stages is None:
        losses = [TaskLoss(weight=0.05), KD(temperature=6.0, weight=0.475)]
    legs = []
    teacher = setting.teacher.module if isinstance(setting.teacher, Frozen) else setting.teacher
    if teacher is None:
        teacher = fresh_network(setting.student, (setting.seed + 1) * 7_919, fresh)
        legs = [Leg("pretrained", teacher, None)]
    if not isinstance(teacher, nn.Module) or _form(teacher) != _form(setting.student):
        raise ValueError(
            f"teacher: expected a trained network of the student's own form or none, got {type(teacher).__name__}; "
            "from another one a student learns by tutelage.distill"
        )
    return [*legs, Leg("student", setting.student, setting.teacher or teacher, losses, setting.stages)]


def _form(network: nn.Module) -> dict[str, Any]:
    return {name: value.shape for name, value in network.state_dict().items()}


@method(
    section="3.3",
    role="procedure",
    paper="Yuan, Tay, Li, Wang, Feng: Revisiting Knowledge Distillation via Label Smoothing Regularization",
    year=2020,
    link="https://arxiv.org/abs/1909.11723",
    needs=("labels", "extra stages"),
    use="No larger teacher, and time for a second training: its own soft targets, against wrong labels.",
)
@laid_out(_legs)
def teacher_free_self(
    student: nn.Module,
    teacher: nn.Module | Frozen | None,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    fresh: Callable[[], nn.Module] | None = None,
    losses: Sequence[Loss] | None = None,
    stages: Sequence[Stage] | None = None,
    out: str | Path | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
    **training: Any,
) -> list[Result]:
    """Teacher-free self-training (Tf-KD_self): train a network, then train it anew with itself as teacher.

    The second training minimises (1 − α) · CE(z, y) + α · T² · KL(softmax(z′ / T) ‖ softmax(z / T)), where z′ are the
    logits of the first one's network, frozen. The other half of the paper, a virtual teacher that needs no first
    training (Tf-KD_reg), is the loss :class:`tutelage.TeacherFreeReg`.

    Args:
        student: learns in the second training.
        teacher: a trained network of the same form; ``None``: a copy of the student with fresh weights is trained on
            the labels first, as long as the student.
        train, validation: as in :func:`tutelage.distill`, read by both trainings.
        fresh: makes that copy; see :func:`tutelage.born_again`.
        losses: of the second training; by default ``[TaskLoss(weight=0.05), KD(temperature=6, weight=0.475)]``, as for
            the authors' ResNet-18 on CIFAR-100: α = 0.95, and their KL, a mean over its 100 classes, times 50. Their
            other networks have T = 20 and, in the same scale, 0.1 beside 0.9 (ResNeXt-29), 0.1 beside 0.45
            (DenseNet-121), 0.05 beside 0.0095 (MobileNetV2, ShuffleNetV2).
        stages: instead of ``losses``.
        out: the trainings' folders are in it: ``pretrained`` and ``student``.
        after_epoch: called with each epoch's line of the second training.
        **training: further arguments of :func:`tutelage.distill`. With ``resume=True`` a finished training is not done
            again.

    Returns:
        The two trainings' results, or the second's alone if the teacher was trained already.

    Raises:
        ValueError: a teacher of another form, losses that were bound already, or fresh weights that nobody knows to
            make.

    Yuan, Tay, Li, Wang, Feng 2020, "Revisiting Knowledge Distillation via Label Smoothing Regularization",
    https://arxiv.org/abs/1909.11723

    >>> import torch
    >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    >>> first, second = teacher_free_self(nn.Linear(8, 3), None, data, data, epochs=1, progress=False)
    >>> second.teacher is first.student, sorted(second.history[0]["losses"])
    (True, ['KD', 'TaskLoss', 'loss'])
    """
    legs = _legs(Setting(student, teacher, losses, stages, seed_of(training)), fresh)
    return train_legs(legs, train, validation, out=out, after_epoch=after_epoch, **training)
