"""Progressive self-knowledge distillation: the labels are softened by what the student said in the epoch before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss
from tutelage.knowledge.relation.memories import demand, gathered, process_count
from tutelage.knowledge.response.rows import check_target, target_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import UNLABELLED, Batch


def progressive_self(logits: Tensor, past: Tensor, target: Tensor, alpha: float) -> Tensor:
    """CE((1 − α)·y + α·p, softmax(z)), mean over the samples that have a label; p is what was said of them before.

    Args:
        logits: z, (B, C).
        past: p, probabilities (B, C); no gradient flows to them. A row of zeros, of a sample not seen yet, counts as y.
        target: (B,) class numbers, -100 where there is no label.
        alpha: α, from 0 to 1.

    Returns:
        A scalar ≥ 0 in nats; 0, with a gradient of 0, if no sample has a label.

    Raises:
        ValueError: shapes that do not fit, or ``alpha`` out of range.

    Kim, Ji, Yoon, Hwang 2021, "Self-Knowledge Distillation with Progressive Refinement of Targets",
    https://arxiv.org/abs/2006.12000

    >>> z, y = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> progressive_self(z, torch.tensor([[0.5, 0.5]]), y, alpha=0.5)  # 0.1269 + 0.25 · 2
    tensor(0.6269)
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}: expected a number from 0 to 1")
    if past.shape != logits.shape or logits.ndim != 2:
        raise ValueError(f"logits {tuple(logits.shape)} and past {tuple(past.shape)}: expected both to be (B, C)")
    rows, labels = target_rows(logits, target)
    past = past.detach()[target != UNLABELLED].to(rows)
    truth = F.one_hot(labels, rows.shape[1]).to(rows)
    seen = past.sum(1, keepdim=True) > 0
    soft = torch.where(seen, (1 - alpha) * truth + alpha * past, truth)
    return -(soft * rows.log_softmax(1)).sum() / max(len(rows), 1)


@method(
    section="3.3+",
    role="losses",
    paper="Kim, Ji, Yoon, Hwang: Self-Knowledge Distillation with Progressive Refinement of Targets",
    year=2021,
    link="https://arxiv.org/abs/2006.12000",
    needs=("extra memory",),
    use="No teacher, in place of the loss on labels: long trainings whose network becomes too sure of itself.",
)
class ProgressiveSelf(Loss):
    """PS-KD: cross-entropy with labels that the student's own predictions of the epoch before soften more and more.

    The target of a sample is (1 − α)·y + α·p, where p is what the student said when it saw it last, and
    α = α_T · progress grows to ``alpha`` over the training; in the first epoch it is y alone. The paper's α grows once
    an epoch (α_T · t/T in epoch t of T), here with every step. It stands in the place of ``TaskLoss``.

    The formula and α_T = 0.8 are given from memory; neither the paper's text nor the authors' code was at hand.

    What was said is remembered by sample id, so the data set must give ids (:class:`tutelage.data.Indexed`). It is a
    buffer, saved with the run, and several processes remember alike.

    Args:
        alpha: α_T, from 0 to 1; 0.8, the authors'.
        weight: 1, as the only term.
        name: of the term.

    Raises:
        ValueError: ``alpha`` out of range, ids outside the training set, or logits that are not (B, C).

    Memory: (samples of the training set) × C numbers of float32.

    Kim, Ji, Yoon, Hwang 2021, "Self-Knowledge Distillation with Progressive Refinement of Targets",
    https://arxiv.org/abs/2006.12000

    >>> from torch import nn
    >>> from tutelage import Distillation
    >>> batch = torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    >>> d = Distillation(nn.Linear(8, 3), None, losses=[ProgressiveSelf()]).bind(batch, population=4)
    >>> d(batch).total.backward()
    >>> bool(torch.isclose(d.losses["ProgressiveSelf"].past.sum(), torch.tensor(4.0)))  # a prediction of each sample
    True
    """

    needs_teacher = False
    needs_labels = True
    needs_ids = True
    past: Tensor

    def __init__(self, alpha: float = 0.8, *, weight: Weight = 1.0, name: str | None = None):
        super().__init__(weight=weight, name=name)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"{self.name}: alpha={alpha}: expected a number from 0 to 1")
        self.alpha = alpha

    def build(self, student: Record, teacher: Record | None, batch: Batch) -> None:
        if student.logits.ndim != 2:
            raise ValueError(f"{self.name}: the logits are {tuple(student.logits.shape)}; expected (B, C) of samples")
        if batch.population is None:
            raise ValueError(
                f"{self.name}: remembers every training sample, and their number is not known: give population= when "
                "binding"
            )
        self.register_buffer("past", student.logits.new_zeros(batch.population, student.logits.shape[1]))

    def check(self, student: Record, teacher: Record | None, batch: Batch) -> None:
        check_target(self.name, student.logits, batch.labels)

    def forward(self, student: Record, teacher: Record | None, batch: Batch) -> Tensor:
        ids, labels, logits = batch.ids, batch.labels, student.logits
        assert ids is not None, "binding has checked it"
        assert labels is not None, "binding has checked it"
        demand(
            ((ids >= 0) & (ids < len(self.past))).all(),
            f"{self.name}: a sample id is not in 0..{len(self.past) - 1}: ids number the samples of the training set",
        )
        past = self.past[ids]
        if self.training and torch.is_grad_enabled():
            said = logits.detach().softmax(1)
            if process_count() > 1:
                said, _, numbers, _ = gathered(said, said[:, :0], ids.unsqueeze(1), said.new_zeros(1))
                ids = numbers[:, 0]
            self.past.index_copy_(0, ids, said)
        return progressive_self(logits, past, labels, self.alpha * batch.progress)

    def units(self, batch: Batch) -> Tensor | int:
        assert batch.labels is not None, "binding has checked it"
        return (batch.labels != UNLABELLED).sum()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, weight={self.weight}"
