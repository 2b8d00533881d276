"""Class-wise self-distillation: what the network says of another sample of the class is the target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.data.pairs import PairedBatch
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.taps import Observer
from tutelage.teachers import Lesson, Teacher
from tutelage.views import UNLABELLED, Batch


def class_partners(labels: Tensor) -> Tensor:
    """For each sample of a batch another one of its class, all equally likely; itself where there is none.

    Args:
        labels: (B,) class numbers; -100 is none.

    Returns:
        (B,) positions in the batch, drawn from torch's global generator.

    Memory: B².

    >>> class_partners(torch.tensor([3, 5, 3, -100, -100]))
    tensor([2, 1, 0, 3, 4])
    """
    same = (labels == labels[:, None]) & (labels != UNLABELLED)
    same.fill_diagonal_(False)
    drawn = torch.rand(same.shape, device=labels.device).masked_fill(~same, -1.0).argmax(1)
    return torch.where(same.any(1), drawn, torch.arange(len(labels), device=labels.device))


@method(
    section="3.3",
    role="teacher",
    paper="Yun, Park, Lee, Shin: Regularizing Class-wise Predictions via Self-knowledge Distillation",
    year=2020,
    link="https://arxiv.org/abs/2003.13964",
    needs=("labels",),
    use="No teacher, and few samples of many similar classes: calmer predictions, alike within a class.",
)
class ClassWise(Teacher):
    """Another sample of the same class teaches (CS-KD).

    With :meth:`losses` the total is, x' being another sample of x's class and z(x') detached,

        CE(z(x), y) + λ·T²·KL(softmax(z(x')/T) ‖ softmax(z(x)/T))

    Where batches come in pairs (``tutelage.data.paired_loaders``, ``tutelage.data.paired``), the network runs a second
    time on the partners, without gradients and in the mode it is in, as in the authors' code: batch-norm normalises
    each of the two batches by itself and counts both, and drop-out falls differently. The labels count for x alone.

    With plain batches the partners are found inside the batch (:func:`class_partners`), at the cost of no further
    pass: every sample learns from another one, as long as its class appears twice. A sample that has no other (of its
    class in the data, or in the plain batch) or no label is its own partner. Inside a plain batch it then learns from
    the labels alone; in pairs the two are different augmentations, whose consistency is all that is asked of it.

    The authors' sampler draws the partner from the whole class, the sample itself among them; here it is another one.
    T = 4 and λ = 1 are the authors' defaults; for fine-grained classes (CUB-200) their command has λ = 3.

    Raises:
        ValueError: plain batches without labels of one class for each sample, or of which the first has no class twice.

    Memory: that of a second forward pass without gradients; within plain batches B².

    Yun, Park, Lee, Shin 2020, "Regularizing Class-wise Predictions via Self-knowledge Distillation",
    https://arxiv.org/abs/2003.13964

    >>> from tutelage import Distillation
    >>> teacher, batch = ClassWise(), (torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))
    >>> losses = Distillation(nn.Linear(8, 3), teacher, losses=teacher.losses())(batch)
    >>> sorted(losses.values), losses.weights["KD"]
    (['KD', 'TaskLoss'], 1.0)
    """

    def __init__(self) -> None:
        self._observer: Observer | None = None
        self._first = True

    def losses(self, temperature: float = 4.0, weight: float = 1.0) -> list[Loss]:
        """The published terms.

        Args:
            temperature: T.
            weight: λ.
        """
        return [TaskLoss(), KD(temperature=temperature, weight=weight)]

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        self._observer, self._first = Observer(student, teacher_reads), True
        return student_reads + teacher_reads

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        assert self._observer is not None, "bind first"
        first, self._first = self._first, False
        if not self._observer.addresses:
            return [Lesson(student, Record())]  # no loss reads the partners
        if isinstance(batch, PairedBatch):
            with torch.no_grad():
                run = self._observer.dry_run if first else self._observer
                return [Lesson(student, run(batch.teacher))]
        labels = batch.labels
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            what = "no labels" if labels is None else f"labels of {labels.dtype} and shape {tuple(labels.shape)}"
            raise ValueError(f"ClassWise: the batch has {what}: expected one class number for each sample")
        partners = class_partners(labels)
        if first and bool((partners == torch.arange(len(labels), device=labels.device)).all()):
            raise ValueError(
                f"ClassWise: no class appears twice among the {len(labels)} samples of the first batch, so none of "
                "them has a partner: use tutelage.data.paired_loaders (or paired), or larger batches"
            )
        return [Lesson(student, student.rows(partners).detach())]
