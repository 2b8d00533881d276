"""FitNets: a hidden layer of the student learns to predict one of the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.connectors import match_size, projector
from tutelage.knowledge.base import Loss, Tap
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """(r(F_s) − F_t)², mean over samples, channels and positions, of features already regressed to equal shapes.

    Nothing is normalised. The paper sums over channels and positions and halves.

    Args:
        student: the regressor's output, of any shape.
        teacher: the hint, of the same shape; no gradient flows to it.

    Returns:
        A scalar ≥ 0, and 0 for equal features.

    Raises:
        ValueError: the shapes differ.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", https://arxiv.org/abs/1412.6550

    >>> hint_loss(torch.zeros(2, 3, 4, 4), 2 * torch.ones(2, 3, 4, 4))
    tensor(4.)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"hints differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return F.mse_loss(in_float32(student), in_float32(teacher).detach())


@method(
    section="2.2",
    role="losses",
    paper="Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets",
    year=2015,
    link="https://arxiv.org/abs/1412.6550",
    use="A student that is deeper and thinner than its teacher, or trains badly from the start: a hint for its middle.",
)
class FitNets(Loss):
    """Hints: a learned regressor on a middle layer of the student predicts the teacher's features.

    The regressor is a 1×1 convolution for maps and a linear layer for sequences and vectors, made from the real
    shapes when binding; maps of different sizes meet at the smaller by average pooling. Beside other losses it
    trains in one stage. Alone in a stage it is the paper's hint stage: both forward passes end at the hint.

    Args:
        taps: the hint layers; by default the middle one of the matched stages. Several are summed.
        weight: 100 by default, as in the CRD study, which goes with the mean over channels and positions.
        name: of the term.

    Memory: linear in the features. See :func:`hint_loss` for the formula.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 3)) for n in (4, 16))
    >>> hint = FitNets("0")
    >>> d = Distillation(student, teacher, losses=[hint]).bind(torch.ones(5, 8))
    >>> hint.regressors[0]
    Linear(in_features=4, out_features=16, bias=True)
    """

    default_reads = "middle stage"

    def __init__(self, *taps: Tap, weight: Weight = 100.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        self.regressors = nn.ModuleList()

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        self.regressors = nn.ModuleList()
        for s, t in self.tensors(student, teacher):
            if s.ndim == t.ndim == 3 and s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"{self.name}: the student has {s.shape[1]} tokens and the teacher {t.shape[1]} "
                    f"(shapes {tuple(s.shape)} and {tuple(t.shape)}); hints of sequences need the same tokens"
                )
            self.regressors.append(projector(s.shape, t.shape).to(s))

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        losses = []
        for regressor, (s, t) in zip(self.regressors, self.tensors(student, teacher), strict=True):
            if s.ndim == 4:
                s, t = match_size(s, t)  # pooling and a 1×1 convolution commute; the smaller map is cheaper
            losses.append(hint_loss(regressor(s), t))
        return torch.stack(losses).sum()
