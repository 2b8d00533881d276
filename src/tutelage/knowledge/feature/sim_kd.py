"""SimKD: the student learns features for the teacher's own classifier, and keeps that classifier."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.connectors import match_size
from tutelage.evaluation import evaluating
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.classifiers import classifier_of, last_features, pooled
from tutelage.knowledge.feature.batch_norm import BatchNorm
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.taps import Observer, embedding, expand, stages
from tutelage.views import Batch, Inputs, read_batch

Example = Tensor | Mapping[str, Any] | Sequence[int]


def feature_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """(P(F_s) − F_t)², mean over samples, channels and positions, of features already projected to the same channels.

    A larger map of the teacher is average-pooled to the student's size. Nothing is normalised.

    Args:
        student: the projector's output, (B, C, H, W) or (B, C).
        teacher: (B, C, H', W') with H' ≥ H and W' ≥ W, or (B, C); no gradient flows to it.

    Returns:
        A scalar ≥ 0, and 0 for equal features.

    Raises:
        ValueError: other channels, or a student's map that is larger than the teacher's: it must be pooled *before* the
            projector, as it is when the student is used.

    Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier", https://arxiv.org/abs/2203.14001

    >>> feature_alignment(torch.zeros(2, 3, 2, 2), 2 * torch.ones(2, 3, 4, 4))
    tensor(4.)
    """
    teacher = teacher.detach()
    maps = student.ndim == teacher.ndim == 4
    if (student.ndim != teacher.ndim or student.shape[:2] != teacher.shape[:2]) or not (
        maps or student.shape == teacher.shape
    ):
        raise ValueError(
            f"features of shapes {tuple(student.shape)} (student, projected) and {tuple(teacher.shape)} (teacher) "
            "cannot be compared: expected the same channels, of two maps or two vectors"
        )
    if maps and any(s > t for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)):
        raise ValueError(
            f"the student's map {tuple(student.shape[2:])} is larger than the teacher's {tuple(teacher.shape[2:])}: "
            f"pool it before the projector, pool={_pool(student, teacher)} of ReusedClassifier"
        )
    student, teacher = in_float32(student), in_float32(teacher)
    if maps:
        student, teacher = match_size(student, teacher)
    return F.mse_loss(student, teacher)


class ReusedClassifier(nn.Module):
    """A student whose features go through a projector into the teacher's classifier, as the student role of SimKD.

    The encoder is ``student`` up to ``at``. The projector is 1×1 convolution to ``features / factor`` channels, 3×3
    convolution, 1×1 convolution to ``features``, each with batch-norm and ReLU; for vectors (B, C) without the 3×3
    one. The mean over positions goes into ``classifier``, a frozen linear layer, which is the teacher's once
    :class:`SimKD` is bound and random before. It is saved with the student and loaded with it, so the teacher is not
    needed any more.

    Args:
        student: the network, *taken over and not copied*: layers with weights that stand behind ``at`` (its own
            classifier) are replaced by the identity, since they would only be carried along.
        features: C, the channels that the teacher's classifier reads.
        classes: K of the teacher's classifier.
        at: the address of the student's last map (B, c, H, W), or of a vector (B, c); by default its last stage, and of
            a network without maps what its last linear layer reads.
        factor: r, by which the channels inside the projector are fewer; the paper's best is 2, the most channels.
        pool: the student's map is average-pooled by this much before the projector, for maps larger than the
            teacher's.
        depthwise: the 3×3 convolution is one for each channel: fewer parameters, as the paper also tries.
        rectified: whether the projector ends in a ReLU, as published; not for teachers whose last features may be
            negative.
        example: a few inputs as the loader gives them, or the shape of one input without the batch axis; by default an
            image of 64×64 with the channels of the first convolution, or a vector for the first linear layer.

    Raises:
        ValueError: the student cannot be run on the example, or there is neither a map nor a vector at ``at``.

    Memory: the encoder's and that of the projector, whose parameters are C/r · (c + C + 9·C/r), without norms.

    >>> from tutelage.models import SmallCNN
    >>> student = ReusedClassifier(SmallCNN(width=4), features=32, classes=10, at="stage3")
    >>> student(torch.zeros(2, 1, 28, 28)).shape, student.model.linear
    (torch.Size([2, 10]), Identity())
    """

    def __init__(
        self,
        student: nn.Module,
        features: int,
        classes: int,
        at: str | None = None,
        *,
        factor: int = 2,
        pool: int = 1,
        depthwise: bool = False,
        rectified: bool = True,
        example: Example | None = None,
    ):
        super().__init__()
        for name, value in (("features", features), ("classes", classes), ("factor", factor), ("pool", pool)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected a whole number of at least 1")
        inputs = _example(example, student)
        # on a copy, in train mode, where in-place dropout may overwrite the tap
        probe = copy.deepcopy(student).train()
        with torch.no_grad(), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            found = expand(student, at or _run(lambda: _last(probe, inputs), student, inputs))
            if len(found) > 1:
                raise ValueError(f"at={at!r}: expected one address, and it names {', '.join(found)}")
            self.at = found[0]
            observer = Observer(probe, found)
            feature = _run(lambda: observer.dry_run(inputs), student, inputs)[self.at]
        if feature.ndim not in (2, 4):
            raise ValueError(
                f"at={self.at!r}: a tensor of shape {tuple(feature.shape)}; "
                "a classifier is reused behind a map (B, C, H, W) or a vector (B, C)"
            )
        _drop_unused(student, probe.eval(), self.at, inputs)
        self.model = student
        self.pool = pool
        self.rectified = rectified
        self.maps = feature.ndim == 4
        self.projector = _projector(feature.shape[1], features, factor, self.maps, depthwise, rectified)
        self.classifier = nn.Linear(features, classes)
        parameter = next(student.parameters())
        self.projector.to(parameter.device, parameter.dtype)
        self.classifier.to(parameter.device, parameter.dtype).requires_grad_(False)
        self._observer = Observer(student, found)
        self._observer.copied = observer.copied

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, K)."""
        # torch.export cannot follow the end of the pass at the tap; what runs on is not used and falls away.
        self._observer.partial = not torch.compiler.is_compiling()
        feature = self._observer(Inputs(args, kwargs))[self.at]
        feature = feature.to(self.classifier.weight.dtype)  # records are in float32, the network may not be
        if self.maps and self.pool > 1:
            feature = F.avg_pool2d(feature, self.pool)
        projected = self.projector(feature if self.maps else feature[..., None, None])
        return self.classifier(projected.mean((2, 3)))

    @torch.no_grad()
    def reuse(self, classifier: nn.Linear) -> None:
        """Take a linear layer's weights over, as values of its own that do not learn.

        Raises:
            ValueError: another number of features or classes.
        """
        for name, mine, theirs in (
            ("features", self.classifier.in_features, classifier.in_features),
            ("classes", self.classifier.out_features, classifier.out_features),
        ):
            if mine != theirs:
                raise ValueError(f"ReusedClassifier: {name}={mine}, and the teacher's classifier has {theirs}")
        self.classifier.weight.copy_(classifier.weight)
        if classifier.bias is None:
            self.classifier.bias.zero_()
        else:
            self.classifier.bias.copy_(classifier.bias)


