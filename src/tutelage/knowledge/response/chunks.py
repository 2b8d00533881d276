"""A formula over a large vocabulary from hidden states: logits are made, used and differentiated some at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Gradients = tuple[Tensor | None, ...]
"""By states, weight and bias."""


@dataclass(frozen=True)
class Hidden:
    """Logits that are not there yet: z = cap(scale · (h·Wᵀ + b)), where cap(z) = softcap · tanh(z / softcap).

    Args:
        states: h, (..., D).
        weight: W, (V, D).
        bias: b, (V).
        scale: of the logits.
        softcap: the bound of soft-capped logits, as Gemma 2 has them.

    >>> Hidden(torch.ones(2, 3), torch.ones(5, 3), scale=0.5).logits()
    tensor([[1.5000, 1.5000, 1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000, 1.5000, 1.5000]])
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def raw(self) -> Tensor:
        """h·Wᵀ + b."""
        return nn.functional.linear(self.states, self.weight, self.bias)

    def finished(self, raw: Tensor) -> Tensor:
        """Scaled and capped, in float32 or wider where something has to be done."""
        if self.scale != 1.0 or self.softcap is not None:
            raw = raw.to(torch.promote_types(raw.dtype, torch.float32)) * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def logits(self) -> Tensor:
        """All logits at once."""
        return self.finished(self.raw())

    def rows(self, index: slice | Tensor) -> Hidden:
        """Some of the positions."""
        return replace(self, states=self.states[index])


