"""Be your own teacher: exits along a network learn from its deepest layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.taps import Observer, UnknownTap, embedding, expand
from tutelage.teachers import Lesson, Teacher
from tutelage.views import Batch, Inputs, example_inputs


@dataclass
class ExitsOutput:
    """What a network with exits says.

    Args:
        logits: (B, K), the network's own: the deepest exit.
        exits: (B, K) of each shallow exit, in the order of ``Exits.at``.
        features: (B, D) of each shallow exit, before its classifier.
        feature: (B, D), what the network's own classifier reads.
    """

    logits: Tensor
    exits: list[Tensor]
    features: list[Tensor]
    feature: Tensor


class Exits(nn.Module):
    """Any classifier with exits along its way, as the student role. The network inside, ``exits.model``, is unchanged.

    Each exit reads one tap. A bottleneck brings it to the D channels of the vector that the network's last linear
    layer reads, and a linear classifier follows. For a feature map (B, C, H, W) the bottleneck is 1×1 convolution to
    ``width``, a strided one down to about 4×4, 1×1 to D, each with batch-norm and ReLU, then the mean over
    positions; for (B, N, C) a layer norm, a linear layer, GELU and the mean over tokens (padding counts too); for
    (B, C) a linear layer and ReLU.

    Args:
        model: the network, whose logits are (B, K).
        at: the addresses of the exits (:mod:`tutelage.taps`), first to last.
        example: a few inputs, as the loader gives them, or the shape of one input without the batch axis, as in
            ``(3, 32, 32)``; the exits are built from the shapes found with it.
        feature: the address of the deepest feature; by default the input of the last linear layer.
        width: the channels inside the convolutional bottleneck.

    Raises:
        ValueError: no address, one that names nothing, or a tensor there that no exit can be built for.

    Memory: that of the network and, for each exit, its bottleneck.

    >>> from tutelage.models import SmallCNN
    >>> student = Exits(SmallCNN(width=4), at=["stage1", "stage2"], example=(1, 28, 28))
    >>> output = student(torch.zeros(2, 1, 28, 28))
    >>> output.logits.shape, [e.shape for e in output.exits], output.features[0].shape == output.feature.shape
    (torch.Size([2, 10]), [torch.Size([2, 10]), torch.Size([2, 10])], True)
    """

    def __init__(
        self,
        model: nn.Module,
        at: Sequence[str],
        example: Tensor | Mapping[str, Any] | Sequence[int],
        feature: str | None = None,
        width: int = 128,
    ):
        super().__init__()
        if isinstance(at, str) or not at:
            raise ValueError(f"at={at!r}: expected a list of addresses with at least one exit")
        inputs = example_inputs(example, model)
        self.at = [address for text in at for address in expand(model, text)]
        # Looked at in train mode, where in-place dropout may overwrite a tap; on a copy, whose statistics may move.
        probe = copy.deepcopy(model).train()
        with torch.no_grad(), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            self.feature_address = feature or embedding(probe, inputs)
            observer = Observer(probe, [*self.at, self.feature_address, "@logits"])
            record = observer.dry_run(inputs)
        deepest, logits = record[self.feature_address], record.logits
        if deepest.ndim != 2 or logits.ndim != 2:
            raise ValueError(
                f"exits: expected a deepest feature (B, D) and logits (B, K), got {tuple(deepest.shape)} at "
                f"{self.feature_address!r} and {tuple(logits.shape)}; name the address of a vector with feature="
            )
        self.model = model
        self.bottlenecks = nn.ModuleList(_bottleneck(a, record[a], deepest.shape[1], width) for a in self.at)
        self.classifiers = nn.ModuleList(nn.Linear(deepest.shape[1], logits.shape[1]) for _ in self.at)
        parameter = next(model.parameters())
        self.bottlenecks.to(parameter.device, parameter.dtype)
        self.classifiers.to(parameter.device, parameter.dtype)
        self._observer = Observer(model, [*self.at, self.feature_address, "@logits"])
        self._observer.copied = observer.copied

    def forward(self, *args: Any, **kwargs: Any) -> ExitsOutput:
        """The network's own logits and every exit's."""
        record = self._observer(Inputs(args, kwargs))
        dtype = next(self.classifiers.parameters()).dtype  # records are in float32, the network may not be
        features = [b(record[a].to(dtype)) for a, b in zip(self.at, self.bottlenecks, strict=True)]
        exits = [c(f) for c, f in zip(self.classifiers, features, strict=True)]
        return ExitsOutput(record.logits, exits, features, record[self.feature_address])


def _bottleneck(address: str, tapped: Tensor, channels: int, width: int) -> nn.Module:
    if tapped.ndim == 4:
        stride = max(1, min(tapped.shape[2:]) // 4)
        return nn.Sequential(
            nn.Conv2d(tapped.shape[1], width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, stride, stride=stride, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    if tapped.ndim == 3:
        size = tapped.shape[2]
        return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, channels), nn.GELU(), _MeanOfTokens())
    if tapped.ndim == 2:
        return nn.Sequential(nn.Linear(tapped.shape[1], channels), nn.ReLU())
    raise ValueError(
        f"at: {address!r} is a tensor of shape {tuple(tapped.shape)}; "
        "an exit is built on (B, C, H, W), (B, N, C) or (B, C)"
    )


class _MeanOfTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def hint_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """‖F_s − F_t‖², the squared L2 distance of two features, mean over samples.

    Args:
        student: (B, D) or any (B, ...).
        teacher: the same shape; no gradient flows to it.

    Returns:
        A scalar ≥ 0, and 0 for equal features.

    Raises:
        ValueError: the shapes differ.

    >>> hint_distance(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2))
    tensor(2.5000)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"features differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return (in_float32(student) - in_float32(teacher).detach()).flatten(1).square().sum(dim=1).mean()


