"""Feature aggregation search: which of the teacher's layers make up what a stage of the student learns is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.beside import SideLearner
from tutelage.catalogue import method
from tutelage.connectors import match_size, projector
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.feature.first_stage import Learned
from tutelage.knowledge.response.task import task_cross_entropy
from tutelage.record import Record, in_float32, logits_of
from tutelage.schedule import Weight
from tutelage.taps import Address, UnknownTap, expand, tappable
from tutelage.views import Batch, Inputs

Train = Literal["student", "aggregation"]
MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def aggregate(teacher: Sequence[Tensor], weights: Tensor) -> Tensor:
    """A = Σ_j α_j · T_j, of layers of one shape.

    Args:
        teacher: N features of equal shapes; no gradient flows to them.
        weights: α, (N).

    Returns:
        Of the features' shape, with a gradient to ``weights``.

    Raises:
        ValueError: other numbers or shapes.

    >>> aggregate([torch.ones(2, 3), 3 * torch.ones(2, 3)], torch.tensor([0.5, 0.5]))[0]
    tensor([2., 2., 2.])
    """
    if weights.shape != (len(teacher),) or len({tuple(t.shape) for t in teacher}) != 1:
        raise ValueError(
            f"layers of shapes {[tuple(t.shape) for t in teacher]} and weights {tuple(weights.shape)}: expected equal "
            "shapes, and a weight for each layer"
        )
    total = weights[0] * in_float32(teacher[0]).detach()
    for weight, features in zip(weights[1:], teacher[1:], strict=True):
        total = total + weight * in_float32(features).detach()
    return total


def aggregated_hint(student: Tensor, teacher: Sequence[Tensor], weights: Tensor) -> Tensor:
    """(S − A)², mean over samples, channels and positions, of the aggregation A of :func:`aggregate`.

    Maps of different sizes meet at the smaller by average pooling.

    Args:
        student: S, already connected to the teacher's channels, (B, C, H, W).
        teacher: N maps (B, C, H', W'); no gradient flows to them.
        weights: α, (N).

    Returns:
        A scalar ≥ 0, and 0 for a student that equals the aggregation.

    Raises:
        ValueError: shapes that do not fit.

    Memory: linear in the features.

    Guan et al. 2020, "Differentiable Feature Aggregation Search for Knowledge Distillation",
    https://arxiv.org/abs/2008.00506

    >>> maps = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    >>> aggregated_hint(torch.ones(2, 3, 4, 4), maps, torch.tensor([0.5, 0.5]))
    tensor(0.2500)
    """
    mine, theirs = match_size(in_float32(student), aggregate(teacher, weights))
    if mine.shape != theirs.shape:
        raise ValueError(f"features differ in shape: student {tuple(student.shape)}, teacher {tuple(theirs.shape)}")
    return F.mse_loss(mine, theirs)


def bridge_loss(
    student: Tensor,
    teacher: Sequence[Tensor],
    weights: Tensor,
    logits: Tensor,
    labels: Tensor,
    student_to_teacher: float = 1.0,
    teacher_to_student: float = 1.0,
) -> Tensor:
    """γ_ST · mean (S − A)² + γ_TS · CE(z, y): what an aggregation costs that has to be learnable and informative.

    The first path asks whether the student can say the aggregation A, which shallow layers win. The second asks what
    the rest of the student, given A instead of its own features, makes of it, which deep layers win.

    Args:
        student: S, the student's features at the teacher's channels, (B, C, H, W).
        teacher: the group's N maps (B, C, H', W'); no gradient flows to them.
        weights: α, (N).
        logits: z, of the student's later layers on the aggregation at the student's channels.
        labels: y, as for the task's cross-entropy.
        student_to_teacher: γ_ST.
        teacher_to_student: γ_TS.

    Returns:
        A scalar ≥ 0, with gradients to the student, to ``weights`` and to ``logits``.

    >>> maps = [torch.zeros(2, 3, 4, 4)]
    >>> bridge_loss(torch.ones(2, 3, 4, 4), maps, torch.ones(1), torch.zeros(2, 2), torch.tensor([0, 1]))
    tensor(1.6931)
    """
    learnable, informative = aggregated_hint(student, teacher, weights), task_cross_entropy(logits, labels)
    return student_to_teacher * learnable + teacher_to_student * informative


@method(
    section="2.2",
    role="losses",
    paper="Guan, Zhao, Wang, Zhang, Yao, Bian, Tang: Differentiable Feature Aggregation Search for Knowledge "
    "Distillation",
    year=2020,
    link="https://arxiv.org/abs/2008.00506",
    needs=("extra stages",),
    use="Deep teachers whose stages have many blocks: it is found out which of them a stage of the student learns.",
)
class FeatureAggregation(Loss):
    """Feature aggregation: each stage of the student learns a weighted sum of several layers of the teacher.

    The layers of the teacher that stand for one layer of the student are a group; α = softmax(β) are its weights. Two
    stages: in the first, ``FeatureAggregation(train="aggregation")`` alone, the weights are searched for; in the next,
    ``FeatureAggregation()`` beside the task, they stay what they are, and the student learns :func:`aggregated_hint`.
    The stages of a recipe, and :meth:`tutelage.Distillation.continue_from`, carry them over, for the same ``taps`` and
    ``name``. Weights that were found before, on other data, are given as ``aggregation``.

    The search minimises :func:`bridge_loss`, for every group, on two levels. Each batch is parted: its even samples
    teach the student and the 1×1 connectors (to the teacher's channels, and to the student's); its odd samples teach β
    alone, with an optimiser of its own (:class:`tutelage.SideLearner`). The teacher-to-student path runs the student
    once more for each group, with the aggregation in the place of the layer's output; these runs use the batch's
    statistics in batch-norm and leave the running averages alone.

    What differs from the paper, as far as its method is known here (its full text and code were not at hand): the
    weights' gradient is taken at the student as it is, DARTS's first-order approximation of the bi-level problem; all
    groups are searched at once and not one after the other; the validation samples are the other half of each batch,
    which a :class:`tutelage.TaskLoss` in the same stage would show to the student too; the regulariser of β is weight
    decay; the γ and the weight are choices of this library; and the student goes on into the second stage as the
    search left it.

    Args:
        taps: ``(student, teacher)`` pairs of maps (B, C, H, W); the pairs with the same student's address are a group,
            whose teacher's layers have equal shapes. ``("layer1", "layer1.*")`` names a group at once. By default the
            matched stages, and of the teacher's each part that is of the kind of its last one and gives maps of its
            shape, such as the blocks of a residual network. In the search the student's layers are whole outputs of
            modules.
        train: ``"student"``, or ``"aggregation"`` for the first stage, which needs labels.
        aggregation: α of each group, instead of a first stage.
        student_to_teacher: γ_ST, 1 by default.
        teacher_to_student: γ_TS, 1 by default.
        optimizer: makes the optimiser of β; by default DARTS's Adam with ``lr``, betas (0.5, 0.999) and weight decay
            1e-3.
        lr: of the default optimiser. 3e-4 is DARTS's, for searches of some ten thousand steps.
        weight: by default 1 in the first stage, and 100 in the second, as for :class:`tutelage.FitNets`, whose mean it
            shares.
        name: of the term.

    Raises:
        ValueError: groups with nothing to choose from, features that are no maps, a second stage without weights, or
            an argument out of range.

    Every call of the search in train mode is one update of β, so a step accumulated over several batches has several.
    Memory: linear in the features of all groups; the search keeps the student's activations once more for each.

    >>> from tutelage import Distillation
    >>> student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    >>> batch, pairs = (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])), (("1", "0"), ("1", "1"))
    >>> first = Distillation(student, teacher, losses=[FeatureAggregation(*pairs, train="aggregation", lr=0.1)])
    >>> first(batch).total.backward()  # and so on, with an optimiser of first.parameters()
    >>> second = Distillation(student, teacher, losses=[FeatureAggregation(*pairs)]).continue_from(first).bind(batch)
    >>> [alpha.shape for alpha in second.losses["FeatureAggregation"].alphas]
    [torch.Size([2])]
    """

    default_reads = "stages"

    def __init__(
        self,
        *taps: Tap,
        train: Train = "student",
        aggregation: Sequence[Sequence[float]] | None = None,
        student_to_teacher: float = 1.0,
        teacher_to_student: float = 1.0,
        optimizer: MakeOptimizer | None = None,
        lr: float = 3e-4,
        weight: Weight | None = None,
        name: str | None = None,
    ):
        search = train == "aggregation"
        super().__init__(*taps, weight=weight if weight is not None else 1.0 if search else 100.0, name=name)
        if train not in get_args(Train):
            raise ValueError(f"{self.name}: train={train!r}: expected one of {get_args(Train)}")
        if search and aggregation is not None:
            raise ValueError(f"{self.name}: aggregation= is the result of train='aggregation'; give one of them")
        for alpha in aggregation or ():
            if min(alpha, default=-1.0) < 0 or abs(sum(alpha) - 1) > 1e-4:
                raise ValueError(f"{self.name}: aggregation {list(alpha)}: expected weights of at least 0 with sum 1")
        for field, value in (("student_to_teacher", student_to_teacher), ("teacher_to_student", teacher_to_student)):
            if not value >= 0:
                raise ValueError(f"{self.name}: {field}={value}: expected at least 0")
        self.aggregation = aggregation
        self.search = self.needs_labels = search
        self.paths = {"student_to_teacher": student_to_teacher, "teacher_to_student": teacher_to_student}
        self.optimizer = optimizer or partial(torch.optim.Adam, lr=lr, betas=(0.5, 0.999), weight_decay=1e-3)
        self.learned = Learned()
        self.scores: SideLearner | None = None
        self._student: tuple[nn.Module, ...] = ()  # in a tuple, or nn.Module would register it

    @property
    def groups(self) -> dict[str, list[str]]:
        """The teacher's addresses of each group, by the student's."""
        groups: dict[str, list[str]] = {}
        for mine, theirs in self.pairs:
            groups.setdefault(mine, []).append(theirs)
        return groups

    @property
    def alphas(self) -> list[Tensor]:
        """α of each group, outside the autograd graph."""
        return [alpha.detach() for alpha in self._alphas()]

    def _alphas(self) -> list[Tensor]:
        assert self.scores is not None, "bind first"
        betas = list(self.scores.module.parameters())
        if self.aggregation is not None:
            return [beta.new_tensor(alpha) for alpha, beta in zip(self.aggregation, betas, strict=True)]
        return [beta.softmax(0) for beta in betas]

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        self._student = (student,)
        chosen = super().resolve(student, teacher, batch)
        if chosen:
            shapes = {line.address: line.shape for line in tappable(teacher, batch.teacher)}
            self.pairs = [(s, part) for s, t in self.pairs for part in _parts(teacher, t, shapes)]
        return chosen

    def _expand(self, student: nn.Module, teacher: nn.Module, tap: Tap) -> list[tuple[str, str]]:
        if not isinstance(tap, str) and "*" in tap[1] and "*" not in tap[0]:
            with suppress(UnknownTap):  # refused below, with the name of the term
                mine, theirs = expand(student, tap[0]), expand(teacher, tap[1])
                return [(at, part) for at in mine for part in theirs]
        return super()._expand(student, teacher, tap)

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        self.learned = Learned()
        self.to_teacher, self.to_student = nn.ModuleList(), nn.ModuleList()
        scores = nn.ParameterList()
        for mine, theirs in self.groups.items():
            s, layers = student[mine], [teacher[at] for at in theirs]
            if {x.ndim for x in (s, *layers)} != {4}:
                raise ValueError(
                    f"{self.name}: {mine!r} is of shape {tuple(s.shape)} and {theirs} of "
                    f"{[tuple(t.shape) for t in layers]}: expected maps (B, C, H, W)"
                )
            if len({tuple(t.shape) for t in layers}) != 1:
                raise ValueError(
                    f"{self.name}: the teacher's layers {theirs} stand for {mine!r} together and have the shapes "
                    f"{[tuple(t.shape) for t in layers]}: expected equal ones"
                )
            self.to_teacher.append(projector(s.shape, layers[0].shape).to(s))
            self.to_student.append(projector(layers[0].shape, s.shape).to(s).requires_grad_(self.search))
            scores.append(nn.Parameter(s.new_zeros(len(layers))))
        self.scores = SideLearner(scores, self.optimizer)

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        groups = self.groups
        if self.search:
            if max(len(theirs) for theirs in groups.values()) < 2:
                raise ValueError(
                    f"{self.name}: every group has one layer of the teacher ({groups}), so there is nothing to search "
                    "for: name several for a layer of the student, as in ('layer1', 'layer1.*')"
                )
            for mine in groups:
                address = Address.parse(mine)
                if address.field or address.input or address.items or address.call > 1 or not address.name:
                    raise ValueError(
                        f"{self.name}: the search puts the aggregation in the place of a module's output, which "
                        f"{mine!r} is not"
                    )
        elif self.aggregation is not None:
            if [len(alpha) for alpha in self.aggregation] != [len(theirs) for theirs in groups.values()]:
                raise ValueError(
                    f"{self.name}: aggregation has {[len(alpha) for alpha in self.aggregation]} weights for groups of "
                    f"{[len(theirs) for theirs in groups.values()]} layers ({groups})"
                )
        elif not bool(self.learned.yes):
            raise ValueError(
                f"{self.name}: no weights were searched for; let a stage with FeatureAggregation(train='aggregation') "
                f"of the same name ({self.name!r}) and the same layers go before, or give aggregation="
            )

    def units(self, batch: Batch) -> Tensor | int:
        return (len(batch) + 1) // 2 if self.search else len(batch)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        if not self.search:
            hints = [
                aggregated_hint(connect(student[mine]), [teacher[at] for at in theirs], alpha)
                for connect, (mine, theirs), alpha in zip(
                    self.to_teacher, self.groups.items(), self.alphas, strict=True
                )
            ]
            return torch.stack(hints).sum()
        if not (self.training and torch.is_grad_enabled() and len(batch) > 1):
            return self._bridge(student, teacher, batch, slice(None), self.alphas)
        assert self.scores is not None, "bind first"
        # Detached, or the update would free the graph that the student's own step needs.
        self.scores.update(self._bridge(student.detach(), teacher, batch, slice(1, None, 2), self._alphas()))
        self.learned.yes.fill_(True)
        return self._bridge(student, teacher, batch, slice(0, None, 2), self.alphas)

    def _bridge(self, student: Record, teacher: Record, batch: Batch, part: slice, weights: Sequence[Tensor]) -> Tensor:
        """The sum of the groups' bridge losses on a part of the batch."""
        assert batch.labels is not None, "Distillation has checked needs_labels"
        inputs = _samples(batch.student, part, len(batch))
        losses = []
        for n, (mine, theirs) in enumerate(self.groups.items()):
            s, layers = student[mine][part], [teacher[at][part] for at in theirs]
            shown = F.adaptive_avg_pool2d(self.to_student[n](aggregate(layers, weights[n])), (s.shape[2], s.shape[3]))
            logits = logits_of(_continued(self._student[0], mine, shown, inputs))
            if logits is None:
                raise ValueError(f"{self.name}: the student's output has no logits to judge an aggregation by")
            losses.append(
                bridge_loss(self.to_teacher[n](s), layers, weights[n], logits, batch.labels[part], **self.paths)
            )
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, train={'aggregation' if self.search else 'student'}"