def reuse_classifier(
    student: nn.Module,
    teacher: nn.Module,
    at: str | None = None,
    *,
    factor: int = 2,
    depthwise: bool = False,
    example: Example | None = None,
) -> ReusedClassifier:
    """A :class:`ReusedClassifier` that fits a teacher: its channels, its classes, the size and sign of its features.

    Args:
        student: see :class:`ReusedClassifier`; it is taken over.
        teacher: a network of the teacher's architecture. Nothing of it is kept: its weights come when :class:`SimKD`
            is bound.
        at, factor, depthwise: see :class:`ReusedClassifier`.
        example: see :class:`ReusedClassifier`; for both networks.

    Raises:
        ValueError: a network cannot be run on the example, or no last linear layer makes the teacher's logits.

    >>> from tutelage.models import SmallCNN
    >>> student = reuse_classifier(SmallCNN(width=4), SmallCNN(width=16))
    >>> student.at, student.classifier
    ('stage3', Linear(in_features=64, out_features=10, bias=True))
    """
    with evaluating(student, teacher), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        mine, theirs = _example(example, student), _example(example, teacher)
        address = _run(lambda: last_features(teacher, theirs), teacher, theirs)
        layer = classifier_of(teacher, theirs, address)
        target = Observer(teacher, [address]).dry_run(theirs)[address]
        at = at or _run(lambda: _last(student, mine), student, mine)
        feature = _run(lambda: Observer(student, [at]).dry_run(mine)[at], student, mine)
    return ReusedClassifier(
        student,
        layer.in_features,
        layer.out_features,
        at,
        factor=factor,
        pool=_pool(feature, target) if feature.ndim == target.ndim == 4 else 1,
        depthwise=depthwise,
        rectified=bool((target >= 0).all()),
        example=example,
    )


def _example(example: Example | None, model: nn.Module) -> Inputs:
    parameter = next(model.parameters())
    if example is None:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                example = (layer.in_channels, 64, 64)
                break
            if isinstance(layer, nn.Linear):
                example = (layer.in_features,)
                break
        else:
            raise ValueError("example: expected a few inputs or their shape; the network's first layer does not tell")
    if isinstance(example, Sequence) and all(isinstance(n, int) for n in example):
        shape: tuple[int, ...] = tuple(example)
        generator = torch.Generator().manual_seed(0)
        return Inputs((torch.randn(2, *shape, generator=generator).to(parameter.device, parameter.dtype),))
    return read_batch(example).student


def _run(call: Any, model: nn.Module, inputs: Inputs) -> Any:
    try:
        return call()
    except (RuntimeError, TypeError) as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs.tensors())
        raise ValueError(
            f"{type(model).__name__} cannot be run on inputs of shape {shapes}: give example= ({error})"
        ) from error


def _last(model: nn.Module, inputs: Inputs) -> str:
    try:
        last = stages(model, inputs)[-1]
    except ValueError:
        return embedding(model, inputs)
    return last.address if len(last.shape) == 4 else embedding(model, inputs)


