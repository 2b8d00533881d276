"""Response losses over large vocabularies, from hidden states: the logits of a batch are never all there at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tutelage import taps
from tutelage.knowledge.base import Loss
from tutelage.record import Record
from tutelage.taps import Observer
from tutelage.views import UNLABELLED, Batch, Inputs

CHUNK_NUMBERS = 2**23
"""How many logits (32 MiB of float32) :func:`chunked` makes at once, about."""


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
    only has to scale. It cannot be differentiated twice, and nothing but the student gets a gradient.

    Args:
        formula: ``(logits, *others) -> scalar``, a mean over its rows that treats each by itself, such as
            :func:`tutelage.functional.kd_divergence` or :func:`tutelage.functional.task_cross_entropy`.
        student: of positions (..., D).
        others: what else the formula is given of each position: the teacher's :class:`Hidden`, logits, labels.
        mask: booleans of the positions' shape; those that are False do not count. If none counts, the value is 0, with
            a gradient of 0.
        chunk: positions at a time; by default as many as have about ``CHUNK_NUMBERS`` logits.

    Returns:
        The formula's mean over all positions that count.

    Raises:
        ValueError: other numbers of positions, or a ``chunk`` below 1.

    Memory: about six times chunk · V, and the gradients of states, weight and bias; never positions · V.

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
        return replace(thing, states=tensor) if isinstance(thing, Hidden) else tensor.detach()

    if mask is not None and mask.shape != places:
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit positions of shape {tuple(places)}")
    rows, beside = flat(student), [flat(other) for other in others]
    assert isinstance(rows, Hidden)
    chunk = chunk or max(1, CHUNK_NUMBERS // len(student.weight))
    return _Chunked.apply(rows.states, rows.weight, rows.bias, (formula, rows, beside, chunk))


class _Chunked(torch.autograd.Function):
    """The gradients are taken in the forward pass, chunk by chunk, and kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, what: tuple) -> Tensor:
        formula, student, others, chunk = what
        count = len(states)
        wanted = ctx.needs_input_grad
        dtype = torch.promote_types(states.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=states.device)
        d_states = torch.zeros_like(states) if wanted[0] else None
        # in float32, or what many chunks add to a half-precision gradient would be lost
        d_weight = torch.zeros_like(weight, dtype=dtype) if wanted[1] else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if wanted[2] and bias is not None else None
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            mine = student.rows(part)
            raw = mine.raw().detach().requires_grad_(any(wanted))
            beside = [o.rows(part).logits().detach() if isinstance(o, Hidden) else o[part] for o in others]
            with torch.set_grad_enabled(any(wanted)):
                value = formula(mine.finished(raw), *beside) * (len(raw) / count)
            total += value.detach()
            if not any(wanted):
                continue
            (gradient,) = torch.autograd.grad(value, raw)
            if d_states is not None:
                torch.mm(gradient, weight, out=d_states[part])
            if d_weight is not None:
                if gradient.dtype == dtype:
                    d_weight.addmm_(gradient.T, mine.states)
                else:
                    d_weight += gradient.T @ mine.states
            if d_bias is not None:
                d_bias += gradient.sum(0)
        ctx.gradients = [
            None if d is None else d.to(own) for d, own in ((d_states, states), (d_weight, weight), (d_bias, bias))
        ]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if d is None else d * outer[0].to(d) for d in ctx.gradients), None


