"""Variational information distillation: a lower bound on what the student's layer knows of the teacher's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.connectors import match_size, projector
from tutelage.knowledge.base import Loss, Tap
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch

FLOOR = 1e-5
"""Added to every variance, so that a channel that is predicted exactly costs a finite number."""


def variational_information(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """½·((t − μ)² / σ_c² + log σ_c²), mean over samples, channels c and positions: −log q(t | s) without ½·log 2π.

    q is a Gaussian around what is predicted from the student's features, with one variance for each channel. Its
    expected logarithm is, but for the teacher's entropy, a lower bound on the mutual information of the two layers.
    The paper writes the sum over channels and positions; the CRD study's code, which names the authors' as its source,
    takes this mean.

    Args:
        mean: μ, predicted from the student: a map (B, C, H, W), a sequence (B, N, C) or vectors (B, C).
        teacher: t, of the same shape; no gradient flows to it.
        variance: σ², (C,), positive.

    Returns:
        A scalar in nats, which is below 0 where predictions are good: at best ½·mean log σ², for μ = t. Of the
        variance the best is each channel's mean squared error.

    Raises:
        ValueError: the shapes differ or have other numbers of axes, or the variance is not one number a channel.

    Memory: linear in the features.

    Ahn, Hu, Damianou, Lawrence, Dai 2019, "Variational Information Distillation for Knowledge Transfer",
    https://arxiv.org/abs/1904.05835

    >>> variational_information(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), torch.tensor([4.0, 1.0]))
    tensor(0.5966)
    """
    if mean.shape != teacher.shape or mean.ndim not in (2, 3, 4):
        raise ValueError(
            f"the prediction is {tuple(mean.shape)} and the teacher's layer {tuple(teacher.shape)}: expected equal "
            "shapes (B, C, H, W), (B, N, C) or (B, C)"
        )
    axis = 1 if mean.ndim == 4 else mean.ndim - 1
    if variance.shape != (mean.shape[axis],):
        raise ValueError(
            f"variance of shape {tuple(variance.shape)}: expected one for each of the {mean.shape[axis]} channels"
        )
    shape = [1] * mean.ndim
    shape[axis] = -1
    sigma2 = in_float32(variance).reshape(shape)
    return 0.5 * ((in_float32(teacher.detach()) - in_float32(mean)).square() / sigma2 + sigma2.log()).mean()


@method(
    section="2.2",
    role="losses",
    paper="Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer",
    year=2019,
    link="https://arxiv.org/abs/1904.05835",
    use="Several layers of unlike networks: a hint that learns which of the teacher's channels to give up.",
)
class VID(Loss):
    """Variational information distillation: the teacher's features under a Gaussian predicted from the student's.

    What is learned beside the student, made when binding: a regressor for each pair, which predicts the teacher's
    features, and a variance for each of the teacher's channels, σ² = softplus(α) + 10⁻⁵. A channel that cannot be
    predicted gets a large variance and so a small weight. For maps the regressor is three 1×1 convolutions without
    bias, as wide as the teacher's layer, with ReLU between; maps of different sizes meet at the smaller by average
    pooling. For sequences and vectors it is one linear layer, as the paper has it for logits.

    Args:
        taps: the layers, by default every matched stage; they are summed. ``("linear:input", "@logits")`` adds the
            paper's term that predicts the teacher's logits from the student's last features.
        variance: σ² before training; 5 by default, as in the CRD study.
        weight: 1 by default, as in the CRD study, which belongs to the mean over channels and positions.
        name: of the term.

    The paper's own schedules and regressors of each experiment were not at hand.

    Memory: linear in the features. See :func:`variational_information` for the formula.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 3)) for n in (4, 16))
    >>> vid = VID("0")
    >>> d = Distillation(student, teacher, losses=[vid]).bind(torch.ones(5, 8))
    >>> vid.regressors[0], vid.variances()[0].shape, round(vid.variances()[0][0].item(), 4)
    (Linear(in_features=4, out_features=16, bias=True), torch.Size([16]), 5.0)
    """

    default_reads = "stages"

    def __init__(self, *taps: Tap, variance: float = 5.0, weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        if not variance > FLOOR:
            raise ValueError(f"{self.name}: variance={variance}: expected a number above {FLOOR}")
        self.variance = variance
        self.regressors = nn.ModuleList()
        self.raw_variances = nn.ParameterList()

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        self.regressors, self.raw_variances = nn.ModuleList(), nn.ParameterList()
        start = self.variance - FLOOR
        raw = start + math.log(-math.expm1(-start))  # the inverse of softplus
        for s, t in self.tensors(student, teacher):
            if s.ndim == t.ndim == 3 and s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"{self.name}: the student has {s.shape[1]} tokens and the teacher {t.shape[1]} "
                    f"(shapes {tuple(s.shape)} and {tuple(t.shape)}); sequences need the same tokens"
                )
            if s.ndim == t.ndim == 4:
                wide = t.shape[1]
                layers: list[nn.Module] = [nn.Conv2d(s.shape[1], wide, 1, bias=False)]
                for _ in range(2):
                    layers += [nn.ReLU(), nn.Conv2d(wide, wide, 1, bias=False)]
                regressor: nn.Module = nn.Sequential(*layers)
            else:
                regressor = projector(s.shape, t.shape)
            self.regressors.append(regressor.to(s))
            channels = t.shape[1 if t.ndim == 4 else -1]
            self.raw_variances.append(nn.Parameter(torch.full((channels,), raw, dtype=s.dtype, device=s.device)))

    def variances(self) -> list[Tensor]:
        """σ² of each pair's channels."""
        return [F.softplus(raw) + FLOOR for raw in self.raw_variances]

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        losses = []
        for regressor, variance, (s, t) in zip(
            self.regressors, self.variances(), self.tensors(student, teacher), strict=True
        ):
            if s.ndim == 4:
                s, t = match_size(s, t)
            losses.append(variational_information(regressor(s), t, variance))
        return torch.stack(losses).sum()
