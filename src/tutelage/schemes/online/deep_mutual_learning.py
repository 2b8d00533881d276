"""Deep mutual learning: untrained peers teach each other while they learn."""

from __future__ import annotations

from typing import Literal

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
    paper="Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning",
    year=2018,
    link="https://arxiv.org/abs/1706.00384",
    needs=("labels", "other models"),
    use="No trained teacher: several networks, of any architectures, learn from the labels and from each other.",
)
class DeepMutualLearning(PeerTeacher):
    """Peers that teach each other: each one's target is what every other says now.

    With N peers, peer i learns from CE(z_i, y) + 1/(N−1) · Σ_{j≠i} KL(softmax(z_j) ‖ softmax(z_i)). Every ordered
    pair is a lesson of weight 1/(N−1), so any loss can stand where KL stands, and the labels count once for each peer.
    With ``target="ensemble"`` (DML_e in the paper) peer i learns from the mean of the others' probabilities instead:
    KL(1/(N−1) · Σ_{j≠i} softmax(z_j) ‖ softmax(z_i)), and from the mean of their features. Each peer runs once per
    batch; what it says to others is detached.

    The student role must be a :class:`tutelage.Cohort`. The losses' addresses are relative to a peer: ``"layer2"``
    reads ``peers.0.layer2``, ``peers.1.layer2`` and so on, so it must exist in every peer; ``"@field"`` reads every
    peer's output. What a loss owns (a projector, a memory) it owns for each pair, so peers may differ in their shapes.

    The authors update one peer after another within a batch (their Algorithm 1); here all learn from the same
    predictions in one step, which is symmetric and costs N forward passes.

    Args:
        target: ``"each"`` of the others, or their ``"ensemble"``.

    Memory: that of the losses, N·(N−1) times (N times with ``"ensemble"``).

    Zhang, Xiang, Hospedales, Lu 2018, "Deep Mutual Learning", https://arxiv.org/abs/1706.00384

    >>> import torch
    >>> from torch import nn
    >>> from tutelage import Cohort, Distillation
    >>> cohort, teacher = Cohort([nn.Linear(8, 3), nn.Linear(8, 3)]), DeepMutualLearning()
    >>> losses = Distillation(cohort, teacher, losses=teacher.losses())((torch.ones(4, 8), torch.zeros(4).long()))
    >>> sorted(losses.values)
    ['KD', 'TaskLoss']
    """

    def __init__(self, target: Literal["each", "ensemble"] = "each") -> None:
        super().__init__()
        if target not in ("each", "ensemble"):
            raise ValueError(f"DeepMutualLearning: target={target!r}: expected 'each' or 'ensemble'")
        self.target = target

    def losses(self) -> list[Loss]:
        """The published ones: cross-entropy and KL at temperature 1, both of weight 1."""
        return [TaskLoss(), KD(temperature=1.0, weight=1.0)]

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        peers = self.records(student)
        said = [peer.detach() for peer in peers]
        if self.target == "ensemble":
            others = [[target for j, target in enumerate(said) if j != i] for i in range(len(peers))]
            return [
                Lesson(mine, self._together(theirs), key=f"{i}_from_others")
                for i, (mine, theirs) in enumerate(zip(peers, others, strict=True))
            ]
        return [
            Lesson(mine, target, 1 / (len(peers) - 1), key=f"{i}_from_{j}")
            for i, mine in enumerate(peers)
            for j, target in enumerate(said)
            if i != j
        ]

    def _together(self, others: list[Record]) -> Record:
        if others[0].output is None:
            return group_record(others, None)
        return group_record(others, average_logits([peer.logits for peer in others], average="probabilities"))
