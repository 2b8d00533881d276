"""Route-constrained optimisation: the teacher's own checkpoints teach, from its first epochs to its last."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.console import say
from tutelage.models.loading import load_weights
from tutelage.record import Record
from tutelage.taps import Observer
from tutelage.teachers import Frozen, Lesson
from tutelage.views import Batch

if TYPE_CHECKING:
    from tutelage.run import Run

Anchor = str | Path | dict[str, Tensor]
"""Weights of the teacher on its way: a file (safetensors, or a state dict of ``torch.save``) or a state dict."""


def equal_parts(anchors: int) -> list[float]:
    """Where in the student's training each anchor gives way to the next, so that all teach equally long.

    Args:
        anchors: how many there are before the final network.

    Returns:
        i / (anchors + 1) for i = 1, ..., anchors.

    >>> equal_parts(3)
    [0.25, 0.5, 0.75]
    """
    return [i / (anchors + 1) for i in range(1, anchors + 1)]


@method(
    section="2.2",
    role="teacher",
    paper="Jin, Peng, Wu, Liu, Liu, Liang, Yan, Hu: Knowledge Distillation via Route Constrained Optimization",
    year=2019,
    link="https://arxiv.org/abs/1904.09149",
    needs=("extra memory", "extra stages"),
    use="A teacher far ahead of the student, of which checkpoints of its training are kept or can be: easy ones first.",
)
class RouteConstrained(Frozen):
    """The route of a teacher's training as a curriculum: its early weights teach first, its final ones last.

    Any losses stand beside it, response or feature; what they compare with changes at the boundaries. The network
    that is given keeps its own weights, which are the final ones, and is what the student is compared with and
    reported beside; a copy of it takes on the anchors. Which anchor teaches follows from the progress of the training
    alone, so a run that is resumed goes on with the right one. In a training of several stages each goes the whole way.

    The anchors are equally spaced in the paper, in the teacher's epochs and so in the student's. Its search for them by
    how hard each is for the student is not here: the measure could not be checked. Nor could the weights of its
    terms, or whether its learning rate begins anew with each anchor; here it does not.

    In a recipe that trains its teacher (``teacher_training``) the anchors are recorded: every ``keep_every`` epochs,
    by default a quarter of them, as far as the epoch whose weights are the final ones. In Python the same is
    ``Training.keep_every`` and :meth:`follow`.

    Args:
        module: the network, with its final weights when the distillation is bound.
        anchors: its weights on the way there, first to last, without the final ones. Files are read when they are
            needed, and once when binding.
        at: the part of the student's training after which each anchor gives way to the next, and the last one to the
            final network; equal parts by default.

    Raises:
        ValueError: no anchors by the time of binding, weights that do not fit the network, or boundaries that are not
            one for each anchor, rising between 0 and 1.

    Memory: one more network, and the anchors that are given as state dicts.

    Jin, Peng, Wu, Liu, Liu, Liang, Yan, Hu 2019, "Knowledge Distillation via Route Constrained Optimization",
    https://arxiv.org/abs/1904.09149

    >>> import torch
    >>> from tutelage import KD, Distillation
    >>> teacher = nn.Linear(4, 3)
    >>> halfway = {name: value / 2 for name, value in teacher.state_dict().items()}
    >>> d = Distillation(nn.Linear(4, 3), RouteConstrained(teacher, [halfway]), losses=[KD()]).bind(torch.ones(2, 4))
    >>> costs = []
    >>> for d.progress in (0.0, 0.49, 0.5):
    ...     costs.append(d(torch.ones(2, 4)).total)
    >>> bool(costs[0] == costs[1]), bool(costs[1] == costs[2])
    (True, False)
    """

    def __init__(self, module: nn.Module, anchors: Sequence[Anchor] | None = None, at: Sequence[float] | None = None):
        super().__init__(module)
        if isinstance(anchors, str | Path | Mapping):
            raise TypeError(f"anchors: expected a list of files or state dicts, got one {type(anchors).__name__}")
        self.anchors = None if anchors is None else list(anchors)
        self.at = None if at is None else list(at)
        self._on_the_way: nn.Module | None = None
        self._leg: int | None = None
        if self.anchors is not None:
            self._boundaries()

    def follow(self, run: Run) -> None:
        """Take the anchors from the network's own training, whose weights were kept (``Training.keep_every``).

        Those after the epoch that was best on validation are left out: the way ends with the final weights.

        Raises:
            ValueError: the training kept none.

        >>> import torch
        >>> from tutelage import distill
        >>> teacher, data = nn.Linear(4, 3), [(torch.randn(6, 4), torch.arange(6) % 3)]
        >>> result = distill(teacher, None, data, epochs=6, keep_every=2, progress=False)
        >>> role = RouteConstrained(teacher)
        >>> role.follow(result.runs[-1])
        >>> len(role.anchors)  # of epochs 2 and 4; those of epoch 6 are the network's own
        2
        """
        if not run.kept and run.epoch > 1:
            raise ValueError("RouteConstrained: the teacher's training kept no weights; give it a small keep_every")
        end = run.epoch if run.best_epoch is None else run.best_epoch + 1
        epochs = [epoch for epoch in sorted(run.kept) if epoch < end]
        self.anchors = [run.kept[epoch] for epoch in epochs]
        self._boundaries()
        say(f"RouteConstrained goes by epochs {', '.join(map(str, [*epochs, end]))} of the teacher's training")

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        taps = super().bind(student, student_reads, teacher_reads)
        if self.anchors is None:
            raise ValueError(
                "RouteConstrained: no anchors: give anchors=, or let a recipe train the teacher (teacher_training)"
            )
        self._on_the_way = copy.deepcopy(self.module)
        for leg in reversed(range(len(self.anchors) + 1)):  # each is tried now and not in the middle of a training
            self._load(leg)
        self.observer = Observer(self._on_the_way, teacher_reads)
        return taps

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        leg = bisect_right(self._boundaries(), batch.progress)
        if leg != self._leg:
            self._load(leg)
        return super().lessons(batch, student)

    def apply(self, change: Callable[[nn.Module], Any]) -> None:
        super().apply(change)
        if self._on_the_way is not None:
            change(self._on_the_way)

    def _boundaries(self) -> list[float]:
        assert self.anchors is not None, "bind has checked it"
        if self.at is None:
            return equal_parts(len(self.anchors))
        rising = all(a < b for a, b in pairwise([0.0, *self.at, 1.0]))
        if len(self.at) != len(self.anchors) or not rising:
            raise ValueError(
                f"at={self.at}: expected {len(self.anchors)} rising parts of the training between 0 and 1, one for "
                "each anchor"
            )
        return self.at

    def _load(self, leg: int) -> None:
        assert self.anchors is not None, "bind has checked it"
        assert self._on_the_way is not None, "bind has made it"
        weights = self.anchors[leg] if leg < len(self.anchors) else self.module.state_dict()
        if isinstance(weights, str | Path):
            load_weights(self._on_the_way, weights)
        else:
            try:
                self._on_the_way.load_state_dict(weights)
            except RuntimeError as error:
                raise ValueError(f"anchors[{leg}]: not the weights of this network: {error}") from error
        self._leg = leg
