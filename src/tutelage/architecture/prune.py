"""Fewer channels, in the form of the other builders of students."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tutelage.architecture.builders import StudentBuilder
from tutelage.catalogue import method

if TYPE_CHECKING:
    from tutelage.deploy.calling import Example

Importance = Literal["l2", "l1", "random"]


@method(
    section="4",
    role="student",
    paper="Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets",
    year=2017,
    link="https://arxiv.org/abs/1608.08710",
    use="A thinner network that runs faster everywhere, without special kernels: the first builder to try.",
)
@dataclass(frozen=True)
class Prune(StudentBuilder):
    """The teacher with fewer channels: the most important ones, with their weights.

    :func:`tutelage.architecture.pruning.choose_channels` in the form of a builder; the arguments and what is refused
    are described there. Needs the extra ``compress``. Random importance draws from torch's generator.

    Args:
        ratio: of each group's channels that go.
        importance: ``"l2"``, ``"l1"`` or ``"random"``.
        keep: addresses of modules whose channels all stay.
        round_to: what stays is rounded up to a multiple of this.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets", https://arxiv.org/abs/1608.08710

    >>> from tutelage.models import SmallCNN
    >>> Prune(0.5)(SmallCNN(width=8), torch.zeros(1, 1, 28, 28)).stage1[0].out_channels, Prune(0.5).label
    (4, 'prune-0.5')
    """

    ratio: float
    importance: Importance = "l2"
    keep: tuple[str, ...] = ()
    round_to: int | None = None

    def check(self) -> None:
        """Refuse a ratio out of range."""
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}: expected a share between 0 and 1")

    def choose(self, teacher: nn.Module, example: Example) -> dict[str, Any]:
        """The plain form of a :class:`tutelage.architecture.channels.Pruning`."""
        from tutelage.architecture.pruning import choose_channels

        seed = int(torch.randint(2**31, ())) if self.importance == "random" else 0
        return choose_channels(
            teacher,
            example,
            self.ratio,
            importance=self.importance,
            keep=self.keep,
            round_to=self.round_to,
            seed=seed,
        ).plain()

    @staticmethod
    def build(network: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """The network with these channels alone."""
        from tutelage.architecture.channels import Pruning
        from tutelage.architecture.pruning import keep_channels

        return keep_channels(network, Pruning.of(structure)).train()