class ExitHint(Loss):
    """The hint of the deepest feature for each exit: squared L2 distance, mean over samples.

    Args:
        taps: which features; ``"@feature"`` by default.
        weight: λ, 0.03 by default.
        name: of the term.

    Memory: linear in the features. See :func:`hint_distance` for the formula.

    >>> ExitHint().taps, ExitHint().weight
    (('@feature',), 0.03)
    """

    def __init__(self, *taps: Tap, weight: Weight = 0.03, name: str | None = None):
        super().__init__(*(taps or ("@feature",)), weight=weight, name=name)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        return torch.stack([hint_distance(s, t) for s, t in self.tensors(student, teacher)]).mean()

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        for s, t in self.tensors(student, teacher):
            if s.shape != t.shape:
                raise ValueError(
                    f"{self.name}: the exit's feature is {tuple(s.shape)} and the deepest {tuple(t.shape)}"
                )


@method(
    section="3.3",
    role="teacher",
    paper="Zhang, Song, Gao, Chen, Bao, Ma: Be Your Own Teacher",
    year=2019,
    link="https://arxiv.org/abs/1905.08094",
    needs=("labels", "several layers"),
    use="No teacher at all, or a network that shall be able to answer early, at an exit on its way.",
)
class BeYourOwnTeacher(Teacher):
    """The deepest exit of a network teaches its shallow ones; itself, it learns from the labels alone.

    The student role must be :class:`Exits`. With :meth:`losses` the total is

        CE(z, y) + Σ_i [ (1−α) · CE(z_i, y) + α · KL(softmax(z/T) ‖ softmax(z_i/T)) + λ · ‖F_i − F‖² ]

    over the shallow exits i, where z and F, the deepest logits and feature, are detached inside the sum. The
    gradient of the sum flows through each exit into the layers below it, never above.

    Losses read ``"@logits"`` and ``"@feature"`` of each exit; any other loss on these two may be added or substituted.

    The KL has no T² in the authors' code, so :meth:`losses` gives ``KD`` (which has it) the weight α/T². The squared
    hint, on vectors after the mean over positions, is that of the conference paper; the code released later, where
    λ = 0.03 comes from, takes the norm of the whole batch's difference after one more linear layer.

    Args:
        alpha: α, the share of the deepest exit's prediction in a shallow exit's target, 0 ≤ α < 1.

    Raises:
        ValueError: α outside its range.

    Zhang, Song, Gao, Chen, Bao, Ma 2019, "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks
    via Self Distillation", https://arxiv.org/abs/1905.08094

    >>> from tutelage import Distillation
    >>> from tutelage.models import MLP
    >>> student, teacher = Exits(MLP(8, (16, 16), 3), at=["hidden.0"], example=(8,)), BeYourOwnTeacher()
    >>> losses = Distillation(student, teacher, losses=teacher.losses())((torch.randn(4, 8), torch.zeros(4).long()))
    >>> sorted(losses.values), losses.weights["TaskLoss"]
    (['ExitHint', 'KD', 'TaskLoss'], 0.7)
    """

    def __init__(self, alpha: float = 0.3):
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"BeYourOwnTeacher: alpha={alpha}: expected 0 <= alpha < 1")
        self.alpha = alpha

    def losses(self, temperature: float = 3.0, hint: float = 0.03) -> list[Loss]:
        """The published terms.

        Args:
            temperature: T of the KL.
            hint: λ.
        """
        return [
            TaskLoss(weight=1 - self.alpha),
            KD(temperature=temperature, weight=self.alpha / temperature**2),
            ExitHint(weight=hint),
        ]

    def names(self, student: nn.Module) -> tuple[nn.Module, nn.Module]:
        if not isinstance(student, Exits):
            raise TypeError(f"student: BeYourOwnTeacher teaches tutelage Exits, got {type(student).__name__}")
        return student, student

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        for address in student_reads + teacher_reads:
            if address not in ("@logits", "@feature"):
                raise UnknownTap(f"{address!r}: an exit has '@logits' and '@feature', and nothing else to compare")
        return ["@logits"]  # any @ address asks for the whole output, which lessons() takes apart

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        said: ExitsOutput = student.output
        deepest = Record(said.logits, {"@feature": in_float32(said.feature)})
        target = deepest.detach()
        shallow = [
            Lesson(Record(logits, {"@feature": in_float32(feature)}), target, key=f"exit_{i}")
            for i, (logits, feature) in enumerate(zip(said.exits, said.features, strict=True))
        ]
        # TaskLoss weighs 1−α for everybody; the deepest exit, which has no teacher, learns from the labels fully.
        return [Lesson(deepest, None, 1 / (1 - self.alpha), key="deepest"), *shallow]
