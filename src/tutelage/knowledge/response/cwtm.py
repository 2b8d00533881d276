"""CWTM: the labels, and of the teacher only how sure it is of each sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.knowledge.base import Tap
from tutelage.knowledge.response.rows import LabelledResponse, labelled_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def confidence_weighted(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Σ_s w_s · CE(z_s, y_s) with w_s = max_i p_i,s / Σ_u max_i p_i,u and p = softmax(z_t): a weighted mean.

    A sample counts by the probability of the teacher's first choice, whether that is right or wrong. A teacher that is
    equally sure of all gives the cross-entropy.

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W).
        teacher: logits of the same shape; no gradient flows to them.
        target: the true classes (B), (B, T) or (B, H, W); positions labelled -100 have no weight. If none counts, the
            value is 0, with a gradient of 0.

    Returns:
        A scalar ≥ 0 in nats.

    Raises:
        ValueError: the shapes do not fit.

    Furlanello, Lipton, Tschannen, Itti, Anandkumar 2018, "Born-Again Neural Networks", equation 10,
    https://arxiv.org/abs/1805.04770

    >>> student, teacher = torch.tensor([[0.0, 0.0], [0.0, 1.0986]]), torch.tensor([[0.0, 0.0], [500.0, 0.0]])
    >>> confidence_weighted(student, teacher, torch.tensor([0, 0]))  # (0.5 · log 2 + 1 · log 4) / 1.5
    tensor(1.1552)
    """
    rows_s, rows_t, labels = labelled_rows(student, teacher, target)
    if not len(labels):
        return rows_s.sum()
    confidence = rows_t.softmax(1).amax(1)
    return (confidence * F.cross_entropy(rows_s, labels, reduction="none")).sum() / confidence.sum()


class CWTM(LabelledResponse):
    """Confidence weighted by teacher max: cross-entropy in which a sample counts by how sure the teacher is of it.

    Furlanello et al.'s question to :func:`tutelage.born_again` networks: is it the dark knowledge that helps, or only
    these weights? It replaces both ``TaskLoss`` and ``KD``. The weights' sum is that of the batch, and of each part of
    it where a step is made of several batches or processes.

    Args:
        taps: which logits, by default the models' own.
        weight: 1, as the only term.
        name: of the term.

    Memory: linear in the logits. See :func:`confidence_weighted` for the formula.

    >>> CWTM()
    CWTM(logits, weight=1.0)
    """

    separable = False  # a sample's weight is a share of the batch's

    def __init__(self, *taps: Tap, weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        assert batch.labels is not None, "binding has checked it"
        terms = [confidence_weighted(s, t, batch.labels) for s, t in self.tensors(student, teacher)]
        return torch.stack(terms).mean()
