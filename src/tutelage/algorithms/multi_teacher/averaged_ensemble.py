"""Several teachers as one: the average of what they predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import class_axis
from tutelage.record import in_float32, logits_of
from tutelage.views import Inputs

Average = Literal["logits", "probabilities"]


def average_logits(
    logits: Sequence[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    average: Average = "logits",
    temperature: float = 1.0,
) -> Tensor:
    """The logits of several models' averaged prediction.

    ``"logits"``: Σ w_i z_i. At any T its softmax is the normalised geometric mean of the members' softmax(z_i/T).
    ``"probabilities"``: z = T · log Σ w_i softmax(z_i/T), so softmax(z/T) is the members' arithmetic mean at this T
    (and only at this T: divided by another one, z gives neither mean).

    Args:
        logits: of each member, all (B, C), (B, T, C) or (B, C, H, W).
        weights: w_i ≥ 0, divided by their sum; equal by default.
        average: which mean.
        temperature: T > 0, which only ``"probabilities"`` depends on.

    Returns:
        Logits of the members' shape, in float32 or wider.

    Raises:
        ValueError: shapes (class counts) that differ, or an argument out of its range.

    Memory: one copy of all members' logits.

    >>> even, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    >>> average_logits([even, sure], average="probabilities").softmax(1)
    tensor([[0.2500, 0.7500]])
    >>> average_logits([even, sure])
    tensor([[ 0., 50.]])
    """
    _check(average, temperature)
    shapes = [tuple(z.shape) for z in logits]
    if any(shape != shapes[0] for shape in shapes):  # no set of them: under torch.export sizes cannot be hashed
        counts = [z.shape[class_axis(z)] for z in logits]
        raise ValueError(
            f"members differ in classes: {counts}; an average needs the same classes"
            if any(count != counts[0] for count in counts)
            else f"members' logits differ in shape: {shapes}"
        )
    stacked = torch.stack([in_float32(z) for z in logits])
    w = (
        torch.tensor(_normalised(weights, len(shapes)), dtype=torch.float64)
        .to(stacked)
        .reshape(-1, *[1] * len(shapes[0]))
    )
    if average == "logits":
        return (w * stacked).sum(dim=0)
    axis = class_axis(logits[0])
    log_p = (stacked / temperature).log_softmax(dim=axis + 1 if axis >= 0 else axis)  # 0 is now the members' axis
    return temperature * torch.logsumexp(log_p + w.log(), dim=0)


def _check(average: str, temperature: float) -> None:
    if average not in get_args(Average):
        raise ValueError(f"average={average!r}: expected one of {get_args(Average)}")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected a positive number")


def _normalised(weights: Sequence[float] | Tensor | None, members: int) -> list[float]:
    """In plain numbers, which torch.export can follow."""
    if weights is None:
        return [1 / members] * members
    w = weights.tolist() if isinstance(weights, Tensor) else [float(value) for value in weights]
    if len(w) != members or min(w) < 0 or not math.isfinite(sum(w)) or sum(w) <= 0:
        raise ValueError(f"weights={w}: expected {members} numbers >= 0, not all 0, one for each member")
    return [value / sum(w) for value in w]


@method(
    section="5.2",
    role="teacher",
    paper="Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (the ensemble as teacher)",
    year=2015,
    link="https://arxiv.org/abs/1503.02531",
    needs=("other models",),
    use="Several trained networks over the same classes, of which only one student's cost shall remain.",
)
class AveragedEnsemble(nn.Module):
    """Several networks as one teacher, whose logits are those of their averaged prediction.

    Hinton et al. name both means of the members' distributions as soft targets: the geometric one is
    ``average="logits"``, the arithmetic one ``average="probabilities"``. For the latter give the T of the loss, so that
    the mean is taken of the softened distributions that the loss compares.

    It is a plain module: as the teacher of a :class:`tutelage.Distillation` it is frozen like any other, and its
    members' taps are ``"members.0.layer2"`` and so on.

    Args:
        members: the networks, all with the same classes.
        weights: of the members, ≥ 0; equal by default.
        average: ``"logits"`` or ``"probabilities"``; see :func:`average_logits` for the formulas.
        temperature: at which probabilities are averaged.

    Raises:
        ValueError: no member, weights that do not fit, or (when called) members with different classes.
        TypeError: a member is no ``nn.Module``.

    Memory: that of all members.

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531

    >>> AveragedEnsemble([nn.Linear(4, 3), nn.Linear(4, 3)])(torch.ones(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        weights: Sequence[float] | None = None,
        average: Average = "logits",
        temperature: float = 1.0,
    ):
        super().__init__()
        networks = list(members)
        if not networks:
            raise ValueError("members: expected at least one network")
        for i, member in enumerate(networks):
            if not isinstance(member, nn.Module):
                raise TypeError(f"members[{i}]: expected an nn.Module, got {type(member).__name__}")
        _check(average, temperature)
        self.members = nn.ModuleList(networks)
        self.weights = _normalised(weights, len(networks))
        self.average: Average = average
        self.temperature = temperature

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The averaged logits of the members' answers to the same inputs."""
        inputs = Inputs(args, kwargs)
        said = [logits_of(inputs.call(member)) for member in self.members]
        if missing := [i for i, logits in enumerate(said) if logits is None]:
            raise ValueError(f"members {missing} return no logits")
        return average_logits(said, self.weights, self.average, self.temperature)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"weights={[round(w, 4) for w in self.weights]}, average={self.average}, temperature={self.temperature}"