class InChunks(Loss):
    """A response loss on logits that are made from hidden states, some positions at a time (:func:`chunked`).

    It stands for the loss inside: ``InChunks(KD(temperature=1.0))`` and ``InChunks(TaskLoss())`` give the values and
    gradients of the two on sequences, for language models whose vocabulary makes (B, T, V) too large. As nobody reads
    the logits, the models' own heads are not run: a forward pass ends at the head's input.

    Positions labelled -100 do not count. The heads are the models' last linear layers; a scale or a soft cap of their
    logits is taken from a transformers config. What the heads give is compared with the models' own logits when the
    distillation is bound, so a head that does something else as well (an adapter, a norm) is refused.

    Args:
        loss: a loss of single positions: ``TaskLoss()``, ``KD()``, ``GeneralizedJSD()`` and others of one base.
        taps: the heads' inputs, ``"lm_head:input"``; by default those of the last linear layers.
        chunk: positions at a time; by default as many as have about ``CHUNK_NUMBERS`` logits.

    Weight and name are those of the loss inside.

    Raises:
        TypeError: a loss that compares positions with one another, or no response loss.
        ValueError: when binding, heads that give other logits than the models.

    Memory: see :func:`chunked`.

    >>> from tutelage import KD, Distillation
    >>> student, teacher = (nn.Sequential(nn.Embedding(9, d), nn.Linear(d, 9)) for d in (4, 8))
    >>> batch = {"input": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[2, 3, -100]])}
    >>> whole, parts = (Distillation(student, teacher, losses=[loss]) for loss in (KD(), InChunks(KD(), chunk=1)))
    >>> bool(torch.isclose(whole(batch).total, parts(batch).total))
    True
    """

    default_reads = "embedding"

    def __init__(self, loss: Loss, *taps: Any, chunk: int | None = None):
        if not loss.separable:
            raise TypeError(f"InChunks: {type(loss).__name__} is no response loss that treats each position by itself")
        super().__init__(*taps, weight=loss.weight, name=loss.name)
        if chunk is not None and chunk < 1:
            raise ValueError(f"InChunks: chunk={chunk}: expected 1 or more")
        self.loss, self.chunk = loss, chunk
        self.needs_labels, self.needs_teacher = loss.needs_labels, loss.needs_teacher
        self._heads: list[_Head] = []

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        self.loss.resolve(student, teacher, batch)  # for what else it looks up in the models
        self.loss.pairs = [("@logits", "@logits")]
        chosen = super().resolve(student, teacher, batch)
        if len(self.pairs) != 1:
            raise ValueError(f"{self.name}: expected one head of each model, got {self.pairs}")
        sides = [(student, batch.student, self.pairs[0][0])]
        if self.needs_teacher:
            sides.append((teacher, batch.teacher, self.pairs[0][1]))
        self._heads = [_Head.of(self.name, *side) for side in sides]
        if len({head.vocabulary for head in self._heads}) > 1:
            counts = [head.vocabulary for head in self._heads]
            raise ValueError(f"{self.name}: the heads have {counts} words; a response loss needs the same ones")
        return chosen

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        hidden = [self._heads[0].on(student[self.pairs[0][0]])]
        if self.needs_teacher:
            hidden.append(self._heads[1].on(teacher[self.pairs[0][1]]))
        beside = [] if batch.labels is None else [batch.labels]
        known = None if batch.labels is None else batch.labels != UNLABELLED
        return chunked(partial(self._formula, batch), *hidden, *beside, mask=known, chunk=self.chunk)

    def _formula(self, batch: Batch, logits: Tensor, *others: Tensor) -> Tensor:
        """The loss inside, on rows as if they were samples."""
        theirs = Record(others[0]) if self.needs_teacher else None
        labels = next((o for o in others[self.needs_teacher :]), None)
        return self.loss(Record(logits), theirs, replace(batch, labels=labels))

    def units(self, batch: Batch) -> Tensor | int:
        return self.loss.units(batch)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chunk={self.chunk}"


@dataclass(frozen=True)
class _Head:
    """The last linear layer of a model, by reference: its weights are the model's own."""

    layer: nn.Linear
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, name: str, model: nn.Module, inputs: Inputs, address: str) -> _Head:
        layer = model.get_submodule(taps.Address.parse(address).name)
        if not isinstance(layer, nn.Linear) or not address.endswith(":input"):
            raise ValueError(f"{name}: {address!r}: expected the input of a linear layer, the head of the model")
        config = getattr(model, "config", None)
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        head = cls(layer, scale, getattr(config, "final_logit_softcapping", None))
        record = Observer(model, [address, "@logits"]).dry_run(inputs)
        mine = head.on(record[address]).logits().float()
        if mine.shape != record.logits.shape or not torch.allclose(mine, record.logits.float(), rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{name}: the linear layer {address.removesuffix(':input')!r} does not give the logits of "
                f"{type(model).__name__} by itself: its head does something else as well; use the loss without InChunks"
            )
        return head

    @property
    def vocabulary(self) -> int:
        return self.layer.out_features

    def on(self, states: Tensor) -> Hidden:
        return Hidden(states.to(self.layer.weight.dtype), self.layer.weight, self.layer.bias, self.scale, self.softcap)
