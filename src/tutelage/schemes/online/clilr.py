"""Collaborative learning: heads on shared layers, each taught by the consensus of the others."""

from __future__ import annotations

from tutelage.algorithms.multi_teacher.averaged_ensemble import average_logits
from tutelage.catalogue import method
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.schemes.online.cohort import PeerTeacher, group_record
from tutelage.teachers import Lesson
from tutelage.views import Batch


@method(
    section="3.2",
    role="teacher",
    paper="Song, Chai: Collaborative Learning for Deep Neural Networks",
    year=2018,
    link="https://arxiv.org/abs/1805.11761",
    needs=("labels",),
    use="One network's cost afterwards, and labels that may be noisy: heads that share layers agree on soft labels.",
)
class CLILR(PeerTeacher):
    """Each head of a network learns from the labels and from the mean of the other heads' logits.

    With H heads, head h learns from

        β · CE(z_h, y) + (1−β) · CE(softmax(q_h/T), softmax(z_h/T)),  q_h = 1/(H−1) · Σ_{j≠h} z_j, detached

    with β = 0.5 and T = 2. The student role is a cohort; as published one that shares its lower layers and takes there
    the mean of the heads' gradients and not their sum: :class:`tutelage.Branches` with ``rescale=True``, or with more
    than one level (hierarchical sharing) :class:`tutelage.BranchTree`. Networks that share nothing
    (:class:`tutelage.Cohort`) are the paper's "multiple instances".

    A head's target is a lesson, so any loss can stand where the soft term stands; at other addresses it is the mean of
    the other heads' tensors. Addresses are relative to a head.

    :meth:`losses` gives KD, whose gradient is the cross-entropy's times T², the weight (1−β)/T². Nothing was released
    by the authors. β, T, the mean of logits, the detached target and the rescaling at each fork agree with an
    independent implementation that comes near the paper's result; that the soft term has no T² rests on it alone.

    Song, Chai 2018, "Collaborative Learning for Deep Neural Networks", https://arxiv.org/abs/1805.11761

    >>> import torch
    >>> from tutelage import Branches, Distillation
    >>> from tutelage.models import SmallCNN
    >>> heads = Branches(SmallCNN(width=4), after="stage2", count=3, example=(1, 28, 28), rescale=True)
    >>> d = Distillation(heads, CLILR(), losses=CLILR().losses())
    >>> d((torch.rand(4, 1, 28, 28), torch.zeros(4).long())).weights
    {'TaskLoss': 0.5, 'KD': 0.125}
    """

    def losses(self, temperature: float = 2.0, beta: float = 0.5) -> list[Loss]:
        """The published terms.

        Args:
            temperature: T.
            beta: β, what the labels weigh, between 0 and 1.

        Raises:
            ValueError: β outside its range.
        """
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"CLILR: beta={beta}: expected 0 <= beta <= 1")
        return [TaskLoss(weight=beta), KD(temperature=temperature, weight=(1 - beta) / temperature**2)]

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        peers = self.records(student)
        others = [[peer for j, peer in enumerate(peers) if j != i] for i in range(len(peers))]
        return [
            Lesson(mine, self._consensus(theirs), key=f"{i}_from_others")
            for i, (mine, theirs) in enumerate(zip(peers, others, strict=True))
        ]

    def _consensus(self, others: list[Record]) -> Record:
        partial = others[0].output is None
        return group_record(others, None if partial else average_logits([peer.logits for peer in others]))
