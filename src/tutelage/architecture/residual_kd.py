"""Residual knowledge distillation: an assistant learns the error that the student's features leave, and is added."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tutelage.catalogue import method
from tutelage.connectors import match_size, projector
from tutelage.knowledge.base import Loss
from tutelage.knowledge.feature.fitnets import hint_loss
from tutelage.record import Record, in_float32, logits_of
from tutelage.schedule import Weight
from tutelage.taps import Address, Observer, UnknownTap, expand, stages
from tutelage.views import Batch, Inputs, read_batch

Part = Literal["both", "student", "assistant"]


def residual_error(student: Tensor, assistant: Tensor, teacher: Tensor, regressor: nn.Module | None = None) -> Tensor:
    """((F_t − r(F_s)) − W·F_a)², mean over samples, channels and positions, with F_s and r held fixed.

    The assistant mimics the error that the student leaves *now*. W is the linear part of r, so that
    r(F_s) + W·F_a = r(F_s + F_a): what the assistant leaves of the error is what the sum of the two leaves of the
    teacher's features. Without a regressor r and W are the identity. The student's own term is
    :func:`tutelage.functional.hint_loss` of r(F_s).

    Args:
        student: F_s, (B, C, H, W), (B, N, C) or (B, C); no gradient flows to it.
        assistant: F_a, of the same shape.
        teacher: F_t, of the shape of r(F_s); no gradient flows to it.
        regressor: r, an affine map of the channels; no gradient flows to it.

    Returns:
        A scalar ≥ 0; nothing is normalised.

    Raises:
        ValueError: the shapes differ.

    >>> residual_error(torch.zeros(2, 3), torch.ones(2, 3), 3 * torch.ones(2, 3))
    tensor(4.)
    """
    if student.shape != assistant.shape:
        raise ValueError(
            f"features differ in shape: student {tuple(student.shape)}, assistant {tuple(assistant.shape)}"
        )
    both = in_float32(student).detach() + in_float32(assistant)
    if regressor is not None:
        both = functional_call(regressor, {n: p.detach() for n, p in regressor.named_parameters()}, both)
    return hint_loss(both, teacher)


@dataclass
class AssistedOutput:
    """What an :class:`Assisted` student says.

    Args:
        logits: of the student, from the sum of both features.
        feature: F_s, the student's own.
        residual: F_a, what the assistant adds to it.
    """

    logits: Tensor
    feature: Tensor
    residual: Tensor


class Assisted(nn.Module):
    """A student with an assistant whose features are added to its own, as the student role of :class:`ResidualKD`.

    At one module of the student its output F_s becomes F_s + F_a, and the rest of the student, its classifier among
    it, reads the sum. F_a is the assistant's output at ``assistant_at`` after a 1×1 convolution or linear layer without
    a bias: it fits the channels, and gives both signs to features that come from a ReLU. Layers of the assistant after
    that address are not used and may be left out of it.

    Args:
        student: the network; its modules keep their names under ``student.``.
        assistant: a smaller one, which sees the same inputs.
        at: the student's module; by default its last stage.
        assistant_at: the assistant's; by default its last stage.
        example: a few inputs, as the loader gives them, or the shape of one input without the batch axis, as in
            ``(1, 28, 28)``.

    Raises:
        ValueError: an address that names no module, or features that do not fit by their number of axes and size.

    Memory: that of both networks.

    >>> from tutelage.models import SmallCNN
    >>> both = Assisted(SmallCNN(width=6), SmallCNN(width=4), example=(1, 28, 28))
    >>> output = both(torch.zeros(2, 1, 28, 28))
    >>> output.logits.shape, output.feature.shape == output.residual.shape
    (torch.Size([2, 10]), True)
    """

    def __init__(
        self,
        student: nn.Module,
        assistant: nn.Module,
        at: str | None = None,
        assistant_at: str | None = None,
        *,
        example: Tensor | Mapping[str, Any] | Sequence[int],
    ):
        super().__init__()
        if student is assistant:
            raise ValueError("assistant: this is the student object itself; give another network")
        inputs = _example(example, student)
        with torch.no_grad(), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            # on copies, whose statistics may move, in train mode, where in-place dropout may overwrite a tap
            copies = [copy.deepcopy(network).train() for network in (student, assistant)]
            given = zip(copies, (at, assistant_at), strict=True)
            found = [_module(m, a or stages(m, inputs)[-1].address, inputs) for m, a in given]
            observers = [Observer(m, [address]) for m, address in zip(copies, found, strict=True)]
            mine, theirs = (o.dry_run(inputs)[a] for o, a in zip(observers, found, strict=True))
        fits = mine.ndim == theirs.ndim and (
            mine.shape[2:] == theirs.shape[2:] if mine.ndim == 4 else mine.shape[1:-1] == theirs.shape[1:-1]
        )
        if not fits:
            raise ValueError(
                f"assistant_at={found[1]!r}: features of shape {tuple(theirs.shape)} cannot be added to the student's "
                f"{tuple(mine.shape)} at {found[0]!r}: they may differ in channels alone"
            )
        self.at, self.assistant_at = found
        self.student, self.assistant = student, assistant
        parameter = next(student.parameters())
        self.projector = projector(theirs.shape, mine.shape, bias=False).to(parameter.device, parameter.dtype)
        self._observer = Observer(assistant, [self.assistant_at])
        self._observer.copied = observers[1].copied

    def forward(self, *args: Any, **kwargs: Any) -> AssistedOutput:
        """The student's logits with the assistant's help, and both features."""
        inputs = Inputs(args, kwargs)
        # torch.export cannot follow the end of the pass at the tap; what runs on is not used and falls away
        self._observer.partial = not torch.compiler.is_compiling()
        tapped = self._observer(inputs)[self.assistant_at]
        residual = self.projector(tapped.to(next(self.projector.parameters()).dtype))  # records are in float32
        caught: list[Tensor] = []

        def add(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            caught.append(output)
            return output + residual

        handle = self.student.get_submodule(self.at).register_forward_hook(add)
        try:
            logits = logits_of(inputs.call(self.student))
        finally:
            handle.remove()
        if logits is None:
            raise ValueError(f"student: {type(self.student).__name__} returns no logits")
        return AssistedOutput(logits, caught[0], residual)


def _example(example: Any, student: nn.Module) -> Inputs:
    if isinstance(example, Sequence) and all(isinstance(n, int) for n in example):
        parameter = next(student.parameters())
        return Inputs((torch.zeros(2, *example, device=parameter.device, dtype=parameter.dtype),))
    return read_batch(example).student


def _module(network: nn.Module, text: str, inputs: Inputs) -> str:
    """The name of a module that is called once and returns a tensor."""
    found, address = expand(network, text), Address.parse(text)
    if len(found) != 1 or address.field or address.input or address.items or address.call != 1 or not address.name:
        raise UnknownTap(f"{text!r}: expected the name of one module, whose output is a tensor")
    calls: list[str] = []
    handle = network.get_submodule(found[0]).register_forward_hook(lambda *_: calls.append(text))
    try:
        inputs.call(network)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise UnknownTap(f"{text!r}: expected a module that a forward pass calls once; this one {len(calls)} times")
    return found[0]


def split_width(width: int, share: float = 0.75) -> tuple[int, int]:
    """Widths of a student and its assistant that together cost no more than one network of ``width``.

    The cost of a convolutional network grows with the square of its width, so they are ⌊w·√share⌋ and ⌊w·√(1 − share)⌋.

    Args:
        width: of the network that is split.
        share: the part of its cost that the student gets.

    Raises:
        ValueError: a share that is not between 0 and 1, or one that leaves somebody no channel.

    >>> split_width(16)
    (13, 8)
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}: expected a number between 0 and 1")
    mine, theirs = int(width * share**0.5), int(width * (1 - share) ** 0.5)
    if min(mine, theirs) < 1:
        raise ValueError(f"width={width}, share={share}: leaves widths {mine} and {theirs}; expected 1 or more")
    return mine, theirs


