"""Task-oriented features: what is compared is first transformed by heads that have learned the task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Tap
from tutelage.knowledge.feature.batch_norm import BatchNorm
from tutelage.knowledge.feature.first_stage import FirstStage
from tutelage.knowledge.relation.pairs import as_map
from tutelage.knowledge.response.kd import kd_divergence
from tutelage.knowledge.response.task import task_cross_entropy
from tutelage.knowledge.rows import flat_rows
from tutelage.record import Record, in_float32, logits_of
from tutelage.schedule import Weight
from tutelage.views import Batch

Train = Literal["student", "teacher heads"]


def task_feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """‖h_s − h_t‖₂ of each sample's vectors, not squared, mean over samples.

    The authors' code takes the norm of the whole batch's difference, which grows with √B: at their B = 128, and for
    samples that are equally far apart, it is √128 times this mean. Where two vectors are equal, the gradient is zero.

    Args:
        student: (B, ...), projected to the teacher's width.
        teacher: of the same shape; no gradient flows to it.

    Returns:
        A scalar ≥ 0, and 0 for equal vectors.

    Raises:
        ValueError: the shapes differ.

    Zhang, Shi, Shi, Ma, Bao 2020, "Task-Oriented Feature Distillation",
    https://papers.neurips.cc/paper/2020/hash/a96b65a721e561e1e3de768ac819ffbb-Abstract.html

    >>> task_feature_distance(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.zeros(2, 2))
    tensor(2.5000)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"features differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return torch.linalg.vector_norm(flat_rows(student) - flat_rows(teacher.detach()), dim=1).mean()


def orthogonal_penalty(weight: Tensor) -> Tensor:
    """‖W Wᵀ − I‖_F + ‖Wᵀ W − I‖_F of a projector's matrix: 0 if it is square and orthogonal.

    Of m rows and n columns, m ≤ n, one of the two norms cannot fall below √(n − m). Both come from the smaller product,
    as ‖Wᵀ W − I‖² = ‖W Wᵀ − I‖² + n − m.

    Args:
        weight: (m, n).

    Returns:
        A scalar ≥ √|n − m|.

    Raises:
        ValueError: ``weight`` is no matrix.

    Memory: min(m, n)².

    >>> orthogonal_penalty(torch.eye(3)), orthogonal_penalty(torch.eye(3)[:2])
    (tensor(0.), tensor(1.))
    """
    if weight.ndim != 2:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected a matrix")
    weight = in_float32(weight)
    if weight.shape[0] > weight.shape[1]:
        weight = weight.T
    rows, columns = weight.shape
    product = weight @ weight.T
    norm = torch.linalg.matrix_norm(product - torch.eye(rows, dtype=weight.dtype, device=weight.device))
    # The root at 0 has no gradient, so a square matrix does not take it.
    return norm + (norm if rows == columns else (norm.square() + (columns - rows)).sqrt())


