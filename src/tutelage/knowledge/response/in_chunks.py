"""Response losses over large vocabularies, from hidden states: the logits of a batch are never all there at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage import taps
from tutelage.console import say
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.chunks import Hidden, chunked
from tutelage.knowledge.response.liger import Fused, check_usable, deviation
from tutelage.record import Record
from tutelage.taps import Observer
from tutelage.views import UNLABELLED, Batch, Inputs


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
        chunk: positions at a time; by default what :func:`chunked` takes.
        backend: ``"liger"`` for the kernel of the package liger-kernel (extra ``liger``), on CUDA, with ``KD`` and
            ``GeneralizedJSD`` and heads without bias and soft cap. On binding its value and gradients on some
            positions are compared with ours; where they differ, that is said and ours are used. It has not been run
            on a GPU by its authors here, only in Triton's interpreter.

    Weight and name are those of the loss inside.

    Raises:
        TypeError: a loss that compares positions with one another, or no response loss, or none that the backend has.
        ValueError: when binding, heads that give other logits than the models, or that the backend cannot take.
        ImportError: when binding, the backend's package is missing.

    Memory: see :func:`chunked`.

    >>> from tutelage import KD, Distillation
    >>> student, teacher = (nn.Sequential(nn.Embedding(9, d), nn.Linear(d, 9)) for d in (4, 8))
    >>> batch = {"input": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[2, 3, -100]])}
    >>> whole, parts = (Distillation(student, teacher, losses=[loss]) for loss in (KD(), InChunks(KD(), chunk=1)))
    >>> bool(torch.isclose(whole(batch).total, parts(batch).total))
    True
    """

    default_reads = "embedding"

    def __init__(self, loss: Loss, *taps: Any, chunk: int | None = None, backend: Literal["liger"] | None = None):
        if not loss.separable:
            raise TypeError(f"InChunks: {type(loss).__name__} is no response loss that treats each position by itself")
        super().__init__(*taps, weight=loss.weight, name=loss.name)
        if chunk is not None and chunk < 1:
            raise ValueError(f"InChunks: chunk={chunk}: expected 1 or more")
        if backend not in (None, "liger"):
            raise ValueError(f"InChunks: backend={backend!r}: expected 'liger' or none")
        self.loss, self.chunk, self.backend = loss, chunk, backend
        self._fused = Fused.of(loss) if backend else None
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

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        if self._fused is None:
            return
        sides = self._hidden(student, teacher)
        check_usable(self.name, *sides)
        formula = partial(self._formula, replace(batch, labels=None))
        found, bound = deviation(self._fused, formula, *sides)
        if not found <= bound:
            say(f"{self.name}: Liger's kernel deviates by {found:.2g} (bound {bound:g}) and is not used")
            self._fused = None

    def _hidden(self, student: Record, teacher: Record) -> list[Hidden]:
        hidden = [self._heads[0].on(student[self.pairs[0][0]])]
        if self.needs_teacher:
            hidden.append(self._heads[1].on(teacher[self.pairs[0][1]]))
        return hidden

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        hidden = self._hidden(student, teacher)
        beside = [] if batch.labels is None else [batch.labels]
        known = None if batch.labels is None else batch.labels != UNLABELLED
        if self._fused is not None:
            return self._fused(hidden[0], hidden[1], known)
        return chunked(partial(self._formula, batch), *hidden, *beside, mask=known, chunk=self.chunk)

    def _formula(self, batch: Batch, logits: Tensor, *others: Tensor) -> Tensor:
        """The loss inside, on rows as if they were samples."""
        theirs = Record(others[0]) if self.needs_teacher else None
        labels = next((o for o in others[self.needs_teacher :]), None)
        return self.loss(Record(logits), theirs, replace(batch, labels=labels))

    def units(self, batch: Batch) -> Tensor | int:
        return self.loss.units(batch)

    def extra_repr(self) -> str:
        backend = "" if self.backend is None else f", backend={self.backend!r}"
        return f"{super().extra_repr()}, chunk={self.chunk}{backend}"


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
