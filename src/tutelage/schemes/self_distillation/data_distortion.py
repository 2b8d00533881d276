"""Data distortion: two distortions of one batch go through one network, and each teaches the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.catalogue import method
from tutelage.data.arrays import CropFlip
from tutelage.knowledge.base import Loss, Reads, Tap
from tutelage.knowledge.relation.pairs import paired_rows
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.teachers import Lesson, Teacher
from tutelage.views import Batch, SameView, read_batch


@dataclass
class DistortedBatch(Batch):
    """B samples whose inputs are 2·B: one distortion of all of them, and then another.

    Labels and ids are the B samples' own, for each lesson is about one distortion of every sample.
    """

    def __len__(self) -> int:
        """The number of samples, B."""
        return super().__len__() // 2


class Distortions:
    """The network sees two distortions of each sample, in one batch of twice the size.

    Every floating-point input is distorted; other inputs (token ids, masks) are repeated. A model is judged on batches
    as they are (:func:`tutelage.views.judging`).

    Args:
        first: makes the first distortion of a batch of inputs, of the same shape; by default random crops and flips
            with a padding of 4 (:class:`tutelage.data.CropFlip`), which on normalised images is the mean colour.
        second: makes the second; by default it is drawn by ``first`` too, which must then be random. Where the loader
            distorts already, both are of its distortion.

    Raises:
        ValueError: a distortion changes the number of samples or their shape.

    Memory: twice the inputs.

    >>> batch = Distortions(lambda x: x + 1, lambda x: 2 * x)((torch.tensor([[3.0], [4.0]]), torch.tensor([0, 1])))
    >>> batch.student.args[0].flatten(), batch.labels, len(batch)
    (tensor([4., 5., 6., 8.]), tensor([0, 1]), 2)
    """

    judging = SameView()

    def __init__(
        self,
        first: Callable[[Tensor], Tensor] | None = None,
        second: Callable[[Tensor], Tensor] | None = None,
    ):
        self.first = first or CropFlip()
        self.second = second or self.first

    def __call__(self, raw: Any) -> DistortedBatch:
        batch = read_batch(raw)
        inputs = batch.student.each(self._both)
        return DistortedBatch(inputs, inputs, batch.labels, batch.ids, batch.progress, batch.population)

    def _both(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return torch.cat([x, x])
        both = self.first(x), self.second(x)
        for name, distorted in zip(("first", "second"), both, strict=True):
            if distorted.shape != x.shape:
                raise ValueError(f"Distortions.{name}: made {tuple(distorted.shape)} of a batch of {tuple(x.shape)}")
        return torch.cat(both)


def mean_embedding_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """‖mean_b s_b − mean_b t_b‖²: MMD² with the linear kernel, between two sets of features.

    Args:
        student: (B, ...) features.
        teacher: (B, ...) features of the same size; no gradient flows to them.

    Returns:
        A scalar ≥ 0, and 0 for equal means. It is one number of the whole batch: of each process's part where there
        are several, and of each of the batches that make a step.

    Raises:
        ValueError: different numbers of samples, or features of different sizes.

    Xu, Liu 2019, "Data-Distortion Guided Self-Distillation for Deep Neural Networks",
    https://doi.org/10.1609/aaai.v33i01.33015565

    >>> mean_embedding_distance(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
    tensor(4.)
    """
    s, t = paired_rows(student, teacher)
    if s.shape[1] != t.shape[1]:
        raise ValueError(f"features of different sizes: {s.shape[1]} of the student, {t.shape[1]} of the teacher")
    return (s.mean(0) - t.mean(0)).square().sum()


class MeanEmbedding(Loss):
    """The squared distance between the two batches' mean features.

    Args:
        taps: which features; by default what the last linear layer reads. Several are summed.
        weight: μ, 0.0005 by default.
        name: of the term.

    Memory: linear in the features. See :func:`mean_embedding_distance` for the formula.

    >>> MeanEmbedding()
    MeanEmbedding(embedding, weight=0.0005)
    """

    default_reads: Reads = "embedding"

    def __init__(self, *taps: Tap, weight: Weight = 0.0005, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        return torch.stack([mean_embedding_distance(s, t) for s, t in self.tensors(student, teacher)]).sum()

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        for s, t in self.tensors(student, teacher):
            if s.shape != t.shape:
                raise ValueError(f"{self.name}: the features are {tuple(s.shape)} and {tuple(t.shape)}")


@method(
    section="3.3",
    role="teacher",
    paper="Xu, Liu: Data-Distortion Guided Self-Distillation for Deep Neural Networks",
    year=2019,
    link="https://doi.org/10.1609/aaai.v33i01.33015565",
    needs=("labels", "extra memory"),
    use="No teacher, and data that can be augmented: what is said of one sample shall not depend on its distortion.",
)
class DataDistortion(Teacher):
    """Two distortions of each sample teach each other through one network (DDGSD).

    With :meth:`losses`, a and b the two distortions, z logits and f features, the total is

        Σ_{a, b} CE(z, y) + λ·T²·[KL(p_b ‖ p_a) + KL(p_a ‖ p_b)] + μ·‖mean f_a − mean f_b‖²,   p = softmax(z/T)

    It goes with ``views=Distortions()``: one forward pass of 2·B, and two lessons, each of one half from the other,
    whose part is detached; so any losses can stand there. Of a symmetric distance such as the last, each lesson gives
    one half of the gradient, and their sum is the gradient of the distance once (the value is counted twice).

    λ = 1, T = 3 and μ = 0.0005 are what reimplementations give as the paper's. Its text and a code of its authors were
    not at hand, so two things could not be checked: the factor T², which is taken as everywhere, and that the targets
    are detached; of two reimplementations one does and one does not.

    Memory: activations of twice the batch.

    Xu, Liu 2019, "Data-Distortion Guided Self-Distillation for Deep Neural Networks",
    https://doi.org/10.1609/aaai.v33i01.33015565

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallCNN
    >>> teacher, batch = DataDistortion(), (torch.randn(4, 1, 8, 8), torch.zeros(4).long())
    >>> losses = Distillation(SmallCNN(2), teacher, teacher.losses(), Distortions())(batch)
    >>> sorted(losses.values)
    ['KD', 'MeanEmbedding', 'TaskLoss']
    """

    def losses(self, temperature: float = 3.0, weight: float = 1.0, mean_embedding: float = 0.0005) -> list[Loss]:
        """The published terms.

        Args:
            temperature: T.
            weight: λ.
            mean_embedding: μ.
        """
        return [TaskLoss(), KD(temperature=temperature, weight=weight), MeanEmbedding(weight=mean_embedding)]

    def bind(self, student: Any, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        return student_reads + teacher_reads

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        if not isinstance(batch, DistortedBatch):
            raise ValueError(f"{type(self).__name__}: the batch has no two distortions: expected views=Distortions()")
        first, second = student.rows(slice(len(batch))), student.rows(slice(len(batch), None))
        return [Lesson(first, second.detach()), Lesson(second, first.detach())]