def _pool(student: Tensor, teacher: Tensor) -> int:
    return max(-(-s // t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))


def _drop_unused(student: nn.Module, probe: nn.Module, address: str, inputs: Inputs) -> None:
    """Replace by the identity what stands behind the tap: modules with weights that neither return before it nor are
    read by it."""
    returned: set[nn.Module] = set()
    handles = [m.register_forward_hook(lambda module, *_: returned.add(module)) for m in probe.modules()]
    probe.requires_grad_(True)
    parameters = list(probe.parameters())
    try:
        with torch.enable_grad():
            feature = Observer(probe, [address])(inputs)[address]
            found = torch.autograd.grad(feature.sum(), parameters, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    used = {p for p, gradient in zip(parameters, found, strict=True) if gradient is not None}
    dropped: tuple[str, ...] = ()
    for name, module in probe.named_modules(remove_duplicate=False):
        if not name or name.startswith(dropped) or not list(module.parameters()):
            continue
        if returned.isdisjoint(module.modules()) and used.isdisjoint(module.parameters()):
            parent, _, last = name.rpartition(".")
            setattr(student.get_submodule(parent), last, nn.Identity())
            dropped += (f"{name}.",)


def _projector(
    channels: int, features: int, factor: int, maps: bool, depthwise: bool, rectified: bool
) -> nn.Sequential:
    inner = max(1, features // factor)
    layers: list[nn.Module] = [nn.Conv2d(channels, inner, 1, bias=False), BatchNorm(inner), nn.ReLU(inplace=True)]
    if maps:
        middle = nn.Conv2d(inner, inner, 3, padding=1, groups=inner if depthwise else 1, bias=False)
        layers += [middle, BatchNorm(inner), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(inner, features, 1, bias=False), BatchNorm(features)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if rectified else []))


@method(
    section="2.2+",
    role="losses",
    paper="Chen, Mei, Zhang, Wang, Feng, Chen: Knowledge Distillation with the Reused Teacher Classifier",
    year=2022,
    link="https://arxiv.org/abs/2203.14001",
    use="The student may be a little larger than planned: it keeps the teacher's classifier and a projector before it.",
)
class SimKD(Loss):
    """The student's projected features predict the teacher's last features, whose classifier the student keeps.

    The student must be a :class:`ReusedClassifier`. When binding, the weights of the teacher's last linear layer are
    copied into it. As published it is the only loss, without labels: the classifier, the one part that a task's loss
    would teach what the features cannot, is finished already. The student's pass then ends at the projector.

    The teacher must be a network whose logits are one linear layer on the mean over positions of its last map (or on a
    vector), which is checked when binding.

    Args:
        taps: the *teacher's* last map or vector, one address; by default the last map whose mean over positions its
            classifier reads, without one what the classifier reads. A map and a vector meet as vectors.
        weight: 1 by default, as published, which goes with the mean over channels and positions of the authors' code.
        name: of the term.

    The authors' code pools a student's map that is larger than the teacher's to its size; ``ReusedClassifier(pool=)``
    divides the size by a whole number, which is the same where that is their ratio.

    Memory: linear in the features. See :func:`feature_alignment` for the formula.

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallCNN
    >>> student, teacher = ReusedClassifier(SmallCNN(width=4), 32, 10, at="stage3"), SmallCNN(width=8)
    >>> d = Distillation(student, teacher, losses=[SimKD()]).bind(torch.randn(2, 1, 28, 28))
    >>> bool((student.classifier.weight == teacher.linear.weight).all()), d.losses["SimKD"].pairs
    (True, [('projector', 'stage3')])
    """

    default_reads = "last stage"

    def __init__(self, *taps: Tap, weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        if len(taps) > 1:
            raise ValueError(f"{self.name}: taps={taps!r}: expected one, the teacher's last map or vector")

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        if teacher is student:
            raise ValueError(f"{self.name}: needs a finished teacher; here the student is taught by itself")
        if not isinstance(student, ReusedClassifier):
            raise TypeError(
                f"{self.name}: the student must be a ReusedClassifier, which holds the teacher's classifier; got "
                f"{type(student).__name__}. Wrap it: reuse_classifier(student, teacher)"
            )
        if self.taps:
            tap = self.taps[0]
            self.pairs = self._expand(student, teacher, ("projector", tap if isinstance(tap, str) else tap[1]))
        else:
            self.pairs = [("projector", last_features(teacher, batch.teacher))]
        try:
            student.reuse(classifier_of(teacher, batch.teacher, self.pairs[0][1]))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        self._rectified = student.rectified
        return not self.taps

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        ((_, theirs),) = self.tensors(student, teacher)
        if self._rectified and bool((theirs < 0).any()):
            raise ValueError(
                f"{self.name}: the teacher's features at {self.pairs[0][1]!r} are negative in places, which the "
                "projector's last ReLU cannot give: rectified=False of ReusedClassifier leaves it out"
            )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        ((mine, theirs),) = self.tensors(student, teacher)
        return feature_alignment(mine if theirs.ndim == 4 else pooled(mine), theirs)
