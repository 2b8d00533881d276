"""DKPP: the teacher's probabilities, of which all but the first choice's are given to random classes."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.knowledge.base import Tap
from tutelage.knowledge.response.kd import kd_divergence
from tutelage.knowledge.response.rows import TokenResponse, compared_rows, positive
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def permuted_prediction(rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each row with its greatest number where it is and all the others in a random order, another one for each row.

    Args:
        rows: (N, C) logits or probabilities.
        generator: of the random numbers, on the rows' device; by default torch's global one.

    Furlanello, Lipton, Tschannen, Itti, Anandkumar 2018, "Born-Again Neural Networks", equation 11,
    https://arxiv.org/abs/1805.04770

    >>> said = torch.arange(6.0).roll(2)[None]
    >>> permuted = permuted_prediction(said, torch.Generator().manual_seed(0))
    >>> permuted.argmax() == said.argmax(), (permuted.sort().values == said.sort().values).all()
    (tensor(True), tensor(True))
    """
    top = rows.argmax(1, keepdim=True)
    order = torch.rand(rows.shape, generator=generator, device=rows.device)
    # where the k-th smallest random number is, the k-th other class goes; the greatest is last in both orders
    places = order.scatter(1, top, 2.0).argsort(1)
    classes = torch.zeros_like(order).scatter(1, top, 1.0).argsort(dim=1, stable=True)
    return torch.empty_like(rows).scatter(1, places, rows.gather(1, classes))


def permuted_kd(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T² · KL(φ(softmax(z_t / T)) ‖ softmax(z_s / T)), where φ is :func:`permuted_prediction`; mean over samples.

    Each call permutes anew. Its gradient is that of the cross-entropy with φ(p_t), whose entropy does not depend on φ.

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W).
        teacher: logits of the same shape; no gradient flows to them.
        temperature: T > 0.
        mask: booleans of the logits' shape without classes; positions that are False (padding) do not count.

    Returns:
        A scalar in nats · T², ≥ 0.

    Raises:
        ValueError: ``temperature`` is not positive, or the shapes differ.

    >>> teacher = torch.tensor([[2.0, 0.0, 0.0]])  # equal others: no permutation changes it
    >>> permuted_kd(teacher, teacher), permuted_kd(torch.zeros(1, 3), teacher)
    (tensor(0.), tensor(0.4330))
    """
    rows_s, rows_t = compared_rows(student, teacher, mask)
    return kd_divergence(rows_s, permuted_prediction(rows_t), temperature)


class DKPP(TokenResponse):
    """Dark knowledge with permuted predictions: soft targets that no longer say which classes are like which.

    Furlanello et al.'s question to :func:`tutelage.born_again` networks: what of the gain is left if the teacher's
    probabilities keep their sizes but lose their classes? It replaces ``KD``, as the only term. The permutations are
    drawn for each sample at every step, from torch's global generator, so a run's seed fixes them.

    Args:
        taps: which logits, by default the models' own.
        temperature: T; 1, as published.
        weight: 1, as the only term.
        name: of the term.

    Raises:
        ValueError: a temperature that is not positive.

    Memory: linear in the logits. See :func:`permuted_kd` for the formula.

    >>> DKPP()
    DKPP(logits, weight=1.0, temperature=1.0)
    """

    def __init__(self, *taps: Tap, temperature: float = 1.0, weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        positive(f"{self.name}: temperature", temperature)
        self.temperature = temperature

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        terms = [permuted_kd(s, t, self.temperature, self.counted(s, batch)) for s, t in self.tensors(student, teacher)]
        return torch.stack(terms).mean()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"
