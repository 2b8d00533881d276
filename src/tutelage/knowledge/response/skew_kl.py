"""Skew KL divergence: the KL to a mixture that holds a little of the first distribution, so that it is bounded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.catalogue import method
from tutelage.knowledge.base import Tap
from tutelage.knowledge.response.rows import TokenResponse, compared_rows, positive
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def skew_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    alpha: float = 0.1,
    reverse: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """KL(p ‖ α·p + (1 − α)·q), or reversed KL(q ‖ α·q + (1 − α)·p), mean over the positions that count.

    p = softmax(z_t / T), q = softmax(z_s / T). At α = 0 it is the KL divergence itself; otherwise at most log 1/α.
    There is no T².

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W).
        teacher: logits of the same shape; no gradient flows to them.
        mask: booleans of the logits' shape without classes; positions that are False (padding, prompts) do not count.
            If none counts, the value is 0, with a gradient of 0.
        alpha: α, 0 ≤ α < 1.
        reverse: the student's distribution first.
        temperature: T > 0.

    Returns:
        A scalar ≥ 0 in nats, and 0 for equal logits.

    Raises:
        ValueError: ``alpha`` or ``temperature`` outside its range, or the shapes differ.

    Memory: about five times the logits that count, in float32.

    Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models",
    https://arxiv.org/abs/2402.03898

    >>> student, teacher = torch.tensor([[-500.0, 0.0]]), torch.tensor([[0.0, -500.0]])
    >>> [round(skew_kl(student, teacher, alpha=a).item(), 3) for a in (0.0, 0.1)]  # the second is log 10
    [500.0, 2.303]
    """
    _check_skew(alpha, temperature)
    rows_s, rows_t = compared_rows(student, teacher, mask)
    log_q, log_p = (rows_s / temperature).log_softmax(1), (rows_t / temperature).log_softmax(1)
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    mixed = torch.logaddexp(first + math.log(alpha), second + math.log1p(-alpha)) if alpha else second
    divergence = F.kl_div(mixed, first, reduction="none", log_target=True).sum(1)
    # Equal predictions may give -1e-8 by rounding.
    return divergence.clamp(min=0).sum() / max(len(rows_s), 1)


def _check_skew(alpha: float, temperature: float, name: str = "") -> None:
    positive(f"{name}temperature", temperature)
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"{name}alpha={alpha}: expected 0 <= alpha < 1")


@method(
    section="2.1+",
    role="losses",
    paper="Ko, Kim, Chen, Yun: DistiLLM: Towards Streamlined Distillation for Large Language Models",
    year=2024,
    link="https://arxiv.org/abs/2402.03898",
    use="Language models whose student says what the teacher never would: gradients stay small where KL explodes.",
)
class SkewKL(TokenResponse):
    """Skew KL divergence: KL to a mixture with a share α of the first distribution, forward or reversed.

    Of sequences (logits (B, T, C), labels (B, T)) the tokens labelled -100 (padding, prompts) do not count. The
    paper's sampling of the student's own sequences is not part of the divergence.

    Args:
        taps: which logits, by default the models' own.
        alpha: α; 0.1, the paper's.
        reverse: the student's distribution first (the paper's SRKL).
        temperature: T of both.
        weight: 1, as the only term.
        name: of the term.

    Memory: about five times the logits that count. See :func:`skew_kl` for the formula.

    >>> SkewKL(reverse=True)
    SkewKL(logits, weight=1.0, alpha=0.1, reverse=True, temperature=1.0)
    """

    def __init__(
        self,
        *taps: Tap,
        alpha: float = 0.1,
        reverse: bool = False,
        temperature: float = 1.0,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        _check_skew(alpha, temperature, f"{self.name}: ")
        self.alpha, self.reverse, self.temperature = alpha, reverse, temperature

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        terms = [
            skew_kl(s, t, self.counted(s, batch), self.alpha, self.reverse, self.temperature)
            for s, t in self.tensors(student, teacher)
        ]
        return torch.stack(terms).mean()

    def extra_repr(self) -> str:
        about = f"alpha={self.alpha}, reverse={self.reverse}, temperature={self.temperature}"
        return f"{super().extra_repr()}, {about}"
