"""Learning metrics from teachers: the teacher's embedding itself, or its distances between samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.pairs import channel_projector, distances, paired_rows
from tutelage.knowledge.rows import flat_rows, unit_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def absolute_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    """|x_i − y_i|, mean over samples: the distance of each student's embedding to the teacher's of the same sample.

    Args:
        student: (B, ...) embeddings.
        teacher: of the same size; no gradient flows to them.

    Returns:
        A scalar ≥ 0, and 0 for equal embeddings. Its gradient has length 1/B for each sample, and is 0 at distance 0.

    Raises:
        ValueError: different numbers of samples, or sizes (project the student's first).

    Memory: linear.

    Yu et al. 2019, "Learning Metrics from Teachers", https://arxiv.org/abs/1904.03624

    >>> absolute_teacher(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2))
    tensor(2.5000)
    """
    student, teacher = paired_rows(student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's embeddings have {student.shape[1]} numbers and the teacher's {teacher.shape[1]}: the "
            "absolute teacher compares them one by one; project the student's, or take the relative teacher"
        )
    return torch.linalg.vector_norm(student - teacher, dim=1).mean()


def relative_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    """‖D_s − D_t‖_F of the B×B matrices of Euclidean distances between the embeddings of a batch.

    The paper sums |d_s − d_t| over the pairs; its authors' code, to which the published weights belong, takes this
    norm, which grows about in proportion to B.

    Args:
        student: (B, ...) embeddings.
        teacher: (B, ...) embeddings of any other size; no gradient flows to them.

    Returns:
        A scalar ≥ 0, and 0 for embeddings that differ by a rotation or a shift.

    Raises:
        ValueError: different numbers of samples.

    Memory: B² beside the embeddings.

    Yu et al. 2019, "Learning Metrics from Teachers", https://arxiv.org/abs/1904.03624

    >>> relative_teacher(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor(4.2426)
    """
    student, teacher = paired_rows(student, teacher)
    return torch.linalg.vector_norm(distances(student) - distances(teacher))


@method(
    section="2.3",
    role="losses",
    paper="Yu, Yazici, Liu, van de Weijer, Cheng, Ramisa: Learning Metrics from Teachers: Compact Networks for Image "
    "Embedding",
    year=2019,
    link="https://arxiv.org/abs/1904.03624",
    use="Embeddings for retrieval whose distances themselves shall be kept, as thresholds on them need it.",
)
class MetricLearning(Loss):
    """Metrics from a teacher: its distances between samples (relative), or its embeddings themselves (absolute).

    Where the absolute teacher is asked for and widths differ, a learned linear layer, made when binding, brings the
    student's embeddings to the teacher's; the authors' have equal ones.

    Args:
        taps: the embeddings, by default what the last linear layer reads. Several are summed.
        relative: weight of :func:`relative_teacher` inside the term; 0.3 by default, the authors' for the birds of
            CUB-200-2011 in batches of 32 (0.1 for cars, 1 for products).
        absolute: weight of :func:`absolute_teacher`; 0 by default. The authors' is 1 for birds (1.5 for cars, 2 for
            products), instead of the relative one.
        normalize: whether embeddings are scaled to unit length first, as the authors' networks do.
        weight: of the term; 1 by default.
        name: of the term.

    See the two functions for the formulas and the memory.

    >>> loss = MetricLearning()
    >>> loss.relative, loss.absolute, loss.default_reads
    (0.3, 0.0, 'embedding')
    """

    default_reads = "embedding"
    needs_samples = 2

    def __init__(
        self,
        *taps: Tap,
        relative: float = 0.3,
        absolute: float = 0.0,
        normalize: bool = True,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        if relative < 0 or absolute < 0 or relative + absolute == 0:
            raise ValueError(
                f"{self.name}: relative={relative}, absolute={absolute}: expected two weights ≥ 0, not both 0"
            )
        self.relative, self.absolute, self.normalize = relative, absolute, normalize
        self.projectors = nn.ModuleList()

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        if self.absolute:
            both = self.tensors(student, teacher)
            self.projectors = nn.ModuleList(channel_projector(flat_rows(s), flat_rows(t)) for s, t in both)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        prepare = unit_rows if self.normalize else torch.Tensor.contiguous
        terms = []
        for n, (s, t) in enumerate(self.tensors(student, teacher)):
            s, t = flat_rows(s), prepare(flat_rows(t))
            if self.relative:
                terms.append(self.relative * relative_teacher(prepare(s), t))
            if self.absolute:
                terms.append(self.absolute * absolute_teacher(prepare(self.projectors[n](s)), t))
        return torch.stack(terms).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relative={self.relative}, absolute={self.absolute}, normalize={self.normalize}"