def chunked(
    formula: Callable[..., Tensor],
    student: Hidden,
    *others: Hidden | Tensor,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """A response formula of the student's logits, which are made, used and differentiated some positions at a time.

    The value and the gradients of the student's states, weight and bias are those of
    ``formula(student.logits(), ...)``: each chunk's gradient is taken while its logits are there, so the backward pass
    only has to scale. It cannot be differentiated twice, and nothing but the student gets a gradient. What needs none
    (a frozen head, an evaluation under ``torch.no_grad``) costs none. Autocast does not reach inside: states are
    brought to the weights' precision.

    Args:
        formula: ``(logits, *others) -> scalar``, a mean over its rows that treats each by itself, such as
            :func:`tutelage.functional.kd_divergence` or :func:`tutelage.functional.task_cross_entropy`.
        student: of positions (..., D).
        others: what else the formula is given of each position: the teacher's :class:`Hidden`, logits, labels.
        mask: booleans of the positions' shape; those that are False do not count. If none counts, the value is 0, with
            a gradient of 0.
        chunk: positions at a time; by default as many as have 16 MiB of float32 logits on a processor and 128 MiB
            elsewhere, and 64 at least.

    Returns:
        The formula's mean over all positions that count.

    Raises:
        ValueError: other numbers of positions, or a ``chunk`` below 1.
        RuntimeError: a backward pass with ``create_graph=True``.

    Memory: about ten to twenty times chunk · V, as the formula is (by default 0.2 to 0.4 GB on a processor), and twice
    the gradients of states, weight and bias in the backward pass; never positions · V.

    >>> from tutelage.functional import kd_divergence
    >>> student = Hidden(torch.randn(2, 5, 4), torch.randn(9, 4, requires_grad=True))
    >>> teacher = Hidden(torch.randn(2, 5, 6), torch.randn(9, 6))
    >>> direct = kd_divergence(student.logits(), teacher.logits())
    >>> bool(torch.isclose(chunked(kd_divergence, student, teacher, chunk=3), direct))
    True
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: expected 1 or more")
    places = student.states.shape[:-1]

    def flat(thing: Hidden | Tensor) -> Hidden | Tensor:
        tensor = thing.states if isinstance(thing, Hidden) else thing
        if tensor.shape[: len(places)] != places:
            raise ValueError(f"positions of shape {tuple(tensor.shape)} beside the student's {tuple(places)}")
        tensor = tensor.reshape(-1, *tensor.shape[len(places) :])
        tensor = tensor if mask is None else tensor[mask.reshape(-1)]
        # to the weights' precision, as autocast is off
        return replace(thing, states=tensor.to(thing.weight.dtype)) if isinstance(thing, Hidden) else tensor.detach()

    if mask is not None and mask.shape != places:
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit positions of shape {tuple(places)}")
    rows, beside = flat(student), [flat(other) for other in others]
    assert isinstance(rows, Hidden)
    chunk = chunk or _positions(len(rows.weight), rows.weight.device.type)
    compute = partial(_summed, formula, rows, beside, chunk)
    # Inside a function of its own autograd never records, so whether anybody wants gradients has to be asked here.
    return Eager.apply(rows.states, rows.weight, rows.bias, compute, torch.is_grad_enabled())


def _positions(words: int, device: str) -> int:
    """Positions of a chunk, from the vocabulary.

    A processor's allocator hands blocks below 32 MiB out again, and has larger ones mapped and cleared anew each time.
    A GPU's does not, and wants wide products. With fewer than 64 positions, reading the heads' weights and adding to
    their gradients takes longer than the products do.
    """
    return max(64, (2**22 if device == "cpu" else 2**25) // words)


def _summed(
    formula: Callable[..., Tensor],
    student: Hidden,
    others: list[Hidden | Tensor],
    chunk: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Gradients]:
    """The formula's mean over all rows, and its gradients by states, weight and bias as far as they are wanted."""
    states, weight, bias = student.states, student.weight, student.bias
    count = len(states)
    # in float32, or what many chunks add to a half-precision gradient would be lost
    dtype = torch.promote_types(states.dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=states.device)
    d_states = torch.empty_like(states) if wanted[0] else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
    d_bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] and bias is not None else None

    def one(part: slice) -> Tensor | None:
        """Add a chunk's share to the total; its gradient by the raw logits. All else of it is let go on return."""
        raw = student.rows(part).raw().detach().requires_grad_(any(wanted))
        beside = [o.rows(part).logits().detach() if isinstance(o, Hidden) else o[part] for o in others]
        with torch.set_grad_enabled(any(wanted)):
            value = formula(student.finished(raw), *beside) * (len(raw) / count)
        total.add_(value.detach())
        return torch.autograd.grad(value, raw)[0] if any(wanted) else None

    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        gradient = one(part)
        if gradient is None:
            continue
        if d_states is not None:
            torch.mm(gradient, weight, out=d_states[part])
        if d_weight is not None and gradient.dtype == dtype:
            d_weight.addmm_(gradient.T, states[part])
        elif d_weight is not None:
            d_weight += gradient.T @ states[part]
        if d_bias is not None:
            d_bias += gradient.sum(0)
        del gradient  # before the next chunk's logits
    return total, (d_states, d_weight, d_bias)


class Eager(torch.autograd.Function):
    """A value whose gradients by states, weight and bias are taken with it, so that the backward pass only scales them.

    ``apply(states, weight, bias, compute, learning)``: ``compute(wanted)`` gives the value and the three gradients,
    ``learning`` says whether anybody will want one. It runs with autocast off.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute: Callable[[tuple[bool, ...]], tuple[Tensor, Gradients]],
        learning: bool,
    ) -> Tensor:
        wanted = tuple(wanted and learning for wanted in ctx.needs_input_grad[:3])
        with torch.autocast(states.device.type, enabled=False):
            value, gradients = compute(wanted)
        own = (states, weight, bias)
        # saved, not kept: autograd lets go of what is saved after the backward pass, though the value is still there
        ctx.save_for_backward(*(d if d is None else d.to(x) for d, x in zip(gradients, own, strict=True)))
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of the gradients is wanted, in which these would be constants
            raise RuntimeError(
                "a loss in chunks cannot be differentiated twice (create_graph=True): its gradients are taken with its "
                "value; calculate it from all logits"
            )
        return *(None if d is None else d * outer[0].to(d) for d in ctx.saved_tensors), None, None
