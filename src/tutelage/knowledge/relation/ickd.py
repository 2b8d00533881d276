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


def inter_channel_correlation(student: Tensor, teacher: Tensor, grid: int = 1) -> Tensor:
    """‖G_s − G_t‖²_F / C, mean over samples: G is the C×C Gram matrix over positions, its rows of unit L2 norm.

    With a ``grid`` of n both maps are divided into n×n patches, each has a Gram matrix of its own, and the distances of
    corresponding patches are summed: the paper's form for dense predictions. Where n does not divide the height or
    width, the first patches are one position longer. The authors did not publish this form's code, and whether the
    paper takes the mean over the patches could not be checked: then its weight is n² times that of the sum.

    Args:
        student: a map (B, C, H, W), a sequence (B, N, C) or rows (B, C).
        teacher: likewise, with as many channels and any number of positions; no gradient flows to it.
        grid: n, the patches along each axis of a map; 1 is the whole.

    Returns:
        A scalar ≥ 0, and 0 for features that differ by a factor for each sample (and patch) or an order of the
        positions (within each patch).

    Raises:
        ValueError: different numbers of samples or channels (project the student first), or a ``grid`` below 1 or finer
            than one of the maps.

    Memory: C² numbers per sample and patch beside the features.

    Liu et al. 2021, "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation",
    https://arxiv.org/abs/2202.03680

    >>> x = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    >>> inter_channel_correlation(x, torch.ones(1, 2, 1, 2))
    tensor(0.5858)
    """
    same_samples(student, teacher)
    student, teacher = as_map(student), as_map(teacher.detach())
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student has {student.shape[1]} channels and the teacher {teacher.shape[1]}: correlations of "
            "channels are compared one by one; project the student to the teacher's channels"
        )
    finest = min(*student.shape[2:], *teacher.shape[2:]) if grid != 1 else 1
    if not 1 <= grid <= finest:
        raise ValueError(
            f"grid={grid}: expected 1 or more, and no more than the positions along each axis of both maps, of sizes "
            f"{tuple(student.shape[2:])} and {tuple(teacher.shape[2:])}"
        )
    pairs = zip(_patches(student, grid), _patches(teacher, grid), strict=True)
    total = torch.stack([(_correlation(s) - _correlation(t)).square().sum() for s, t in pairs]).sum()
    return total / (len(student) * student.shape[1])


def _patches(features: Tensor, grid: int) -> list[Tensor]:
    return [patch for row in features.tensor_split(grid, dim=2) for patch in row.tensor_split(grid, dim=3)]


def _correlation(features: Tensor) -> Tensor:
    rows = features.flatten(2)
    return unit_rows(rows @ rows.mT)


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
        grid: n patches along each axis of the maps, for dense predictions (the paper's ICKD-S); 1, the whole map, is
            its form for classification (ICKD-C).
        weight: 2.5 by default, the authors' for CIFAR-100, which belongs to this scale.
        name: of the term.

    See :func:`inter_channel_correlation` for the formula, the patches and the memory. The weight published for a grid
    could not be checked.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Conv2d(1, n, 3) for n in (4, 6))
    >>> loss = ICKD()
    >>> d = Distillation(nn.Sequential(student), nn.Sequential(teacher), losses=[loss.at("0")])
    >>> d.bind(torch.rand(5, 1, 8, 8)).losses["ICKD"].projectors[0][0]
    Conv2d(4, 6, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """

    default_reads = "last stage"

    def __init__(self, *taps: Tap, grid: int = 1, weight: Weight = 2.5, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        if not isinstance(grid, int) or grid < 1:
            raise ValueError(f"{self.name}: grid={grid!r}: expected a whole number, 1 or more")
        self.grid = grid
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
        return torch.stack([inter_channel_correlation(project(s), t, self.grid) for project, (s, t) in both]).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid={self.grid}"
