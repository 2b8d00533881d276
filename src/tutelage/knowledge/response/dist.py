"""DIST: the student keeps the teacher's order and proportions of predictions, not their exact sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.catalogue import method
from tutelage.knowledge.base import Tap, classes_last
from tutelage.knowledge.response.rows import TokenResponse, compared_rows, positive, z_directions
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def dist(
    student: Tensor,
    teacher: Tensor,
    beta: float = 2.0,
    gamma: float = 2.0,
    temperature: float = 4.0,
    mask: Tensor | None = None,
) -> Tensor:
    """T² · (β · inter + γ · intra), of one minus Pearson correlations of the predictions softmax(z / T).

    Inter compares the two models' rows (a sample's probabilities over the classes), intra their columns (a class's
    probabilities over the samples); each is the mean of 1 − correlation.

    Two rows or columns of which one is constant correlate with 0; two constant ones are alike and cost 0. So a single
    sample, whose columns have one number, has no intra term. The authors add 1e-8 to the product of the norms, which
    damps the columns of classes that are improbable everywhere; here they count as the others do.

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W); positions are samples here.
        teacher: logits of the same shape; no gradient flows to them.
        beta: weight of the inter-class term.
        gamma: weight of the intra-class term.
        temperature: T > 0.
        mask: booleans of the logits' shape without classes; positions that are False do not count. If none counts,
            the value is 0, with a gradient of 0.

    Returns:
        A scalar between 0 and 2 · T² · (β + γ); 0 for equal logits, and the most for opposite predictions.

    Raises:
        ValueError: ``temperature`` is not positive, or the shapes differ.

    Huang, You, Wang, Qian, Xu 2022, "Knowledge Distillation from A Stronger Teacher",
    https://arxiv.org/abs/2205.10536

    >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> costs = dist(2 * logits, logits, temperature=1.0), dist(-logits, logits, temperature=1.0)
    >>> [round(cost.item(), 4) + 0.0 for cost in costs]
    [0.0, 8.0]
    """
    positive("temperature", temperature)
    rows_s, rows_t = compared_rows(student, teacher, mask)
    if not len(rows_s):
        return rows_s.sum() * 0.0
    p_s, p_t = (rows_s / temperature).softmax(1), (rows_t / temperature).softmax(1)
    inter, intra = _one_minus_pearson(p_s, p_t), _one_minus_pearson(p_s.T, p_t.T)
    return (beta * inter + gamma * intra) * temperature**2


def _one_minus_pearson(student: Tensor, teacher: Tensor) -> Tensor:
    u_s, u_t = z_directions(student), z_directions(teacher)
    # Half the squared distance of the unit vectors: no cancellation near 0, and never below it.
    cost = (u_s - u_t).square().sum(1) / 2
    one_is_constant = (u_s.detach() == 0).all(1) ^ (u_t == 0).all(1)
    return torch.where(one_is_constant, torch.ones_like(cost), cost).mean()


@method(
    section="2.1+",
    role="losses",
    paper="Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher",
    year=2022,
    link="https://arxiv.org/abs/2205.10536",
    use="A teacher far stronger than the student, and batches that are not small: relations are matched, not values.",
)
class DIST(TokenResponse):
    """DIST: Pearson correlation of the predictions, over classes and over the batch.

    Of sequences (logits (B, T, C), labels (B, T)) the tokens labelled -100 (padding, prompts) do not count.

    Args:
        taps: which logits, by default the models' own.
        beta: weight of the inter-class term.
        gamma: weight of the intra-class term.
        temperature: T.
        weight: 1, beside ``TaskLoss(weight=1)``. With β = γ = 2 and T = 4 it is the setting of the authors' CIFAR-100
            runs, T² included; on ImageNet they use T = 1.
        name: of the term.

    Raises:
        ValueError: the first batch holds a single sample or position, which leaves nothing to compare over.

    Memory: linear in the logits. See :func:`dist` for the formula. Values and gradients were compared with the
    authors' code, on predictions that their 1e-8 does not damp.

    >>> DIST()
    DIST(logits, weight=1.0, beta=2.0, gamma=2.0, temperature=4.0)
    """

    separable = False  # each class is compared over the whole batch

    def __init__(
        self,
        *taps: Tap,
        beta: float = 2.0,
        gamma: float = 2.0,
        temperature: float = 4.0,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        positive(f"{self.name}: temperature", temperature)
        if not (beta >= 0 and gamma >= 0 and beta + gamma > 0):
            raise ValueError(f"{self.name}: beta={beta}, gamma={gamma}: expected two weights >= 0, not both 0")
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        super().check(student, teacher, batch)
        for s, _ in self.tensors(student, teacher):
            if self.gamma and len(classes_last(s)) < 2:
                raise ValueError(
                    f"{self.name}: the first batch has one prediction, and the intra-class term compares several; "
                    "expected a larger batch, or gamma=0"
                )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        terms = [
            dist(s, t, self.beta, self.gamma, self.temperature, self.counted(s, batch))
            for s, t in self.tensors(student, teacher)
        ]
        return torch.stack(terms).mean()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}"
