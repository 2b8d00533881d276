"""Exclusivity and consistency: filters that look at different positions, features that point where the teacher's do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.connectors import projector
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.pairs import paired_rows
from tutelage.knowledge.rows import unit_rows
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch


def position_exclusivity(filters: Tensor, groups: int = 1, unit: bool = True) -> Tensor:
    """‖f_i ⊙ f_j‖₁ = Σ_k |f_ik|·|f_jk|, mean over pairs i ≠ j of one layer's filters.

    It is the relaxation of how many positions k (input channel, row and column) two filters share with numbers other
    than 0. Unlike their inner product it does not cancel: filters are exclusive only if no position has both. Filters
    of different groups read different channels and are not paired.

    Args:
        filters: (N, ...), a convolution's weights with its outputs first.
        groups: of the convolution, each with at least 2 filters.
        unit: whether filters are first brought to unit L2 norm, so that shrinking them gains nothing (where a batch
            norm follows, their length has no other effect). The value is then at most 1.

    Returns:
        A scalar ≥ 0, and 0 for filters of which no two share a position.

    Raises:
        ValueError: fewer than 2 filters a group, or as many as the groups do not divide.

    Memory: linear in the weights, by Σ_i≠j |f_ik|·|f_jk| = (Σ_i |f_ik|)² − Σ_i f_ik².

    Wang, Fu, Liao, Wang, Lei, Mei 2020, "Exclusivity-Consistency Regularized Knowledge Distillation for Face
    Recognition", https://www.ecva.net/papers/eccv_2020/papers_ECCV/html/4614_ECCV_2020_paper.php

    >>> position_exclusivity(torch.tensor([[1.0, 0.0], [0.0, -3.0]]))
    tensor(0.)
    >>> position_exclusivity(torch.tensor([[1.0, 2.0], [2.0, -1.0]]), unit=False)
    tensor(4.)
    """
    count = len(filters) // groups if groups > 0 else 0
    if count < 2 or count * groups != len(filters):
        raise ValueError(f"{len(filters)} filters in {groups} groups: expected at least 2 in each, equally many")
    rows = in_float32(filters).reshape(groups, count, -1)
    size = (unit_rows(rows) if unit else rows).abs()
    shared = size.sum(1).square().sum(1) - size.square().sum((1, 2))
    return (shared / (count * (count - 1))).mean()


def feature_consistency(student: Tensor, teacher: Tensor, hardness: float = 1.0) -> Tensor:
    """w_i · d_i, mean over samples, with d = ‖s/‖s‖ − t/‖t‖‖² = 2 − 2·cos and w_i = (d_i / mean d)^hardness.

    The weights are constants: through their mean a gradient would drive easy samples away from the teacher.

    Args:
        student: (B, D) features, or of any shape.
        teacher: of the same shape; no gradient flows to it.
        hardness: how much more than its share a sample far from the teacher weighs; 0 is plain consistency.

    Returns:
        A scalar ≥ 0, and 0 for features of the teacher's directions.

    Raises:
        ValueError: different shapes, or a negative ``hardness``.

    Memory: linear in the features.

    Wang et al. 2020, https://www.ecva.net/papers/eccv_2020/papers_ECCV/html/4614_ECCV_2020_paper.php

    >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> feature_consistency(student, teacher, hardness=0.0), feature_consistency(student, teacher)
    (tensor(1.), tensor(2.))
    """
    if not hardness >= 0:
        raise ValueError(f"hardness={hardness}: expected a number of at least 0")
    if student.shape != teacher.shape:
        raise ValueError(f"features differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    s, t = paired_rows(student, teacher)
    distance = (unit_rows(s) - unit_rows(t)).square().sum(1)
    mean = distance.detach().mean()
    weights = (distance.detach() / mean.masked_fill(mean == 0, 1.0)).pow(hardness)
    return (weights * distance).mean()


@method(
    section="2.2",
    role="losses",
    paper="Wang, Fu, Liao, Wang, Lei, Mei: Exclusivity-Consistency Regularized Knowledge Distillation for Face "
    "Recognition",
    year=2020,
    link="https://www.ecva.net/papers/eccv_2020/papers_ECCV/html/4614_ECCV_2020_paper.php",
    use="Small convolutional students of face recognition and other embeddings, which are compared by their direction.",
)
class ExclusivityConsistency(Loss):
    """Exclusivity and consistency: diverse filters in the student, and embeddings that are the teacher's.

    The value is :func:`feature_consistency` of the embeddings, hard samples first, plus ``exclusivity`` times the mean
    over layers of :func:`position_exclusivity`: those of the student's convolutions that have two filters or more
    that read the same channels. Where widths differ, a linear layer (a 1×1 convolution for maps), made when binding,
    brings the student's embedding to the teacher's.

    The paper's text was not at hand. From its abstract and a summary are: that exclusivity counts positions that two
    filters of a layer share, that all pairs of them are taken, that features are compared rather than
    probabilities, and that samples far from the teacher weigh more. Chosen here are: the ℓ₁ relaxation (as in the
    first author's earlier work on exclusivity), unit lengths, means instead of sums, the form of the weights, and all
    three numbers. So no published number can be expected of it unchecked.

    Args:
        taps: the embedding, by default what the last linear layer reads. Several are summed.
        exclusivity: weight of the filters' term beside the features'; 0.01 by default.
        hardness: see :func:`feature_consistency`; 1 by default.
        unit_filters: whether filters are brought to unit length, see :func:`position_exclusivity`.
        weight: of both terms; 5 by default.
        name: of the term.

    The filters are read from the student itself at every step, and stay its own; of a cohort of peers, from the first.

    Memory: linear in the features and weights.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Conv2d(1, n, 3), nn.Flatten(), nn.Linear(36 * n, 3)) for n in (4, 8))
    >>> loss = ExclusivityConsistency()
    >>> d = Distillation(student, teacher, losses=[loss]).bind(torch.rand(5, 1, 8, 8))
    >>> loss.projectors[0], len(loss.filters())
    (Linear(in_features=144, out_features=288, bias=True), 1)
    """

    default_reads = "embedding"

    def __init__(
        self,
        *taps: Tap,
        exclusivity: float = 0.01,
        hardness: float = 1.0,
        unit_filters: bool = True,
        weight: Weight = 5.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        for field, value in (("exclusivity", exclusivity), ("hardness", hardness)):
            if not value >= 0:
                raise ValueError(f"{self.name}: {field}={value}: expected a number of at least 0")
        self.exclusivity, self.hardness, self.unit_filters = exclusivity, hardness, unit_filters
        self.projectors = nn.ModuleList()
        self._student: tuple[nn.Module, ...] = ()  # in a tuple, so that the student is no submodule

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        self._student = (student,)
        if self.exclusivity and not self.filters():
            raise ValueError(
                f"{self.name}: {type(student).__name__} has no convolution with two filters that read the same "
                "channels, to be exclusive; exclusivity=0 asks for consistency alone"
            )
        return super().resolve(student, teacher, batch)

    def filters(self) -> list[tuple[Tensor, int]]:
        """The student's weights that are to be exclusive, (N, ...), each with its number of groups."""
        return [
            (layer.weight, layer.groups)
            for student in self._student
            for layer in student.modules()
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.out_channels > layer.groups
        ]

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        self.projectors = nn.ModuleList()
        for s, t in self.tensors(student, teacher):
            self.projectors.append(nn.Identity() if s.shape == t.shape else projector(s.shape, t.shape).to(s))

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        both = zip(self.projectors, self.tensors(student, teacher), strict=True)
        value = torch.stack([feature_consistency(project(s), t, self.hardness) for project, (s, t) in both]).sum()
        if not self.exclusivity:
            return value
        layers = [position_exclusivity(weight, groups, self.unit_filters) for weight, groups in self.filters()]
        return value + self.exclusivity * torch.stack(layers).mean()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, exclusivity={self.exclusivity}, hardness={self.hardness}"
