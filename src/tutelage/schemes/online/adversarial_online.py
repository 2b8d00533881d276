"""Online adversarial distillation of feature maps: peers whose discriminators cannot tell them from each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tutelage.beside import SideLearner
from tutelage.catalogue import method
from tutelage.connectors import match_size, projector
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.schemes.online.cohort import PeerTeacher
from tutelage.teachers import Lesson
from tutelage.views import Batch

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def least_squares_critic(student: Tensor, teacher: Tensor) -> Tensor:
    """(1 − D(F_t))² + D(F_s)², mean over samples: what the discriminator minimises (LSGAN).

    Args:
        student: (B,) or (B, 1), the discriminator's answer to the learner's features, whose target is 0.
        teacher: likewise to the other's, whose target is 1.

    Returns:
        A scalar ≥ 0; ½ for a discriminator that says ½ to everything, the best if it cannot tell.

    >>> least_squares_critic(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))
    tensor(0.5000)
    """
    return (1 - teacher).square().mean() + student.square().mean()


def least_squares_fooling(student: Tensor) -> Tensor:
    """(1 − D(F_s))², mean over samples: what the learner minimises.

    Args:
        student: (B,) or (B, 1), the discriminator's answer to the learner's features.

    >>> least_squares_fooling(torch.tensor([0.5, 1.0]))
    tensor(0.1250)
    """
    return (1 - student).square().mean()


class FeatureCritic(Loss):
    """A discriminator learns to tell the learner's features from the teacher's, and the learner to be taken for it.

    In train mode each call first updates the discriminator once, from detached features, down
    :func:`least_squares_critic`; then it returns :func:`least_squares_fooling`, whose gradient reaches the learner and
    not the discriminator. In eval mode, or without gradients, nothing is updated. Between features of different widths
    stands a transfer layer, a linear map from the learner's channels to the teacher's that learns with the learner;
    maps of different sizes are pooled to the smaller.

    The discriminator of maps (B, C, H, W) is two 3×3 convolutions, the second with stride 2, of tokens (B, N, C) and
    vectors (B, C) two linear layers, each with a leaky ReLU; then a linear layer, the mean over positions and a
    sigmoid. It has no batch norm, so that a sample's verdict does not hang on the others'. It must learn faster than
    what it judges: between two perceptrons features came closer with a learner at 0.003 beside a discriminator at
    0.01, and not with 0.01 beside 0.001.

    Args:
        taps: which features (one pair), by default the last stage's.
        hidden: the width of the discriminator.
        optimizer: makes the discriminator's optimiser from its parameters; by default Adam with ``lr`` and betas
            (0.5, 0.999).
        lr: of the default optimiser.
        weight: 1 by default.
        name: of the term.

    Every call in train mode is one update, so a step accumulated over several batches updates the discriminator
    several times. Memory: the discriminator's, with its activations of positions × ``hidden``.

    >>> from tutelage import Distillation
    >>> from tutelage.models import MLP
    >>> d = Distillation(MLP(8, (4,), 3), MLP(8, (9,), 3), losses=[FeatureCritic("hidden.0")])
    >>> d(torch.randn(5, 8)).total.backward()
    >>> list(d.side_learners()), d.losses["FeatureCritic"].transfer
    (['FeatureCritic.critic'], Linear(in_features=4, out_features=9, bias=True))
    """

    default_reads = "last stage"

    def __init__(
        self,
        *taps: Tap,
        hidden: int = 64,
        optimizer: MakeOptimizer | None = None,
        lr: float = 1e-3,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        if hidden < 1:
            raise ValueError(f"{self.name}: hidden={hidden}: expected at least 1")
        self.hidden = hidden
        self.optimizer = optimizer or partial(torch.optim.Adam, lr=lr, betas=(0.5, 0.999))
        self.transfer: nn.Module = nn.Identity()
        self.critic: SideLearner | None = None

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        if len(self.pairs) != 1:
            raise ValueError(f"{self.name}: one discriminator judges one pair of features, got {len(self.pairs)}")
        (mine, theirs) = self.tensors(student, teacher)[0]
        axis = 1 if theirs.ndim == 4 else -1
        if mine.ndim != theirs.ndim or mine.shape[axis] != theirs.shape[axis]:
            self.transfer = projector(mine.shape, theirs.shape).to(mine)
        self.critic = SideLearner(_discriminator(theirs.shape, self.hidden).to(theirs), self.optimizer)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        assert self.critic is not None, "bind first"
        mine, theirs = self.tensors(student, teacher)[0]
        mine, theirs = self.transfer(mine), theirs.detach()
        if mine.ndim == 4:
            mine, theirs = match_size(mine, theirs)
        if self.training and torch.is_grad_enabled():
            self.critic.update(least_squares_critic(self.critic(mine.detach()), self.critic(theirs.to(mine))))
        # With copies of its weights the critic gets no gradient, and a later update cannot spoil this graph.
        frozen = {name: p.detach().clone() for name, p in self.critic.module.named_parameters()}
        return least_squares_fooling(functional_call(self.critic.module, frozen, (mine,)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hidden={self.hidden}"


def _discriminator(shape: Sequence[int], hidden: int) -> nn.Module:
    if len(shape) == 4:
        layers: list[nn.Module] = [
            nn.Conv2d(shape[1], hidden, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, 1, 1),
        ]
    elif len(shape) in (2, 3):
        layers = [nn.Linear(shape[-1], hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2)]
        layers.append(nn.Linear(hidden, 1))
    else:
        raise ValueError(f"FeatureCritic: features {tuple(shape)}: expected (B, C, H, W), (B, N, C) or (B, C)")
    return nn.Sequential(*layers, _MeanOfPositions(), nn.Sigmoid())


class _MeanOfPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)


@method(
    section="3.2",
    role="teacher",
    paper="Chung, Park, Kim, Kwak: Feature-map-level Online Adversarial Knowledge Distillation",
    year=2020,
    link="https://arxiv.org/abs/2002.01775",
    needs=("labels", "other models"),
    use="Peers that shall share how their features are distributed, not match each map: a small and a large network.",
)
class AdversarialOnline(PeerTeacher):
    """Peers in a circle: each learns the logits of the one before it and to be taken for it by a discriminator.

    Peer k with the peer j before it (the last one, for the first) minimises

        CE(z_k, y) + T²·KL(softmax(z_j/T) ‖ softmax(z_k/T)) + λ · (1 − D_k(F_k))²,

    where D_k, which minimises (1 − D_k(F_j))² + D_k(F_k)², learns beside it (:class:`FeatureCritic`). Two peers teach
    each other; with more there are N lessons and N discriminators, not N·(N−1). Targets are detached; each peer runs
    once. Any losses stand beside it.

    The student role must be a :class:`tutelage.Cohort`; the losses' addresses are relative to a peer.

    Formulas and the circle were checked against two accounts of the paper; no code of the authors is public. They take
    the adversarial step after the other one, with an optimiser of its own and a far smaller learning rate; here both
    are one step, and λ stands for the ratio. Their transfer layer stands on both sides, here on the learner's alone,
    and only where the widths differ. The discriminators' layers, their learning rate, T = 3 and λ are ours.

    Memory: that of the losses, N times.

    Chung, Park, Kim, Kwak 2020, "Feature-map-level Online Adversarial Knowledge Distillation",
    https://arxiv.org/abs/2002.01775

    >>> from tutelage import Cohort, Distillation
    >>> from tutelage.models import MLP
    >>> cohort, teacher = Cohort([MLP(8, (6,), 3), MLP(8, (16,), 3)]), AdversarialOnline()
    >>> d = Distillation(cohort, teacher, losses=teacher.losses("linear:input"))
    >>> sorted(d((torch.randn(4, 8), torch.zeros(4).long())).values), len(d.side_learners())
    (['FeatureCritic', 'KD', 'TaskLoss'], 2)
    """

    def losses(self, *taps: Tap, temperature: float = 3.0, weight: Weight = 0.1) -> list[Loss]:
        """The published terms.

        Args:
            taps: which features the discriminators judge; by default the last stage's.
            temperature: T of the KL.
            weight: λ.
        """
        return [TaskLoss(), KD(temperature=temperature, weight=1.0), FeatureCritic(*taps, weight=weight)]

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        peers = self.records(student)
        before = [peers[-1], *peers[:-1]]
        count = len(peers)
        return [
            Lesson(mine, other.detach(), key=f"{k}_from_{(k - 1) % count}")
            for k, (mine, other) in enumerate(zip(peers, before, strict=True))
        ]
