"""Total variation distance: how much probability teacher and student put in different places."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.catalogue import method
from tutelage.knowledge.base import Tap
from tutelage.knowledge.response.rows import TokenResponse, compared_rows, positive
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def total_variation(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """½ · Σ_c |p_c − q_c|, mean over the positions that count; p = softmax(z_t / T), q = softmax(z_s / T).

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W).
        teacher: logits of the same shape; no gradient flows to them.
        mask: booleans of the logits' shape without classes; positions that are False (padding, prompts) do not count.
            If none counts, the value is 0, with a gradient of 0.
        temperature: T > 0.

    Returns:
        A scalar from 0, for equal predictions, to 1, for disjoint ones.

    Raises:
        ValueError: ``temperature`` is not positive, or the shapes differ.

    Memory: about three times the logits that count, in float32.

    Wen, Li, Du, Mou 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    https://arxiv.org/abs/2307.15190

    >>> total_variation(torch.tensor([[0.0, 0.0]]), torch.tensor([[100.0, 0.0]]))
    tensor(0.5000)
    """
    positive("temperature", temperature)
    rows_s, rows_t = compared_rows(student, teacher, mask)
    q, p = (rows_s / temperature).softmax(1), (rows_t / temperature).softmax(1)
    return (p - q).abs().sum() / (2 * max(len(rows_s), 1))


@method(
    section="2.1+",
    role="losses",
    paper="Wen, Li, Du, Mou: f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    year=2023,
    link="https://arxiv.org/abs/2307.15190",
    use="Language models with noisy teachers: symmetric and bounded, and rare words weigh no more than their mass.",
)
class TotalVariation(TokenResponse):
    """Total variation distance of the predictions.

    Of sequences (logits (B, T, C), labels (B, T)) the tokens labelled -100 (padding, prompts) do not count. It is the
    distance of each step's distributions; the paper's sampling of sequences is not part of it.

    Args:
        taps: which logits, by default the models' own.
        temperature: T of both.
        weight: 1, as the only term.
        name: of the term.

    Memory: about three times the logits that count. See :func:`total_variation` for the formula.

    >>> TotalVariation()
    TotalVariation(logits, weight=1.0, temperature=1.0)
    """

    def __init__(self, *taps: Tap, temperature: float = 1.0, weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        positive(f"{self.name}: temperature", temperature)
        self.temperature = temperature

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        terms = [
            total_variation(s, t, self.counted(s, batch), self.temperature) for s, t in self.tensors(student, teacher)
        ]
        return torch.stack(terms).mean()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"