def _parts(teacher: nn.Module, stage: str, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The children of a stage that are of its last child's kind and give maps of its shape; or the stage itself."""
    children = list(teacher.get_submodule(stage).named_children()) if stage in shapes else []
    same = [
        f"{stage}.{name}"
        for name, child in children
        if type(child) is type(children[-1][1]) and shapes.get(f"{stage}.{name}") == shapes[stage]
    ]
    return same or [stage]


def _samples(inputs: Inputs, part: slice, count: int) -> Inputs:
    """A part of a batch's samples."""

    def pick(value: object) -> object:
        return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == count else value

    return Inputs(tuple(pick(a) for a in inputs.args), {k: pick(v) for k, v in inputs.kwargs.items()})


def _continued(model: nn.Module, layer: str, features: Tensor, inputs: Inputs) -> object:
    """What the model returns where ``features`` take the place of the layer's (first) output. What comes before the
    layer runs without gradients, and no running average of batch-norm changes."""
    gradients = torch.is_grad_enabled()

    def replace(module: nn.Module, args: tuple, output: object) -> Tensor:
        handle.remove()
        torch.set_grad_enabled(gradients)
        return features.clone()  # later layers may overwrite it

    handle = model.get_submodule(layer).register_forward_hook(replace)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        with torch.no_grad():
            return inputs.call(model)
    finally:
        handle.remove()
        for norm in norms:
            norm.track_running_stats = True
