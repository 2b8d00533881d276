"""Feature-normalised distillation: soft targets whose temperature is the length of the sample's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Tap, class_axis, classes_last
from tutelage.knowledge.response.rows import TokenResponse, compared_rows, positive
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch


def norm_temperature(features: Tensor, tau: float = 2.0) -> Tensor:
    """T = max(1, ‖f‖ / τ), one for each sample or position: dividing logits by it cuts the features' length to τ.

    Features shorter than τ keep their length, as in the authors' code.

    Args:
        features: of the penultimate layer, (B, D), (B, N, D) or (B, D, H, W).
        tau: τ > 0.

    Returns:
        (N, 1), rows as in :func:`tutelage.knowledge.base.classes_last`.

    >>> norm_temperature(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), tau=2.0)
    tensor([[2.5000],
            [1.0000],
            [1.0000]])
    """
    return (torch.linalg.vector_norm(classes_last(in_float32(features)), dim=1, keepdim=True) / tau).clamp(min=1)


def feature_normalized_kd(
    student: Tensor,
    teacher: Tensor,
    student_features: Tensor,
    teacher_features: Tensor,
    tau: float = 2.0,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(softmax(z_t / T_t) ‖ softmax(z_s / T_s)), mean over samples and positions, with T = max(1, ‖f‖ / τ).

    Each network's temperatures come from its own features of the same sample, and the student's gradient flows
    through its features' length too; both as in the authors' code. A long feature means that the network is sure of
    a one-hot label, and is softened most. There is no T²; the paper's λ² before this term stands for it. The paper's
    cross-entropy is this divergence plus the teacher's entropy, which is constant.

    Where the authors' code and the paper's formula, τ·z / ‖f‖, differ, this follows the formula in that a bias of the
    classifier is divided too, and the code in that T is never below 1.

    Args:
        student: logits (B, C), (B, N, C) or (B, C, H, W).
        teacher: logits of the same shape; no gradient flows to them.
        student_features: what the student's classifier reads: (B, D), (B, N, D) or (B, D, H, W).
        teacher_features: likewise, of any width; no gradient flows to them.
        tau: τ, the length that features are cut to.
        mask: booleans of the logits' shape without classes; positions that are False do not count.

    Returns:
        A scalar in nats, ≥ 0, and 0 for logits that are equal after they are divided.

    Raises:
        ValueError: ``tau`` is not positive, the logits' shapes differ, or features are not one vector for each row of
            logits.

    Memory: linear in the logits and features.

    Xu, Rui, Li, Gu 2020, "Feature Normalized Knowledge Distillation for Image Classification",
    https://link.springer.com/chapter/10.1007/978-3-030-58595-2_40

    >>> logits, features = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    >>> feature_normalized_kd(2 * logits, logits, 2 * features, features)  # what is longer in both is equal
    tensor(0.)
    """
    positive("tau", tau)
    rows = compared_rows(student, teacher, mask)
    positions = student.numel() // student.shape[class_axis(student)]
    softened = []
    for logits, side, features in zip(rows, ("student", "teacher"), (student_features, teacher_features), strict=True):
        if features.ndim < 2 or features.numel() != positions * features.shape[class_axis(features)]:
            raise ValueError(
                f"features of shape {tuple(features.shape)} ({side}) beside logits of shape {tuple(student.shape)}: "
                "expected one vector for each row of logits, which is what the classifier reads"
            )
        temperatures = norm_temperature(features if side == "student" else features.detach(), tau)
        softened.append(logits / (temperatures if mask is None else temperatures[mask.reshape(-1)]))
    log_q, log_p = (F.log_softmax(z, dim=1) for z in softened)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(len(log_q), 1)


@method(
    section="2.2",
    role="losses",
    paper="Xu, Rui, Li, Gu: Feature Normalized Knowledge Distillation for Image Classification",
    year=2020,
    link="https://link.springer.com/chapter/10.1007/978-3-030-58595-2_40",
    use="Classes that look alike: soft targets that are softest where the networks are most sure of one class.",
)
class FeatureNorm(TokenResponse):
    """Feature-normalised distillation: KL of logits divided by the length of each sample's own features.

    Of sequences (logits (B, T, C), labels (B, T)) the tokens labelled -100 (padding, prompts) do not count.

    Args:
        taps: the penultimate features, one pair; by default what the last linear layer reads. The logits are always
            the models' own.
        tau: τ, the length that features are cut to; 2 by default, the authors' for CIFAR-100.
        weight: 9 by default, the authors' λ² for ResNet-56 and ResNet-20 on CIFAR-100, which goes with τ = 2 and
            ``TaskLoss()`` with weight 1. It should be about (mean ‖f‖ / τ)², which keeps both gradients equally large.
        name: of the term.

    The paper's text was read in two summaries and its formulas compared with the authors' code, which was not run.

    Memory: linear in the logits and features. See :func:`feature_normalized_kd` for the formula.

    >>> FeatureNorm(tau=3.0)
    FeatureNorm(embedding, weight=9.0, tau=3.0)
    """

    separable = False  # it reads features as well

    default_reads = "embedding"

    def __init__(self, *taps: Tap, tau: float = 2.0, weight: Weight = 9.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        positive(f"{self.name}: tau", tau)
        self.tau = tau

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        chosen = super().resolve(student, teacher, batch)
        self.pairs = [*self.pairs, ("@logits", "@logits")]
        return chosen

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        if len(self.pairs) != 2:
            raise ValueError(f"{self.name}: reads one pair of penultimate features, not {len(self.pairs) - 1}")
        s, t = self.tensors(student, teacher)[1]
        if s.shape != t.shape:
            raise ValueError(
                f"{self.name}: the student's logits are {tuple(s.shape)} ({s.shape[class_axis(s)]} classes) and the "
                f"teacher's {tuple(t.shape)} ({t.shape[class_axis(t)]}); soft targets need the same classes"
            )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        features, logits = self.tensors(student, teacher)
        return feature_normalized_kd(*logits, *features, self.tau, self.counted(logits[0], batch))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau}"
