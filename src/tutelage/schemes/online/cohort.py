"""Several networks that learn together: the student role of online distillation, and the base of its teachers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.algorithms.multi_teacher.averaged_ensemble import AveragedEnsemble
from tutelage.evaluation import evaluate_together
from tutelage.record import Record, in_float32, logits_of
from tutelage.taps import Address, UnknownTap, expand
from tutelage.tasks import Figures
from tutelage.teachers import Teacher
from tutelage.views import Batch, Inputs


@dataclass
class CohortOutput:
    """What every peer of a :class:`Cohort` said.

    Args:
        peers: the peers' outputs, in the cohort's order.
    """

    peers: list[Any]

    @property
    def logits(self) -> Tensor | None:
        """The first peer's logits: it is the one that is kept, so evaluating a cohort evaluates it."""
        return logits_of(self.peers[0])


class Cohort(nn.Module):
    """Several networks that learn together, as the student role. Put the one you want to keep first.

    All get the same inputs (of named inputs each gets those that it knows), in train mode each through a draw of
    ``augment`` of its own. Afterwards :meth:`peer` and :meth:`ensemble` give plain networks to export, and
    :func:`evaluate_peers` says which is best. A teacher beside a cohort is :class:`tutelage.DeepMutualLearning`.

    Args:
        peers: two or more different modules, of any architectures.
        augment: applied to the floating-point inputs of each peer in train mode, one draw for each peer.

    Raises:
        ValueError: fewer than two peers, or one module twice.
        TypeError: a peer is no ``nn.Module``.

    Memory: that of all peers and their activations.

    >>> output = Cohort([nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))])(torch.ones(2, 4))
    >>> len(output.peers), output.logits.shape
    (2, torch.Size([2, 3]))
    """

    def __init__(self, peers: Sequence[nn.Module], augment: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        members = list(peers)
        for i, peer in enumerate(members):
            if not isinstance(peer, nn.Module):
                raise TypeError(f"peers[{i}]: expected an nn.Module, got {type(peer).__name__}")
        if len(members) < 2:
            raise ValueError(f"peers: a cohort needs at least 2, got {len(members)}")
        if len({id(peer) for peer in members}) < len(members):
            raise ValueError("peers: the same module object appears twice; give copies (copy.deepcopy)")
        self.peers = nn.ModuleList(members)
        self.augment = augment

    def forward(self, *args: Any, **kwargs: Any) -> CohortOutput:
        """Every peer's output for the same inputs."""
        return CohortOutput(self.said(Inputs(args, kwargs)))

    def said(self, inputs: Inputs) -> list[Any]:
        """Every peer's output, in their order."""
        return [self.seen(inputs).call(peer) for peer in self.peers]

    def seen(self, inputs: Inputs) -> Inputs:
        """What one peer sees of the inputs: in train mode a new draw of ``augment``."""
        return inputs.map(self.augment) if self.training and self.augment is not None else inputs

    def peer(self, i: int) -> nn.Module:
        """Peer ``i`` alone: a plain network, a copy that shares nothing with the cohort.

        >>> cohort = Cohort([nn.Linear(4, 3), nn.Linear(4, 3)])
        >>> cohort.peer(1).weight.equal(cohort.peers[1].weight), cohort.peer(1) is cohort.peers[1]
        (True, False)
        """
        return copy.deepcopy(self.peers[i])

    def ensemble(self) -> AveragedEnsemble:
        """All peers as one plain network with the mean of their probabilities; a copy too.

        >>> Cohort([nn.Linear(4, 3), nn.Linear(4, 3)]).ensemble()(torch.ones(2, 4)).shape
        torch.Size([2, 3])
        """
        return AveragedEnsemble([self.peer(i) for i in range(len(self.peers))], average="probabilities")


def evaluate_peers(
    cohort: Cohort, loader: Iterable[Any], *, views: Callable[[Any], Batch] | None = None
) -> dict[str, Figures]:
    """Every peer's figures and the ensemble's: ``"peer 0"``, ``"peer 1"``, ..., ``"ensemble"``.

    Choose on validation data: ``cohort.peer(best_peer(cohort, validation))``.

    >>> data = [(torch.eye(3), torch.tensor([0, 1, 2]))]
    >>> found = evaluate_peers(Cohort([nn.Linear(3, 3), nn.Linear(3, 3)]), data)
    >>> list(found)
    ['peer 0', 'peer 1', 'ensemble']
    """
    models: dict[str, nn.Module] = {f"peer {i}": peer for i, peer in enumerate(cohort.peers)}
    models["ensemble"] = cohort.ensemble()
    return evaluate_together(models, loader, views=views)


def best_peer(cohort: Cohort, validation: Iterable[Any], *, views: Callable[[Any], Batch] | None = None) -> int:
    """Which peer has the best main figure (accuracy) on validation data; of equal ones the first.

    >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> good, bad = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> _ = good.weight.data.copy_(torch.eye(2)), bad.weight.data.copy_(-torch.eye(2))
    >>> best_peer(Cohort([bad, good]), data)
    1
    """
    found = evaluate_peers(cohort, validation, views=views)
    return max(range(len(cohort.peers)), key=lambda i: found[f"peer {i}"].value)


class PeerTeacher(Teacher):
    """Base of the teachers of a cohort: a subclass says with :meth:`lessons` who learns from whom.

    The losses' addresses are relative to a peer: ``"layer2"`` reads ``peers.0.layer2``, ``peers.1.layer2`` and so on,
    so it must exist in every peer; ``"@field"`` reads every peer's output.
    """

    cohort: type[Cohort] = Cohort
    """What the student role must be."""

    def __init__(self) -> None:
        self._reads: list[Address] = []
        self._count = 0

    def names(self, student: nn.Module) -> tuple[nn.Module, nn.Module]:
        if not isinstance(student, self.cohort):
            kind = self.cohort.__name__
            raise TypeError(f"student: {type(self).__name__} teaches a tutelage {kind}, got {type(student).__name__}")
        return student.peers[0], student.peers[0]

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        assert isinstance(student, Cohort), "names() has checked it"
        self._reads = [Address.parse(text) for text in dict.fromkeys(student_reads + teacher_reads)]
        self._count = len(student.peers)
        modules = [address for address in self._reads if not address.field]
        for i, peer in enumerate(student.peers):
            for address in modules:
                try:
                    expand(peer, address.text)
                except UnknownTap as error:
                    raise UnknownTap(f"peer {i} lacks a tap that every peer must have: {error}") from None
        taps = [_of_peer(i, address) for i in range(self._count) for address in modules]
        return taps + ["@logits"] * (len(modules) < len(self._reads))  # an @ address needs the whole forward pass

    def records(self, cohort: Record) -> list[Record]:
        """What each peer said, with the tensors at the losses' addresses."""
        outputs = [None] * self._count if cohort.output is None else cohort.output.peers  # None: a partial pass
        return [self._record(i, output, cohort) for i, output in enumerate(outputs)]

    def _record(self, i: int, output: Any, cohort: Record) -> Record:
        taps = {
            address.text: in_float32(address.read_output(output)) if address.field else cohort[_of_peer(i, address)]
            for address in self._reads
        }
        return Record(output, taps)


def _of_peer(i: int, address: Address) -> str:
    """The address inside the cohort of an address inside peer ``i``; a peer's own ``":input"`` has no name."""
    return f"peers.{i}.{address.text}" if address.name else f"peers.{i}{address.text}"


def group_record(records: Sequence[Record], logits: Tensor | None, weights: Tensor | None = None) -> Record:
    """What a group says together, as a target: given logits, and at every other address the peers' weighted mean.

    Args:
        records: the peers'.
        logits: the group's logits, made by whatever rule the method has; ``None`` after a partial pass.
        weights: (B, M) for each sample and peer, of sum 1; equal by default.

    Returns:
        A record outside the autograd graph.

    Raises:
        ValueError: peers whose tensors at an address differ in shape, so that they have no mean.

    >>> a, b = Record(taps={"f": torch.zeros(2, 3)}), Record(taps={"f": torch.ones(2, 3)})
    >>> group_record([a, b], None, torch.tensor([[0.5, 0.5], [0.0, 1.0]]))["f"][:, 0]
    tensor([0.5000, 1.0000])
    """
    taps: dict[str, Tensor] = {}
    for address in records[0].taps:
        if address == "@logits":
            continue
        parts = [record[address].detach() for record in records]
        if len({part.shape for part in parts}) > 1:
            raise ValueError(
                f"{address!r}: the peers' tensors are {[tuple(part.shape) for part in parts]}, of which there is no "
                "mean to learn from; read an address where they are alike"
            )
        stacked = torch.stack(parts)
        w = torch.full((len(parts), 1), 1 / len(parts)) if weights is None else weights.detach().T
        taps[address] = (stacked * w.to(stacked).reshape(*w.shape, *[1] * (stacked.ndim - 2))).sum(0)
    return Record(None if logits is None else logits.detach(), taps)
