"""The loss base: one term of what is transferred, bound to taps."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from tutelage import taps
from tutelage.record import Record
from tutelage.schedule import Weight, weight_at
from tutelage.taps import UnknownTap, expand
from tutelage.views import UNLABELLED, Batch

Reads = Literal["logits", "stages", "middle stage", "last stage", "embedding", "nothing"]
Tap = str | tuple[str, str]


class Loss(nn.Module):
    """One term: where it reads, what it weighs, and whatever it learns.

    A subclass writes ``forward(student, teacher, batch)``, which returns the mean over the batch's units (samples,
    unless :meth:`units` says otherwise), and, where it owns projectors or memory, :meth:`build`. Inside ``forward``
    autocast is off and half-precision tensors have become float32.

    Args:
        taps: where it reads: ``"layer2"`` in both models, ``("layer2", "blocks.5")`` in the student and the teacher;
            several pairs are several arguments. Without any, ``default_reads`` decides and the choice is printed.
        weight: a number or a schedule (:mod:`tutelage.schedule`).
        name: of the term in logs; by default the class's name.

    Class attributes that a subclass may set:
        default_reads: what it reads without ``taps``.
        needs_teacher, needs_labels, needs_ids: what it cannot do without, checked when binding.
        needs_samples: the smallest batch that makes sense.
        separable: whether it is the mean of what each sample or position gives by itself, so that it may be calculated
            some of them at a time.
        needs_input_gradients: whether it derives outputs with respect to ``batch.student`` and ``batch.teacher``: their
            tensors then require gradients, and the teacher's forward pass keeps its graph.
    """

    default_reads: Reads = "logits"
    needs_teacher = True
    needs_labels = False
    needs_ids = False
    needs_samples = 1
    needs_input_gradients = False
    separable = False

    def __init__(self, *taps: Tap, weight: Weight = 1.0, name: str | None = None):
        super().__init__()
        if not callable(weight) and not (isinstance(weight, int | float) and weight == weight):
            raise TypeError(f"{type(self).__name__}: weight={weight!r}: expected a number or a schedule")
        self.at(*taps)
        self.weight = weight
        self.name = name or type(self).__name__
        self.pairs: list[tuple[str, str]] = []

    def at(self, *taps: Tap) -> Loss:
        """Say where it reads, after it was made; returns itself.

        >>> Loss().at("layer2").taps
        ('layer2',)
        """
        for tap in taps:
            if not isinstance(tap, str) and not (
                isinstance(tap, tuple | list) and len(tap) == 2 and all(isinstance(t, str) for t in tap)
            ):
                raise TypeError(f"{type(self).__name__}: a tap is an address or (student, teacher), not {tap!r}")
        self.taps = taps
        return self

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward(student, teacher, batch)")

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        """Make projectors and memories anew from the real shapes of a first batch; called once, when binding."""

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        """Refuse tensors that cannot be compared, with a ``ValueError``; called when binding."""

    def units(self, batch: Batch) -> Tensor | int:
        """How many units (samples, labelled tokens) this term is the mean over: its normaliser when a step is made
        of several batches or processes."""
        return len(batch)

    def weight_at(self, progress: float) -> float:
        """Its weight now."""
        return weight_at(self.weight, progress)

    def tensors(self, student: Record, teacher: Record) -> list[tuple[Tensor, Tensor]]:
        """The tapped tensors of every pair, the student's first."""
        return [(student[s], teacher[t]) for s, t in self.pairs]

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        """Turn ``taps`` into :attr:`pairs` of existing addresses; returns whether it had to choose them itself.

        Raises:
            UnknownTap: an address names nothing, or a pair of globs matches different numbers of modules.
        """
        if self.taps:
            self.pairs = [pair for tap in self.taps for pair in self._expand(student, teacher, tap)]
            return False
        if self.default_reads == "nothing":
            return False
        if self.default_reads == "logits":
            self.pairs = [("@logits", "@logits")]
            return False
        if self.default_reads == "embedding":
            self.pairs = [(taps.embedding(student, batch.student), taps.embedding(teacher, batch.teacher))]
            return True
        mine, theirs = taps.stages(student, batch.student), taps.stages(teacher, batch.teacher)
        count = min(len(mine), len(theirs))
        # From the deepest backwards: what corresponds is the distance from the output.
        matched = list(zip(mine[-count:], theirs[-count:], strict=True))
        if self.default_reads == "last stage":
            matched = matched[-1:]
        elif self.default_reads == "middle stage":
            matched = [matched[count // 2]]
        self.pairs = [(s.address, t.address) for s, t in matched]
        return True

    def _expand(self, student: nn.Module, teacher: nn.Module, tap: Tap) -> list[tuple[str, str]]:
        mine, theirs = (tap, tap) if isinstance(tap, str) else tap
        found: list[list[str]] = []
        for side, model, address in (("student", student, mine), ("teacher", teacher, theirs)):
            if side == "teacher" and not self.needs_teacher:
                found.append(found[0])
                continue
            try:
                found.append(expand(model, address))
            except UnknownTap as error:
                raise UnknownTap(f"{self.name}: {side} tap {error}") from None
        if len(found[0]) != len(found[1]):
            raise UnknownTap(
                f"{self.name}: {mine!r} names {len(found[0])} modules of the student ({', '.join(found[0])}) and "
                f"{theirs!r} {len(found[1])} of the teacher ({', '.join(found[1])}): name the pairs one by one"
            )
        return list(zip(*found, strict=True))

    def extra_repr(self) -> str:
        taps = self.pairs or [(tap, tap) if isinstance(tap, str) else tap for tap in self.taps]
        reads = ", ".join(s if s == t else f"{s} ← {t}" for s, t in taps) or self.default_reads
        return f"{reads}, weight={self.weight}"


class ResponseLoss(Loss):
    """Base of losses that compare the two models' logits, which must have the same classes."""

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        for s, t in self.tensors(student, teacher):
            if s.shape != t.shape:
                axis = class_axis(s)
                counts = (s.shape[axis], t.shape[axis]) if s.ndim == t.ndim else (0, 0)
                if counts[0] != counts[1]:
                    raise ValueError(
                        f"{self.name}: the student has {counts[0]} classes and the teacher {counts[1]}; a response "
                        "loss needs the same classes (a feature or relation loss does not)"
                    )
                raise ValueError(
                    f"{self.name}: the student's logits are {tuple(s.shape)} and the teacher's {tuple(t.shape)}"
                )


def class_axis(logits: Tensor) -> int:
    """Where the classes are: axis 1 of images' (B, C, H, W), the last axis of (B, C) and (B, T, C).

    >>> import torch
    >>> class_axis(torch.ones(2, 5, 8, 8)), class_axis(torch.ones(2, 7, 5))
    (1, -1)
    """
    return 1 if logits.ndim >= 4 else -1


def classes_last(logits: Tensor) -> Tensor:
    """Logits as (N, C): every position of a dense or sequence output is a row.

    >>> import torch
    >>> classes_last(torch.ones(2, 5, 8, 8)).shape
    torch.Size([128, 5])
    """
    return logits.movedim(class_axis(logits), -1).reshape(-1, logits.shape[class_axis(logits)])


def labelled(labels: Tensor) -> Tensor:
    """How many labels there are."""
    return (labels != UNLABELLED).sum()
