"""Inter-channel correlation: which channels of a layer fire alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.pairs import as_map, channel_projector, same_samples
from tutelage.knowledge.rows import unit_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def inter_channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """‖G_s − G_t‖²_F / C, mean over samples: G is the C×C Gram matrix over positions, its rows of unit L2 norm.

    Args:
        student: a map (B, C, H, W), a sequence (B, N, C) or rows (B, C).
        teacher: likewise, with as many channels and any number of positions; no gradient flows to it.

    Returns:
        A scalar ≥ 0, and 0 for features that differ by a factor for each sample or an order of the positions.

    Raises:
        ValueError: different numbers of samples or channels (project the student first).

    Memory: C² numbers per sample beside the features.

    Liu et al. 2021, "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation",
    https://arxiv.org/abs/2202.03680

    >>> x = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    >>> inter_channel_correlation(x, torch.ones(1, 2, 1, 2))
    tensor(0.5858)
    """
    same_samples(student, teacher)
    student, teacher = as_map(student).flatten(2), as_map(teacher.detach()).flatten(2)
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student has {student.shape[1]} channels and the teacher {teacher.shape[1]}: correlations of "
            "channels are compared one by one; project the student to the teacher's channels"
        )
    difference = unit_rows(student @ student.mT) - unit_rows(teacher @ teacher.mT)
    return difference.square().sum() / (len(student) * student.shape[1])


@method(
    section="2.3+",
    role="losses",
    paper="Liu, Huang, Lin, Xie, Wang, Chang, Liang: Exploring Inter-Channel Correlation for Diversity-preserved "
    "Knowledge Distillation",
    year=2021,
    link="https://arxiv.org/abs/2202.03680",
    use="Convolutional networks whose maps differ in size: which channels belong together, whatever the positions.",
)
class ICKD(Loss):
    """Inter-channel correlation: the normalised Gram matrix of a layer's channels, squared distance over C.

    Where channels differ, a 1×1 convolution without bias and a batch norm, as in the authors' code, bring the
    student's layer to the teacher's channels (a linear layer for sequences and rows). The authors' code has them
    also where channels are equal; here the layers are then compared as they are.

    Args:
        taps: the layers; by default the last stage of each. Several are summed.
        weight: 2.5 by default, the authors' for CIFAR-100, which belongs to this scale.
        name: of the term.

    This is ICKD-C, for classification; the paper's grid-wise form for segmentation is not here. See
    :func:`inter_channel_correlation` for the formula and the memory.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Conv2d(1, n, 3) for n in (4, 6))
    >>> loss = ICKD()
    >>> d = Distillation(nn.Sequential(student), nn.Sequential(teacher), losses=[loss.at("0")])
    >>> d.bind(torch.rand(5, 1, 8, 8)).losses["ICKD"].projectors[0][0]
    Conv2d(4, 6, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """

    default_reads = "last stage"

    def __init__(self, *taps: Tap, weight: Weight = 2.5, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        self.projectors = nn.ModuleList()

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        self.projectors = nn.ModuleList()
        for s, t in self.tensors(student, teacher):
            if s.ndim == t.ndim == 4 and s.shape[1] != t.shape[1]:
                layers = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False), nn.BatchNorm2d(t.shape[1])
                self.projectors.append(nn.Sequential(*layers).to(s))
            else:
                self.projectors.append(channel_projector(s, t))

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        both = zip(self.projectors, self.tensors(student, teacher), strict=True)
        return torch.stack([inter_channel_correlation(project(s), t) for project, (s, t) in both]).sum()
