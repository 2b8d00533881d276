"""The comprehensive overhaul: features before their ReLU, compared where the teacher's say something."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.console import say
from tutelage.knowledge.base import Tap
from tutelage.knowledge.feature.pre_activation import ACTIVATIONS, PreActivationLoss
from tutelage.knowledge.relation.pairs import as_map
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.taps import Address
from tutelage.views import Batch, Inputs

Norm = nn.modules.batchnorm._BatchNorm


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """(s − τ)², τ = max(t, m), where not s ≤ τ ≤ 0; summed over channels and positions, mean over samples.

    The margin ReLU max(t, m) keeps what the teacher's ReLU lets pass, and of what it holds back only that it is
    below zero. A student that is further below zero than asked for costs nothing.

    Args:
        student: (B, C, ...), before the activation.
        teacher: of the same shape, before its activation; no gradient flows to it.
        margin: (C), negative numbers, one for each channel: :func:`batch_norm_margin`.

    Returns:
        A scalar ≥ 0, and 0 for equal tensors.

    Raises:
        ValueError: the shapes differ, or ``margin`` has not C numbers.

    Memory: linear in the features.

    Heo, Kim, Yun, Park, Kwak, Choi 2019, "A Comprehensive Overhaul of Feature Distillation",
    https://arxiv.org/abs/1904.01866

    >>> teacher, margin = torch.tensor([[2.0, -3.0, -3.0]]), torch.tensor([-1.0, -1.0, -1.0])
    >>> partial_l2(torch.tensor([[1.0, 0.0, -9.0]]), teacher, margin)  # (1 − 2)² + (0 + 1)² + nothing
    tensor(2.)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"features differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    if student.ndim < 2 or margin.shape != student.shape[1:2]:
        raise ValueError(
            f"margin of shape {tuple(margin.shape)} for features of shape {tuple(student.shape)}: expected one number "
            "for each channel, axis 1"
        )
    student, teacher = in_float32(student), in_float32(teacher.detach())
    target = teacher.maximum(margin.detach().to(teacher).view(-1, *[1] * (teacher.ndim - 2)))
    counts = (student > target) | (target > 0)
    return ((student - target) * counts).square().sum() / len(student)


def batch_norm_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """E[x | x < 0] for x ~ N(β, γ²) of each channel: β − |γ| · φ(β/|γ|) / Φ(−β/|γ|), in closed form.

    As in the authors' code, a channel that is below zero with a probability of 0.001 or less has the margin −3·|γ|.
    Where γ is 0, x is β: the margin is min(β, 0).

    Args:
        weight: (C), γ of a batch-norm layer.
        bias: (C), its β.

    Returns:
        (C), numbers ≤ 0.

    >>> batch_norm_margin(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.0, -9.0, 9.0]))
    tensor([-0.7979, -9.0000, -6.0000])
    """
    scale, bias = weight.detach().abs().double(), bias.detach().double()
    z = bias / scale.where(scale > 0, 1)
    log_below = torch.special.log_ndtr(-z)
    log_density = -z.square() / 2 - math.log(2 * math.pi) / 2
    mean = bias - scale * (log_density - log_below).exp()
    margin = torch.where(log_below > math.log(0.001), mean, -3 * scale)
    return torch.where(scale > 0, margin, bias).clamp(max=0).to(weight.dtype)


def _margin_of(norm: Norm) -> Tensor:
    if not norm.affine:
        return batch_norm_margin(torch.ones(norm.num_features), torch.zeros(norm.num_features))
    return batch_norm_margin(in_float32(norm.weight), in_float32(norm.bias))


def mean_below_zero(features: Tensor) -> Tensor:
    """(C): the mean of each channel's negative values in (B, C, ...); 0 where it has none.

    >>> mean_below_zero(torch.tensor([[-1.0, 2.0], [-3.0, 2.0], [5.0, 2.0]]))
    tensor([-2.,  0.])
    """
    rows = in_float32(features).detach().movedim(1, 0).flatten(1)
    below = rows < 0
    return (rows * below).sum(1) / below.sum(1).clamp(min=1)


@dataclass
class _Call:
    """One call of a batch-norm layer, without keeping what it returned."""

    name: str
    layer: Norm
    output: weakref.ReferenceType[Tensor]
    shape: torch.Size
    activated: bool = False


