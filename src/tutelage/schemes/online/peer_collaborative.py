"""Peer collaborative learning: peers learn from a classifier of all their features and from each other's past."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.schedule import RampUp
from tutelage.schemes.online.cohort import Cohort, CohortOutput, PeerTeacher, group_record
from tutelage.schemes.online.headed import Spoken
from tutelage.schemes.self_distillation.ema import EMA
from tutelage.taps import Observer
from tutelage.teachers import Lesson
from tutelage.views import Batch, Inputs


@dataclass
class JoinedOutput(CohortOutput):
    """What the peers of :class:`JoinedPeers` said.

    Args:
        peers: the peers' outputs.
        joined: (B, K), the logits of the classifier that reads all peers' features.
        seen: what each peer was called with: its own draw of the augmentation.
    """

    joined: Tensor
    seen: list[Inputs]


class JoinedPeers(Cohort):
    """A cohort with one more classifier, which reads the features of all peers together, as the student role.

    A peer's feature is what its own classifier reads, a linear layer. Each peer runs whole, on a draw of ``augment``
    of its own in train mode; peers that share a trunk (:class:`tutelage.Branches`, as in the paper) send every draw
    through it. :meth:`joined` gives the new classifier on all peers as a plain network.

    Args:
        peers: two or more networks over the same classes, or a cohort of them.
        augment: applied to the floating-point inputs of each peer in train mode, one draw for each peer; by default
            that of the cohort that is given.
        classifier: the name of each peer's last linear layer; by default the last one that is defined.

    Raises:
        ValueError: what :class:`tutelage.Cohort` refuses; a peer without a linear layer, a ``classifier`` that is
            none, or peers that differ in classes.

    Memory: that of all peers and their activations.

    >>> output = JoinedPeers([nn.Linear(4, 3), nn.Linear(4, 3)])(torch.ones(2, 4))
    >>> output.joined.shape, len(output.peers)
    (torch.Size([2, 3]), 2)
    """

    def __init__(
        self,
        peers: Sequence[nn.Module] | Cohort,
        augment: Callable[[Tensor], Tensor] | None = None,
        classifier: str | None = None,
    ):
        if isinstance(peers, Cohort):
            augment, peers = augment or peers.augment, list(peers.peers)
        super().__init__(peers, augment)
        self.classifiers = [_classifier(i, peer, classifier) for i, peer in enumerate(self.peers)]
        layers = self._layers()
        classes = [layer.out_features for layer in layers]
        if len(set(classes)) > 1:
            raise ValueError(f"peers: their classifiers have {classes} classes; expected the same ones")
        self.joint = nn.Linear(sum(layer.in_features for layer in layers), classes[0]).to(layers[0].weight)

    def forward(self, *args: Any, **kwargs: Any) -> JoinedOutput:
        """Every peer's output, and the logits of all peers' features."""
        inputs = Inputs(args, kwargs)
        features: list[Tensor] = []
        seen = [self.seen(inputs) for _ in self.peers]
        handles = [
            layer.register_forward_pre_hook(lambda _, given: features.append(given[0])) for layer in self._layers()
        ]
        try:
            said = [mine.call(peer) for mine, peer in zip(seen, self.peers, strict=True)]
        finally:
            for handle in handles:
                handle.remove()
        if len(features) != len(said):
            raise ValueError(f"classifier: {self.classifiers} were called {len(features)} times by {len(said)} peers")
        return JoinedOutput(said, self.joint(torch.cat(features, -1)), seen)

    def joined(self) -> nn.Module:
        """The classifier of all peers' features, with the peers below it, as one plain network; a copy.

        >>> JoinedPeers([nn.Linear(4, 3), nn.Linear(4, 3)]).joined()(torch.ones(2, 4)).shape
        torch.Size([2, 3])
        """
        return Spoken(self, "joined")

    def _layers(self) -> list[nn.Linear]:
        named = zip(self.peers, self.classifiers, strict=True)
        return [peer.get_submodule(name) for peer, name in named]  # type: ignore[misc]


def _classifier(i: int, peer: nn.Module, name: str | None) -> str:
    linear = [n for n, module in peer.named_modules() if isinstance(module, nn.Linear)]
    if not linear or (name is not None and name not in linear):
        raise ValueError(
            f"classifier={name!r}: expected the name of a linear layer of peer {i}, a {type(peer).__name__}"
            f"{', such as ' + repr(linear[-1]) if linear else ', which has none'}"
        )
    return name if name is not None else linear[-1]


@method(
    section="3.2",
    role="teacher",
    paper="Wu, Gong: Peer Collaborative Learning for Online Knowledge Distillation",
    year=2021,
    link="https://arxiv.org/abs/2006.04147",
    needs=("labels", "other models", "extra memory"),
    use="Branches or small peers with augmented images: a teacher of all features, and steady targets from averages.",
)
class PeerCollaborative(PeerTeacher):
    """Peers learn from the classifier of all their features, and from the others' averages over time.

    With N peers the total is

        CE(z_e, y) + Σ_i [ CE(z_i, y) + ω·T²·KL(z_e ‖ z_i) + ω/(N−1) · Σ_{j≠i} T²·KL(z'_j ‖ z_i) ]

    z_e, the peer ensemble teacher's logits, come from a linear layer on all peers' features, each peer having seen the
    images through an augmentation of its own. z'_j, the peer mean teacher's, come from the exponential moving average
    of peer j's weights (:class:`tutelage.EMA`), which sees what peer j sees. Targets are detached; the gradient of
    CE(z_e, y) reaches the peers. ω rises as λ·exp(−5·(1 − e/α)²) over the first epochs (:class:`tutelage.RampUp`).

    The student role must be :class:`JoinedPeers`. The two kinds of lessons of a peer have weights that sum to 1, ½ for
    the ensemble's and ½/(N−1) for each average's, so labels count once; :meth:`losses` therefore gives ``KD`` the
    weight 2·ω. Any losses stand beside it: of features, the ensemble's are the peers' mean. :meth:`mean_peer` is the
    network that the authors deploy.

    T = 3, λ = 1, α = 80 of 300 epochs and a decay of min(1 − 1/step, 0.999) are those of a public reproduction, whose
    losses give the same values here but for its ω, which it divides by λ instead of α; the paper's text could not be
    read in full. The averages are in eval mode, with averaged statistics, where the reproduction runs them in train
    mode.

    Args:
        decay: of the averages, 0 ≤ decay < 1.

    Raises:
        ValueError: a decay out of range.

    Memory: once more the cohort, and the averages' activations without a graph.

    Wu, Gong 2021, "Peer Collaborative Learning for Online Knowledge Distillation", https://arxiv.org/abs/2006.04147

    >>> from tutelage import Distillation
    >>> peers, teacher = JoinedPeers([nn.Linear(8, 3), nn.Linear(8, 3)]), PeerCollaborative()
    >>> losses = Distillation(peers, teacher, losses=teacher.losses())((torch.ones(4, 8), torch.zeros(4).long()))
    >>> sorted(losses.values)
    ['KD', 'TaskLoss']
    """

    cohort = JoinedPeers

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.mean = EMA(decay)

    def losses(self, temperature: float = 3.0, weight: float = 1.0, until: float = 80 / 300) -> list[Loss]:
        """The published ones.

        Args:
            temperature: T of both KL.
            weight: λ, of both KL in the end.
            until: α, the part of the training over which their weight rises.
        """
        return [TaskLoss(), KD(temperature=temperature, weight=RampUp(2 * weight, until))]

    def mean_peer(self, i: int) -> nn.Module:
        """The average of peer ``i`` over time: a plain network, a copy."""
        return copy.deepcopy(self._mean_peers[i])

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        self.mean.bind(student, [], [])  # reads nothing by itself: each average sees what its peer sees
        self._observers = [Observer(peer, teacher_reads) for peer in self._mean_peers]
        self._dry = True
        # the logits of all features, and what each peer saw, are in the output
        return list(dict.fromkeys([*super().bind(student, student_reads, teacher_reads), "@logits"]))

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        peers, said = self.records(student), student.output
        self.mean.lessons(batch, student)  # the averages take the step in, if one was made
        means = [self._said(i, seen) for i, seen in enumerate(said.seen)]
        self._dry = False
        ensemble = group_record(peers, said.joined)
        lessons = [Lesson(Record(said.joined), None, key="ensemble")]
        for i, mine in enumerate(peers):
            lessons.append(Lesson(mine, ensemble, 1 / 2, key=f"{i}_from_ensemble"))
            others = [(j, mean) for j, mean in enumerate(means) if j != i]
            lessons += [Lesson(mine, mean, 1 / 2 / len(others), key=f"{i}_from_mean_{j}") for j, mean in others]
        return lessons

    def apply(self, change: Callable[[nn.Module], Any]) -> None:
        self.mean.apply(change)

    def own_state(self) -> dict[str, Any]:
        return self.mean.own_state()

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.mean.load_own_state(state)

    @property
    def _mean_peers(self) -> nn.ModuleList:
        return self.mean.copy.peers  # type: ignore[return-value]

    def _said(self, i: int, seen: Inputs) -> Record:
        observer = self._observers[i]
        if not observer.addresses:
            return Record()  # no loss reads it
        if any(m.training for m in observer.model.modules()):
            observer.model.eval()
        with torch.no_grad():
            return observer.dry_run(seen) if self._dry else observer(seen)
