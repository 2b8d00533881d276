"""OKDDip: auxiliary peers with targets of their own, and a leader who learns from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.algorithms.multi_teacher.averaged_ensemble import AveragedEnsemble
from tutelage.catalogue import method
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record, in_float32, logits_of
from tutelage.schedule import RampUp, Weight
from tutelage.schemes.online.cohort import Cohort, CohortOutput, PeerTeacher, group_record
from tutelage.schemes.online.headed import HeadedCohort
from tutelage.taps import embedding
from tutelage.teachers import Lesson
from tutelage.views import Batch, Inputs


def peer_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """α_ab = exp(⟨q_a, k_b⟩) / Σ_f exp(⟨q_a, k_f⟩): how much peer a listens to peer b, for each sample.

    Args:
        queries: (B, M, D) of M peers.
        keys: (B, M, D).

    Returns:
        (B, M, M), rows of sum 1; not symmetric.

    >>> peer_attention(torch.zeros(1, 2, 4), torch.ones(1, 2, 4))
    tensor([[[0.5000, 0.5000],
             [0.5000, 0.5000]]])
    """
    return (in_float32(queries) @ in_float32(keys).transpose(1, 2)).softmax(dim=2)


def attended_divergence(student: Tensor, target: Tensor, temperature: float = 3.0) -> Tensor:
    """T² · KL(softmax(z_t/T) ‖ softmax(z_s/T)), mean over samples; the gradient flows to *both*.

    Args:
        student: logits (B, K).
        target: logits of the same shape; what they were made of learns too.
        temperature: T > 0.

    Raises:
        ValueError: the shapes differ, or ``temperature`` is not positive.

    >>> z, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]], requires_grad=True)
    >>> attended_divergence(z, t, temperature=1.0).backward()
    >>> t.grad.abs().sum() > 0
    tensor(True)
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected a positive number")
    if student.shape != target.shape:
        raise ValueError(f"logits differ in shape: student {tuple(student.shape)}, target {tuple(target.shape)}")
    log_q = F.log_softmax(in_float32(student) / temperature, dim=1)
    log_p = F.log_softmax(in_float32(target) / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(len(student), 1) * temperature**2


@dataclass
class DiverseOutput(CohortOutput):
    """What a leader and its auxiliary peers say; ``logits`` are the leader's.

    Args:
        peers: the leader's output, then the auxiliary peers'.
        attention: (B, M, M) of the M auxiliary peers.
        targets: (B, M, K), the logits that each of them shall learn from.
        mean: (B, K), the logits that the leader shall learn from.
    """

    attention: Tensor
    targets: Tensor
    mean: Tensor


class DiversePeers(HeadedCohort):
    """A leader, auxiliary peers and the attention between these, as the student role of :class:`tutelage.OKDDip`.

    Peer 0 is the leader: the one that is kept, evaluated and exported. Each auxiliary peer's embedding h goes through
    two linear layers without bias, L and E, which all share; α_ab = softmax_b(⟨L·h_a, E·h_b⟩), where b may be a itself,
    and the target of peer a is Σ_b α_ab · z_b. It may be made of networks (:class:`tutelage.Cohort`) or of branches of
    one (:class:`tutelage.Branches`): the paper's two variants.

    Args:
        cohort: the leader first, then two or more auxiliary peers with embeddings of one width.
        example: a few inputs, or the shape of one input without the batch axis.
        at: the address of the embedding (B, D); by default what the last linear layer reads.
        reduction: L and E have D/reduction outputs.
        detach: let the peers get no gradient as parts of targets, only L and E. In the authors' code they get it,
            through their logits, through their embeddings, and as parts of the leader's target.

    Raises:
        ValueError: fewer than two auxiliary peers, or embeddings that cannot be compared.

    Memory: that of all peers, and 2·D²/reduction weights.

    >>> output = DiversePeers(Cohort([nn.Linear(4, 3) for _ in range(4)]), example=(4,), at=":input")(torch.ones(2, 4))
    >>> output.logits.shape, output.attention.shape, output.targets.shape
    (torch.Size([2, 3]), torch.Size([2, 3, 3]), torch.Size([2, 3, 3]))
    """

    def __init__(
        self,
        cohort: Cohort,
        example: Tensor | Mapping[str, Any] | Sequence[int],
        at: str | Sequence[str] | None = None,
        reduction: int = 8,
        detach: bool = False,
    ):
        super().__init__(cohort, example, at, embedding)
        if len(self.peers) < 3:
            raise ValueError(f"cohort: expected a leader and at least 2 auxiliary peers, got {len(self.peers)} peers")
        shapes = self.shapes[1:]
        if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"cohort: the auxiliary peers' embeddings are {shapes}; expected (B, D) of the same D: name an address "
                "where they are alike with at="
            )
        if reduction < 1:
            raise ValueError(f"reduction={reduction}: expected 1 or more")
        width, parameter = shapes[0][1], next(cohort.parameters())
        self.query = nn.Linear(width, max(width // reduction, 1), bias=False).to(parameter.device)
        self.key = nn.Linear(width, max(width // reduction, 1), bias=False).to(parameter.device)
        self.detach = detach

    def forward(self, *args: Any, **kwargs: Any) -> DiverseOutput:
        """Every peer's output, the auxiliary peers' attention, and everybody's targets."""
        peers, features = self.read(Inputs(args, kwargs))
        embeddings = torch.stack(features[1:], dim=1)
        said = [logits_of(peer) for peer in peers[1:]]
        logits = torch.stack([in_float32(z) for z in said if z is not None], dim=1)
        if self.detach:
            embeddings, logits = embeddings.detach(), logits.detach()
        with torch.autocast(logits.device.type, enabled=False):
            embeddings = embeddings.to(self.query.weight.dtype)
            attention = peer_attention(self.query(embeddings), self.key(embeddings))
            return DiverseOutput(peers, attention, attention @ logits, logits.mean(dim=1))

    def ensemble(self) -> AveragedEnsemble:
        """The auxiliary peers as one plain network with the mean of their logits, the leader's teacher; a copy."""
        return AveragedEnsemble([self.peer(i) for i in range(1, len(self.peers))])


@dataclass
class AttendedTarget:
    """The target of a peer.

    Args:
        logits: (B, K), outside the graph, for any loss.
        attached: the same, in the graph that reaches the attention.
    """

    logits: Tensor
    attached: Tensor


class AttendedKD(Loss):
    """KD by which those who make the target learn too: OKDDip's attention has no other loss.

    Args:
        temperature: T; 3 by default.
        weight: 1 by default.
        name: of the term.

    Memory: linear in the logits. See :func:`attended_divergence` for the formula.

    >>> AttendedKD().temperature
    3.0
    """

    def __init__(self, temperature: float = 3.0, weight: Weight = 1.0, name: str | None = None):
        super().__init__(weight=weight, name=name)
        if temperature <= 0:
            raise ValueError(f"AttendedKD: temperature={temperature}: expected a positive number")
        self.temperature = temperature

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        return attended_divergence(student.logits, teacher.output.attached, self.temperature)

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        if not isinstance(teacher.output, AttendedTarget):
            raise ValueError(f"{self.name}: expected OKDDip's targets; beside another teacher use KD")


@method(
    section="3.2",
    role="teacher",
    paper="Chen, Mei, Wang, Feng, Chen: Online Knowledge Distillation with Diverse Peers",
    year=2020,
    link="https://arxiv.org/abs/1912.00350",
    needs=("labels",),
    use="Peers that shall not become alike while they teach each other, and one leader to keep.",
)
class OKDDip(PeerTeacher):
    """Each auxiliary peer learns from its own mixture of all of them, and the leader from their mean.

    The student role must be :class:`tutelage.DiversePeers`. With :meth:`losses`, a leader z_0 and M auxiliary peers
    the total is

        Σ_{a=0..M} CE(z_a, y) + T² · Σ_{a=1..M} KL(softmax(Σ_b α_ab·z_b / T) ‖ softmax(z_a/T))
                              + T² · KL(softmax(1/M · Σ_b z_b / T) ‖ softmax(z_0/T))

    with T = 3. The attention learns by :class:`tutelage.AttendedKD` alone, whose gradient flows into the targets. With
    other losses (KD, feature or relation losses) in its place, targets are fixed as everywhere and the attention stays
    as it was made. At other addresses a target is the mean of the auxiliary peers' tensors with the same weights.
    Addresses are relative to a peer.

    The paper mixes predicted distributions; the authors' code, which is followed, mixes logits, detaches nothing
    (:class:`tutelage.DiversePeers` can) and brings the KL up over 80 of 300 epochs. Their 1e-7 beside each target
    probability is left out. Values and gradients were compared with that code. As a peer counts in its own target, the
    KL is least for a peer that listens to itself: in short trainings α_aa came above 0.9, which keeps peers apart.

    Chen, Mei, Wang, Feng, Chen 2020, "Online Knowledge Distillation with Diverse Peers",
    https://arxiv.org/abs/1912.00350

    >>> from tutelage import Branches, Distillation
    >>> from tutelage.models import SmallCNN
    >>> branches = Branches(SmallCNN(width=4), after="stage2", count=4, example=(1, 28, 28))
    >>> d = Distillation(DiversePeers(branches, example=(1, 28, 28)), OKDDip(), losses=OKDDip().losses())
    >>> sorted(d((torch.rand(4, 1, 28, 28), torch.zeros(4).long())).values)
    ['AttendedKD', 'TaskLoss']
    """

    cohort = DiversePeers

    def losses(self, temperature: float = 3.0, warm_up: float = 80 / 300) -> list[Loss]:
        """The published terms.

        Args:
            temperature: T.
            warm_up: the part of the training in which the KL comes up to its weight of 1.
        """
        return [TaskLoss(), AttendedKD(temperature, weight=RampUp(1.0, until=warm_up))]

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        return [*super().bind(student, student_reads, teacher_reads), "@logits"]  # targets, whatever the losses read

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        said: DiverseOutput = student.output
        leader, *peers = self.records(student)
        learners = [
            Lesson(peer, self._target(peers, said.targets[:, a], said.attention[:, a]), key=f"{a + 1}_from_peers")
            for a, peer in enumerate(peers)
        ]
        return [Lesson(leader, self._target(peers, said.mean), key="leader"), *learners]

    def _target(self, peers: list[Record], logits: Tensor, weights: Tensor | None = None) -> Record:
        taps = group_record(peers, None, weights).taps
        return Record(AttendedTarget(logits.detach(), logits), taps)