def batch_norms_before(model: nn.Module, inputs: Inputs, addresses: Sequence[str]) -> list[Norm | None]:
    """For each address, the batch-norm layer that its tensor comes from.

    The one that returned the tensor itself, or that holds the activation which reads it; or, if the tensor is the sum
    of a residual block, the block's last batch-norm that no activation follows (of its own rather than of a shortcut
    inside it), which the authors take. ``None`` if there is none of these.

    >>> from tutelage.models import resnet8
    >>> model = resnet8()
    >>> found = batch_norms_before(model, Inputs((torch.ones(2, 3, 8, 8),)), ["relu:input", "layer2.0.relu#2:input"])
    >>> found[0] is model.bn1, found[1] is model.layer2[0].bn2
    (True, True)
    """
    calls: list[_Call] = []
    found: dict[str, Norm] = {}
    times: dict[str, int] = {}
    wanted = [a for a in map(Address.parse, dict.fromkeys(addresses)) if not a.field]
    norms = {name: module for name, module in model.named_modules() if isinstance(module, Norm)}
    handles = []

    def note(name: str) -> Callable:
        def hook(layer: Norm, args: tuple, output: Tensor) -> None:
            activated = any(isinstance(part, ACTIVATIONS) for part in layer.modules())
            calls.append(_Call(name, layer, weakref.ref(output), output.shape, activated))

        return hook

    def activated(layer: nn.Module, args: tuple) -> None:
        for call in calls:
            call.activated |= bool(args) and call.output() is args[0]

    def look(address: Address, value: Any) -> None:
        tensor = address.pick(value)
        place = address.name.split(".")
        holding = [norms[n] for n in norms if address.input and address.name.startswith(f"{n}.")]
        itself = holding or [c.layer for c in calls if c.output() is tensor]
        inside = [c for c in calls if c.shape == tensor.shape and not c.activated and _common(c.name, place)]
        # sorting keeps the order of the calls among equals
        inside.sort(key=lambda c: (_common(c.name, place), -c.name.count(".")))
        if itself or inside:
            found[address.text] = itself[-1] if itself else inside[-1].layer

    def before(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            times[name] = times.get(name, 0) + 1
            for address in wanted:
                if address.input and address.name == name and address.call == times[name]:
                    given = (*args, *kwargs.values())
                    look(address, given if address.items else given[0])

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            for address in wanted:
                if not address.input and address.name == name and address.call == times[name]:
                    look(address, output)

        return hook

    # In this order: what a batch-norm returned is known before it is looked at, and looked at before it is activated.
    for name, norm in norms.items():
        handles.append(norm.register_forward_hook(note(name)))
    for name in {a.name for a in wanted}:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    for module in model.modules():
        if isinstance(module, ACTIVATIONS):
            handles.append(module.register_forward_pre_hook(activated))
    try:
        with torch.no_grad():
            inputs.call(model)
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(address) for address in addresses]


def _common(name: str, place: Sequence[str]) -> int:
    """How many parts of a module's path are those of a place."""
    count = 0
    for a, b in zip(name.split("."), place, strict=False):
        if a != b:
            break
        count += 1
    return count


class Margin(nn.Module):
    """One layer's margins, a buffer."""

    margin: Tensor

    def __init__(self, margin: Tensor):
        super().__init__()
        self.register_buffer("margin", margin)


@method(
    section="2.2",
    role="losses",
    paper="Heo, Kim, Yun, Park, Kwak, Choi: A Comprehensive Overhaul of Feature Distillation",
    year=2019,
    link="https://arxiv.org/abs/1904.01866",
    use="Convolutional networks with batch-norm before their ReLUs: strong, in one stage, beside the labels.",
)
class Overhaul(PreActivationLoss):
    """The overhaul of feature distillation: before the ReLU, the teacher's negatives cut at a margin, partial L2.

    The value is Σ_i 2^(i−L+1) · :func:`partial_l2` of L layers, beside the task's loss. A connector, 1×1 convolution
    and batch-norm, learns with the student at every layer. Sizes and the weights of layers:
    :class:`PreActivationLoss`.

    The margins (buffers, saved with the run) are the mean negative value of each of the teacher's channels, in closed
    form from the batch-norm that the tensor comes from (:func:`batch_norms_before`, :func:`batch_norm_margin`). A
    layer without one has the mean of its negative values in the first batch, and says so when binding.

    The authors' teacher runs its batch-norm with the batch's statistics: ``Frozen(teacher, batch_statistics=True)``
    does the same without changing its running averages; a plain teacher uses these.

    Args:
        taps: tensors before their activation, first to last, such as ``"layer1.0.relu#2:input"`` or a batch-norm
            layer; by default what the last activation module at each resolution reads, matched from the deepest
            backwards, which are the authors' positions in wide ResNets, and in ResNets of two-convolution blocks. A
            tensor that is nowhere negative on the first batch is refused.
        weight: by default 1/1000, the authors' for CIFAR-100, which belongs to the sum over channels and positions.
            Their ImageNet code has 1/10000, at four layers; their segmentation code 1/100000, where the layers are
            divided by numbers of their own.
        name: of the term.

    Raises:
        ValueError: no activation modules to find the taps by, shapes that cannot be compared, or a tensor after its
            activation.

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallCNN
    >>> loss = Overhaul()
    >>> d = Distillation(SmallCNN(4), SmallCNN(8), losses=[loss]).bind(torch.randn(2, 1, 8, 8))
    >>> loss.margins[0].margin[:2], len(loss.connectors)
    (tensor([-0.7979, -0.7979]), 3)
    """

    def __init__(self, *taps: Tap, weight: Weight = 0.001, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        self.margins = nn.ModuleList()
        self._known: list[Tensor | None] = []

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        chosen = super().resolve(student, teacher, batch)
        norms = batch_norms_before(teacher, batch.teacher, [t for _, t in self.pairs])
        self._known = [None if norm is None else _margin_of(norm) for norm in norms]
        return chosen

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        super().build(student, teacher, batch)
        self.margins = nn.ModuleList()
        for (_, address), (_, t), known in zip(
            self.pairs, self.tensors(student, teacher), self._known or [None] * len(self.pairs), strict=True
        ):
            if known is None:
                say(f"{self.name}: no batch-norm before teacher {address!r}; its margins are those of the first batch")
            self.margins.append(Margin((mean_below_zero(as_map(t)) if known is None else known).to(t)))

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        margins = [m.margin for m in self.margins if isinstance(m, Margin)]
        terms = zip(margins, self.layers(student, teacher), strict=True)
        return torch.stack([w * partial_l2(s, t, margin) for margin, (w, s, t) in terms]).sum()
