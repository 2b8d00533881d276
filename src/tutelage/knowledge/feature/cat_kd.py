"""CAT-KD: where each class is seen. The class activation maps of the teacher, for the student's own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.evaluation import evaluating
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.classifiers import classifier_of
from tutelage.knowledge.rows import unit_rows
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch


def class_activation_maps(features: Tensor, classifier: Tensor) -> Tensor:
    """Σ_c W_kc · F_c at every position: what a linear classifier on the mean over positions says of each alone.

    Their mean over positions is the logits without the bias.

    Args:
        features: F (B, C, H, W).
        classifier: W (K, C).

    Returns:
        (B, K, H, W), of which B·K·H·W is the memory; at least float32.

    Raises:
        ValueError: no map, or another number of channels.

    Zhou et al. 2016, "Learning Deep Features for Discriminative Localization", https://arxiv.org/abs/1512.04150

    >>> import torch
    >>> class_activation_maps(torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]]), torch.tensor([[1.0, 1.0], [3.0, 0.0]]))
    tensor([[[[1., 2.]],
    <BLANKLINE>
             [[3., 0.]]]])
    """
    if features.ndim != 4 or classifier.shape[1:] != features.shape[1:2]:
        raise ValueError(
            f"features {tuple(features.shape)} and a classifier {tuple(classifier.shape)}: "
            "expected (B, C, H, W) and (K, C)"
        )
    features = in_float32(features)
    return F.conv2d(features, classifier.to(features)[:, :, None, None])


def class_attention(
    student: Tensor, teacher: Tensor, size: int = 2, normalise: bool = True, binarise: bool = False
) -> Tensor:
    """(A_s / ‖A_s‖ − A_t / ‖A_t‖)², mean over samples, classes and positions, of pooled class activation maps A.

    Each map is average-pooled to ``size`` × ``size``, then divided by its own L2 norm over these positions. The paper
    sums the squares over positions; the authors' code, to which the published weights belong, takes this mean.

    Args:
        student: class activation maps (B, K, H, W).
        teacher: (B, K, H', W'); no gradient flows to them.
        size: of the pooled maps, at most that of either map.
        normalise: whether maps are divided by their norm; the authors do not for pairs of one architecture.
        binarise: of the teacher's maps only what is larger than the mean of |A| over positions remains, as 1.

    Returns:
        A scalar ≥ 0, at most 4 / size² of normalised maps, and 0 for proportional ones.

    Raises:
        ValueError: no maps, different classes, or a map smaller than ``size``.

    Memory: linear in the maps.

    Guo, Yan, Li, Lin 2023, "Class Attention Transfer Based Knowledge Distillation", https://arxiv.org/abs/2304.12777

    >>> import torch
    >>> student, teacher = torch.randn(2, 10, 8, 8), torch.randn(2, 10, 4, 4)
    >>> class_attention(student, teacher) > 0, class_attention(student, 3 * student) < 1e-12
    (tensor(True), tensor(True))
    """
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"class activation maps of shapes {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher): "
            "expected (B, K, H, W) of the same classes"
        )
    if min(*student.shape[2:], *teacher.shape[2:]) < size:
        raise ValueError(
            f"size={size}: maps of {tuple(student.shape[2:])} (student) and {tuple(teacher.shape[2:])} (teacher) "
            "cannot be pooled to it"
        )
    student, teacher = in_float32(student), in_float32(teacher).detach()
    if binarise:
        teacher = (teacher > teacher.abs().mean((2, 3), keepdim=True)).to(teacher)
    student, teacher = (F.adaptive_avg_pool2d(maps, size).flatten(2) for maps in (student, teacher))
    if normalise:
        student, teacher = unit_rows(student), unit_rows(teacher)
    return F.mse_loss(student, teacher)


@method(
    section="2.2+",
    role="losses",
    paper="Guo, Yan, Li, Lin: Class Attention Transfer Based Knowledge Distillation",
    year=2023,
    link="https://arxiv.org/abs/2304.12777",
    use="Convolutional classifiers of the same classes, if you want to see in the maps what was transferred.",
)
class CATKD(Loss):
    """Class attention transfer: the student sees each class where the teacher sees it.

    Class activation maps are what each network's own last linear layer says of every position of its last map. The
    student's layer is used as it is at the moment, and the gradient reaches it as well as the features, as in the
    authors' code, where it is a 1×1 convolution before the mean over positions. That one has no bias; a student's bias
    here learns by the task's loss alone.

    Both networks' logits must be one linear layer on the mean over positions of what is tapped, which is checked when
    binding.

    Args:
        taps: the last map, before the mean over positions; one pair. By default the last stage.
        size: the maps are pooled to size × size; 2 by default.
        normalise: divide each map by its norm; true by default.
        binarise: binary maps of the teacher, an experiment of the paper; false by default.
        weight: 40 by default, the authors' for MobileNetV2 of ResNet-50 on CIFAR-100, with normalised 2×2 maps. They
            tune it for every pair: 15 to 40 for these, 80 to 600 for normalised 4×4 maps, 0.7 to 15 without
            normalisation.
        name: of the term.

    Memory: B·K·size² (of ``binarise`` the whole maps) beside the features. See :func:`class_attention` for the formula.

    >>> CATKD("stage3")
    CATKD(stage3, weight=40.0, size=2)
    """

    default_reads = "last stage"

    def __init__(
        self,
        *taps: Tap,
        size: int = 2,
        normalise: bool = True,
        binarise: bool = False,
        weight: Weight = 40.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        if size < 2:
            raise ValueError(
                f"{self.name}: size={size}: expected at least 2; of one position only the sign would remain"
            )
        if len(taps) > 1:
            raise ValueError(f"{self.name}: taps={taps!r}: expected one, the last map")
        self.size, self.normalise, self.binarise = size, normalise, binarise
        self.classifier: Tensor | None
        self.register_buffer("classifier", None)  # the teacher's; it does not learn
        self._own: tuple[nn.Linear, ...] = ()  # the student's, in a tuple, so that it is not registered here

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        if teacher is student:
            raise ValueError(f"{self.name}: needs a finished teacher; here the student is taught by itself")
        chosen = super().resolve(student, teacher, batch)
        ((mine, theirs),) = self.pairs
        side = "student"
        try:
            with evaluating(student):  # where no drop-out stands between the map and the classifier
                self._own = (classifier_of(student, batch.student, mine),)
            side = "teacher"
            layer = classifier_of(teacher, batch.teacher, theirs)
        except ValueError as error:
            raise ValueError(f"{self.name}: {side}: {error}") from None
        if layer.out_features != self._own[0].out_features:
            raise ValueError(
                f"{self.name}: the student has {self._own[0].out_features} classes and the teacher "
                f"{layer.out_features}; class activation maps are compared class by class"
            )
        self.classifier = layer.weight.detach().clone()
        return chosen

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        assert self.classifier is not None, "bind first"
        ((mine, theirs),) = self.tensors(student, teacher)
        if not self.binarise:
            # The mean over some positions and a sum over channels commute; the pooled map is much smaller.
            mine, theirs = self._pooled(mine), self._pooled(theirs)
        return class_attention(
            class_activation_maps(mine, self._own[0].weight),
            class_activation_maps(theirs, self.classifier),
            self.size,
            self.normalise,
            self.binarise,
        )

    def _pooled(self, features: Tensor) -> Tensor:
        small = features.ndim != 4 or min(features.shape[2:]) < self.size
        return features if small else F.adaptive_avg_pool2d(features, self.size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"
