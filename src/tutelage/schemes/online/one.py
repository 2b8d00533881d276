"""ONE: a network with branches, whose gated ensemble teaches each branch on the fly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.architecture.branches import Branches
from tutelage.catalogue import method
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record, in_float32, logits_of
from tutelage.schedule import RampUp
from tutelage.schemes.online.cohort import CohortOutput, PeerTeacher, group_record
from tutelage.schemes.online.headed import Spoken
from tutelage.taps import Observer
from tutelage.teachers import Lesson
from tutelage.views import Batch, Inputs, example_inputs


@dataclass
class GatedOutput(CohortOutput):
    """What branches with a gate say; ``logits`` are the first branch's.

    Args:
        peers: the branches' outputs.
        gates: (B, M), how much each branch counts for each sample, of sum 1.
        ensemble: (B, K), the logits of all branches, weighted by the gates.
    """

    gates: Tensor
    ensemble: Tensor


def gated_logits(logits: Sequence[Tensor], gates: Tensor) -> Tensor:
    """z_e = Σ_i g_i · z_i, the logits of M branches weighted for each sample.

    Args:
        logits: M tensors (B, K).
        gates: (B, M).

    Raises:
        ValueError: shapes that do not fit.

    >>> gated_logits([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])], torch.tensor([[0.25, 0.75]]))
    tensor([[0.2500, 0.7500]])
    """
    if any(z.shape != logits[0].shape for z in logits) or gates.shape != (logits[0].shape[0], len(logits)):
        raise ValueError(
            f"logits {[tuple(z.shape) for z in logits]} and gates {tuple(gates.shape)} do not fit: expected M tensors "
            "(B, K) and (B, M)"
        )
    stacked = torch.stack([in_float32(z) for z in logits], dim=1)
    return (in_float32(gates).unsqueeze(2) * stacked).sum(dim=1)


class GatedBranches(Branches):
    """Branches with a gate on what they share, as the student role of :class:`tutelage.ONE`.

    The gate is the mean of the trunk's output over positions (or tokens), a linear layer with M outputs, batch-norm,
    ReLU and softmax, as in the authors' code. A batch of one is normalised with the running statistics.

    Afterwards :meth:`ensemble` gives the gated ensemble as one plain network, and :meth:`peer` each branch.

    Args:
        model: the network; it becomes branch 0.
        example: a few inputs, or the shape of one input without the batch axis.
        count: how many branches, 2 or more; the paper has 3.
        after: where they part; by default after the stage before the last, as in the paper.
        fresh: give further branches new random weights.
        augment: of the inputs, one draw for all branches, in train mode.

    Raises:
        ValueError: fewer than two branches, or a trunk or logits of other shapes than the gate can take.
        UnknownTap: no such fork.

    Memory: the trunk once, the tails and their activations ``count`` times.

    >>> from tutelage.models import SmallCNN
    >>> output = GatedBranches(SmallCNN(width=4), example=(1, 28, 28))(torch.zeros(2, 1, 28, 28))
    >>> len(output.peers), output.gates.shape, output.ensemble.shape
    (3, torch.Size([2, 3]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor | Mapping[str, Any] | Sequence[int],
        count: int = 3,
        after: str | None = None,
        *,
        fresh: bool = True,
        augment: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(model, after, count, example, fresh=fresh, augment=augment)
        with torch.no_grad(), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            probe = self.peer(0).train()
            record = Observer(probe, [self.after, "@logits"]).dry_run(example_inputs(example, probe))
        shared, logits = record[self.after], record.logits
        if not 2 <= shared.ndim <= 4 or logits.ndim != 2:
            raise ValueError(
                f"after={self.after!r}: the gate takes (B, C), (B, N, C) or (B, C, H, W) and branches with logits "
                f"(B, K); got {tuple(shared.shape)} and {tuple(logits.shape)}"
            )
        parameter = next(model.parameters())
        self.gate = nn.Linear(_pooled(shared).shape[1], count).to(parameter.device, parameter.dtype)
        self.norm = nn.BatchNorm1d(count).to(parameter.device, parameter.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> GatedOutput:
        """Every branch's output, the gates and the gated ensemble."""
        shared: list[Tensor] = []

        def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not shared:  # every branch comes by here, and finds what the first one's pass gave
                shared.append(_pooled(self._own(self.after, output)))

        handle = self.peers[0].get_submodule(self.after).register_forward_hook(look)
        try:
            peers = self.said(Inputs(args, kwargs))
        finally:
            handle.remove()
        gates = self._gates(shared[0])
        return GatedOutput(peers, gates, gated_logits([_logits(peer) for peer in peers], gates))

    def _gates(self, pooled: Tensor) -> Tensor:
        scores = self.gate(pooled)
        if self.training and len(scores) == 1:
            n = self.norm
            scores = F.batch_norm(scores, n.running_mean, n.running_var, n.weight, n.bias, training=False, eps=n.eps)
        else:
            scores = self.norm(scores)
        return in_float32(scores).relu().softmax(dim=1)

    def ensemble(self) -> nn.Module:  # type: ignore[override]
        """The gated ensemble as one plain network, which returns logits; a copy.

        >>> from tutelage.models import SmallCNN
        >>> branches = GatedBranches(SmallCNN(width=4), example=(1, 28, 28)).eval()
        >>> x = torch.rand(2, 1, 28, 28)
        >>> torch.equal(branches.ensemble()(x), branches(x).ensemble)
        True
        """
        return Spoken(self, "ensemble")


def _pooled(shared: Tensor) -> Tensor:
    """(B, C) of a map's positions or a sequence's tokens."""
    return shared if shared.ndim == 2 else shared.mean(1) if shared.ndim == 3 else shared.mean((2, 3))


def _logits(output: Any) -> Tensor:
    logits = logits_of(output)
    assert logits is not None, "looked at when the gate was made"
    return logits


@method(
    section="3.2",
    role="teacher",
    paper="Lan, Zhu, Gong: Knowledge Distillation by On-the-Fly Native Ensemble",
    year=2018,
    link="https://arxiv.org/abs/1806.04606",
    needs=("labels",),
    use="No trained teacher and little more cost than one network: branches on one trunk, their ensemble as teacher.",
)
class ONE(PeerTeacher):
    """The gated ensemble of a network's branches teaches each of them; itself, it learns from the labels alone.

    The student role must be :class:`tutelage.GatedBranches`. With :meth:`losses` and M branches the total is

        Σ_i CE(z_i, y) + CE(z_e, y) + T² · Σ_i KL(softmax(z_e/T) ‖ softmax(z_i/T)),  z_e = Σ_i g_i(x) · z_i

    where z_e is detached inside the KL: the gate learns by the ensemble's cross-entropy alone, which also reaches all
    branches. Every branch ← ensemble is a lesson of weight 1, so any loss can stand where KL stands; at other addresses
    the ensemble says the gated mean of the branches' tensors. Addresses are relative to a branch.

    T = 3, the gate and weights of 1 were checked against the authors' code; its KL adds 1e-7 to the target, which is
    left out here, and begins with a sigmoid warm-up over 80 of 300 epochs, which :meth:`losses` keeps. The paper's
    formula has no warm-up.

    Lan, Zhu, Gong 2018, "Knowledge Distillation by On-the-Fly Native Ensemble", https://arxiv.org/abs/1806.04606

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallCNN
    >>> student, teacher = GatedBranches(SmallCNN(width=4), example=(1, 28, 28)), ONE()
    >>> d = Distillation(student, teacher, losses=teacher.losses())
    >>> sorted(d((torch.rand(4, 1, 28, 28), torch.zeros(4).long())).values)
    ['KD', 'TaskLoss']
    """

    cohort = GatedBranches

    def losses(self, temperature: float = 3.0, warm_up: float = 80 / 300) -> list[Loss]:
        """The published terms.

        Args:
            temperature: T.
            warm_up: the part of the training in which the KL comes up to its weight of 1.
        """
        return [TaskLoss(), KD(temperature=temperature, weight=RampUp(1.0, until=warm_up))]

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        return [*super().bind(student, student_reads, teacher_reads), "@logits"]  # the gates, whatever the losses read

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        said: GatedOutput = student.output
        peers = self.records(student)
        target = group_record(peers, said.ensemble, said.gates)
        branches = [Lesson(peer, target, key=f"{i}_from_ensemble") for i, peer in enumerate(peers)]
        return [*branches, Lesson(replace(target, output=said.ensemble), None, key="ensemble")]