@method(
    section="4",
    role="losses",
    paper="Gao, Wang, Wan: Residual Error Based Knowledge Distillation",
    year=2021,
    link="https://arxiv.org/abs/2002.09168",
    needs=("other models",),
    use="A fixed budget split between a student and an assistant that corrects its features: one module at the end.",
)
class ResidualKD(Loss):
    """Residual error: the student mimics the teacher's feature map, its assistant the error between the two.

    The student role must be an :class:`Assisted`. The value is (r(F_s) − F_t)², from which the student's features and
    the regressor r between unequal channels learn, and :func:`residual_error`, from which the assistant does. Losses
    beside it (:class:`tutelage.TaskLoss`, :class:`tutelage.KD`) read the logits of the sum and teach both. Where
    teacher's and student's maps differ in size, the larger is average-pooled.

    The paper trains both at once or one after the other. The second are two stages, ``part="student"`` and then
    ``part="assistant"``, whose regressor goes on from the first.

    From the paper are the two terms, the sum, these two schemes, and that both networks come from one network's budget
    without costing more, for which :func:`split_width` is the straight way. Only summaries of its text could be had,
    and no code was found: how it separates the two, at how many layers it adds, and its weights could not be
    checked. Here there is one place.

    Args:
        at: the teacher's address; by default its last stage.
        part: ``"student"`` or ``"assistant"`` for one of the two terms.
        weight: 100 by default, as for hints with the mean over channels and positions; not the paper's.
        name: of the term.

    Raises:
        ValueError: an unknown part.
        TypeError: when bound, if the student is no :class:`Assisted`.

    Memory: linear in the features.

    Gao, Shen, Li, Loy 2020, "Residual Knowledge Distillation", and Gao, Wang, Wan 2021, "Residual Error Based Knowledge
    Distillation", Neurocomputing 433, https://arxiv.org/abs/2002.09168

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallCNN
    >>> both = Assisted(SmallCNN(width=3), SmallCNN(width=2), example=(1, 28, 28))
    >>> d = Distillation(both, SmallCNN(width=8), losses=[ResidualKD("stage3")]).bind(torch.zeros(2, 1, 28, 28))
    >>> d.losses["ResidualKD"].regressor
    Conv2d(12, 32, kernel_size=(1, 1), stride=(1, 1))
    """

    default_reads = "last stage"

    def __init__(self, at: str | None = None, part: Part = "both", *, weight: Weight = 100.0, name: str | None = None):
        super().__init__(*([] if at is None else [("@feature", at)]), weight=weight, name=name)
        if part not in get_args(Part):
            raise ValueError(f"part={part!r}: expected one of {get_args(Part)}")
        self.part = part
        self.regressor: nn.Module | None = None

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        if not isinstance(student, Assisted):
            raise TypeError(f"student: {self.name} teaches a tutelage Assisted student, got {type(student).__name__}")
        if self.taps:
            chosen = super().resolve(student, teacher, batch)
        else:
            self.pairs, chosen = [("@feature", stages(teacher, batch.teacher)[-1].address)], True
        if len(self.pairs) != 1:
            raise UnknownTap(f"{self.name}: expected one address of the teacher, got {[t for _, t in self.pairs]}")
        self.pairs.append(("@residual", self.pairs[0][1]))
        return chosen

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        (mine, theirs), _ = self.tensors(student, teacher)
        axis = 1 if mine.ndim == 4 else -1
        same = mine.ndim == theirs.ndim and mine.shape[axis] == theirs.shape[axis]
        self.regressor = None if same else projector(mine.shape, theirs.shape).to(mine)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        (feature, target), (residual, _) = self.tensors(student, teacher)
        if feature.ndim == 4:
            residual, _ = match_size(residual, target)  # pooling is linear, so it commutes with the sum
            feature, target = match_size(feature, target)
        terms = []
        if self.part != "assistant":
            terms.append(hint_loss(feature if self.regressor is None else self.regressor(feature), target))
        if self.part != "student":
            terms.append(residual_error(feature, residual, target, self.regressor))
        return torch.stack(terms).sum()