def _block(channels: int, to: int, maps: bool) -> nn.Sequential:
    if not maps:
        return nn.Sequential(nn.Conv2d(channels, to, 1, bias=False), BatchNorm(to), nn.ReLU())
    layers: list[nn.Module] = []
    for stride, out in ((2, channels), (1, to)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, out, 1, bias=False),
            BatchNorm(out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class TaskHead(nn.Module):
    """An auxiliary head: a block for every layer that follows, the mean over positions, and a linear classifier.

    A block halves the size of a map, by a depthwise 3×3 convolution of stride 2 and a pointwise one, with batch-norm
    and ReLU, then the same without stride, and takes the channels to those of the next layer, as published. Sequences
    and vectors, of which the paper has none, have one linear layer, batch-norm and ReLU for a block.

    Args:
        channels: of the layer that it reads and of those that follow.
        classes: K.
        maps: whether it reads maps.

    >>> features, logits = TaskHead([4, 8, 16], classes=3)(torch.ones(2, 4, 12, 12))
    >>> features.shape, logits.shape
    (torch.Size([2, 16]), torch.Size([2, 3]))
    """

    def __init__(self, channels: Sequence[int], classes: int, maps: bool = True):
        super().__init__()
        self.blocks = nn.Sequential(*(_block(a, b, maps) for a, b in pairwise(channels)))
        self.classifier = nn.Linear(channels[-1], classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The task-oriented vector (B, D) and the logits (B, K).

        Args:
            features: (B, C, H, W), (B, N, C) or (B, C).
        """
        vector = self.blocks(as_map(features)).mean((2, 3))
        return vector, self.classifier(vector)


@method(
    section="2.2",
    role="losses",
    paper="Zhang, Shi, Shi, Ma, Bao: Task-Oriented Feature Distillation",
    year=2020,
    link="https://papers.neurips.cc/paper/2020/hash/a96b65a721e561e1e3de768ac819ffbb-Abstract.html",
    needs=("extra stages", "extra memory"),
    use="Classifiers of several stages: what in their features serves the task, with labels and room for heads beside.",
)
class TaskOriented(FirstStage):
    """Task-oriented features: heads on both networks learn the task, and what they make of the features is compared.

    Each layer's value is the sum of

        CE(c_s, y) + soft · KL(softmax(c_t/T) ‖ softmax(c_s/T)) + feature · ‖W h_s − h_t‖ + orthogonal · Ω(W)

    of the heads' vectors h and logits c (:class:`TaskHead`), a learned projector W (linear, without bias), the distance
    of :func:`task_feature_distance` and the penalty Ω of :func:`orthogonal_penalty`; layers are summed.

    Two stages. In the first, ``TaskOriented(train="teacher heads")`` alone, the heads on the frozen teacher learn the
    labels; the student does not run. In the next, ``TaskOriented()`` beside the task, they are frozen and in eval mode,
    and the student learns with its own heads and the projectors. The authors' teacher has its heads from its own
    training, so that they shaped it too. The stages of a recipe, and :meth:`tutelage.Distillation.continue_from`, carry
    the teacher's heads over; the same ``taps`` and ``name`` must be given in both. The student itself stays what it is:
    heads and projectors belong to the loss. With sequences, padding counts in the mean over tokens.

    The authors' deepest head is the network's own classifier; here the deepest layer has a head of its own, without
    blocks, and the student's own logits are the business of other terms (``TaskLoss``, ``KD``). What is called
    published here is in the authors' code; it is not checked against the paper's text.

    Args:
        taps: the layers, first to last; by default every matched stage.
        train: ``"student"``, or ``"teacher heads"`` for the first stage.
        feature: α√128 for the authors' α = 0.05, at their batch of 128, because this mean over samples is smaller.
        orthogonal: the authors' β = 0.03.
        soft: of the heads' soft targets, 1 as in the authors' code, without T². Their cross-entropy is this KL and a
            constant.
        temperature: T at the end; it grows linearly from 1, as in the authors' code.
        weight: 1 by default: the authors' sum.
        name: of the term.

    Raises:
        ValueError: an argument out of range, logits that are not (B, K), or a second stage without the first.

    Memory: the heads and their activations; D_s · D_t for each projector.

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallCNN
    >>> student, teacher, batch = SmallCNN(4), SmallCNN(8), (torch.randn(2, 1, 8, 8), torch.tensor([3, 7]))
    >>> first = Distillation(student, teacher, losses=[TaskOriented(train="teacher heads")])
    >>> first(batch).total.backward()  # and so on, with an optimiser of first.parameters()
    >>> second = Distillation(student, teacher, losses=[TaskOriented()]).continue_from(first)
    >>> second(batch)["TaskOriented"] > 0
    tensor(True)
    """

    default_reads = "stages"
    needs_labels = True
    first_stage = 'TaskOriented(train="teacher heads")'
    students_parts = ("student_heads", "projectors")

    def __init__(
        self,
        *taps: Tap,
        train: Train = "student",
        feature: float = 0.05 * math.sqrt(128),
        orthogonal: float = 0.03,
        soft: float = 1.0,
        temperature: float = 4.0,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, first=train == "teacher heads", weight=weight, name=name)
        if train not in get_args(Train):
            raise ValueError(f"{self.name}: train={train!r}: expected one of {get_args(Train)}")
        for field, value in (("feature", feature), ("orthogonal", orthogonal), ("soft", soft)):
            if not value >= 0:
                raise ValueError(f"{self.name}: {field}={value}: expected a number of at least 0")
        if not temperature >= 1:
            raise ValueError(f"{self.name}: temperature={temperature}: expected at least 1, where it begins")
        self.feature, self.orthogonal, self.soft, self.temperature = feature, orthogonal, soft, temperature
        self.classes = 0
        self.teacher_heads = nn.ModuleList()
        self.student_heads = nn.ModuleList()
        self.projectors = nn.ModuleList()

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        chosen = super().resolve(student, teacher, batch)
        with torch.no_grad():
            logits = logits_of(batch.student.call(student))
        if logits is None or logits.ndim != 2:
            found = "none" if logits is None else f"of shape {tuple(logits.shape)}"
            raise ValueError(f"{self.name}: its heads classify whole samples: expected logits (B, K), found {found}")
        self.classes = logits.shape[1]
        return chosen

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        super().build(student, teacher, batch)
        mine, theirs = zip(*self.tensors(student, teacher), strict=True)
        self.teacher_heads = self._heads(theirs).requires_grad_(self.first)
        self.student_heads, self.projectors = nn.ModuleList(), nn.ModuleList()
        if not self.first:
            self.student_heads = self._heads(mine)
            widths = as_map(mine[-1]).shape[1], as_map(theirs[-1]).shape[1]
            self.projectors.extend(nn.Linear(*widths, bias=False).to(s) for s in mine)

    def _heads(self, layers: Sequence[Tensor]) -> nn.ModuleList:
        channels = [as_map(layer).shape[1] for layer in layers]
        heads = (TaskHead(channels[n:], self.classes, layer.ndim == 4).to(layer) for n, layer in enumerate(layers))
        return nn.ModuleList(heads)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        assert batch.labels is not None, "binding has checked it"
        losses = []
        if self.first:
            self.taught()
            for head, (_, t) in zip(self.teacher_heads, self.tensors(student, teacher), strict=True):
                losses.append(task_cross_entropy(head(t)[1], batch.labels))
            return torch.stack(losses).sum()
        temperature = 1 + (self.temperature - 1) * batch.progress
        parts = zip(self.student_heads, self.teacher_heads, self.projectors, strict=True)
        for (mine, theirs, projector), (s, t) in zip(parts, self.tensors(student, teacher), strict=True):
            (features, logits), (target, soft) = mine(s), theirs(t)
            losses.append(
                task_cross_entropy(logits, batch.labels)
                + self.soft * kd_divergence(logits, soft, temperature) / temperature**2
                + self.feature * task_feature_distance(projector(features), target)
                + self.orthogonal * orthogonal_penalty(projector.get_parameter("weight"))
            )
        return torch.stack(losses).sum()

    def train(self, mode: bool = True) -> TaskOriented:
        super().train(mode)
        if not self.first:
            self.teacher_heads.eval()
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, train={'teacher heads' if self.first else 'student'}"
