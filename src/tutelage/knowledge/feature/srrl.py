"""SRRL: the student's features mean to the teacher's classifier what the teacher's features mean to it."""

from __future__ import annotations

from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.classifiers import classifier_of, pooled
from tutelage.knowledge.feature.batch_norm import BatchNorm
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch


def softmax_regression(
    student: Tensor, teacher: Tensor, classifier: Tensor, matching: float = 1.0, regression: float = 1.0
) -> Tensor:
    """α · (h_s − h_t)² + β · (W·h_s − W·h_t)²: of features, and of what the teacher's classifier W says of them.

    The first square is the mean over samples and features, the second over samples and classes. A bias of the
    classifier is in both of its outputs and cancels.

    Args:
        student: h_s (B, C), connected to the teacher's channels.
        teacher: h_t (B, C), what the teacher's classifier reads; no gradient flows to it.
        classifier: W (K, C), weights of the teacher's classifier; no gradient flows to them.
        matching: α, ≥ 0.
        regression: β, ≥ 0.

    Returns:
        A scalar ≥ 0, and 0 for equal features.

    Raises:
        ValueError: the shapes do not fit.

    Memory: linear in the features and in the B·K logits.

    Yang, Martinez, Bulat, Tzimiropoulos 2021, "Knowledge distillation via softmax regression representation learning",
    https://openreview.net/forum?id=ZzwDy_wiWv

    >>> import torch
    >>> softmax_regression(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([[3.0, 5.0]]))
    tensor(9.5000)
    """
    if student.ndim != 2 or student.shape != teacher.shape or classifier.shape[1:] != student.shape[1:]:
        raise ValueError(
            f"features of shapes {tuple(student.shape)} (student, connected) and {tuple(teacher.shape)} (teacher) and "
            f"a classifier {tuple(classifier.shape)}: expected (B, C), (B, C) and (K, C)"
        )
    difference = in_float32(student) - in_float32(teacher).detach()
    said = difference @ classifier.detach().to(difference).T
    return matching * difference.square().mean() + regression * said.square().mean()


@method(
    section="2.2+",
    role="losses",
    paper="Yang, Martinez, Bulat, Tzimiropoulos: Knowledge Distillation via Softmax Regression Representation Learning",
    year=2021,
    link="https://openreview.net/forum?id=ZzwDy_wiWv",
    use="A classifier of one linear layer on pooled features, and a student that shall stay as small as it is.",
)
class SRRL(Loss):
    """Softmax regression: the student's last features, connected, give the teacher's features and its logits.

    A connector, 1×1 convolution with batch-norm and ReLU, brings the student's last map to the teacher's channels, and
    the mean over positions makes it a vector; a vector is a map of one position. A frozen copy of the weights of the
    teacher's last linear layer then judges it. The student's own classifier learns by the task's loss alone, and the
    connector is dropped after training.

    The teacher's logits must be one linear layer of what is tapped, which is checked when binding.

    Args:
        taps: the last map, before the mean over positions, or a vector; one pair. By default the last stage.
        matching: α of the features; 1 by default.
        regression: β of the logits; 1 by default.
        weight: 1 by default.
        name: of the term.

    All three belong to the squares' means over features and over classes of the authors' code for ImageNet, beside a
    task's loss of weight 1. The weights of the paper's experiments on CIFAR could not be checked. The connector ends in
    a ReLU, as published: of features of the teacher that may be negative it can match the positive part only.

    Memory: linear in the features. See :func:`softmax_regression` for the formula.

    >>> import torch
    >>> from tutelage import Distillation, TaskLoss
    >>> from tutelage.models import SmallCNN
    >>> loss = SRRL("stage3")
    >>> batch = torch.randn(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    >>> d = Distillation(SmallCNN(width=4), SmallCNN(width=8), losses=[TaskLoss(), loss]).bind(batch)
    >>> loss.connector[0], loss.classifier.shape
    (Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1), bias=False), torch.Size([10, 32]))
    """

    default_reads = "last stage"

    def __init__(
        self,
        *taps: Tap,
        matching: float = 1.0,
        regression: float = 1.0,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        for field, value in (("matching", matching), ("regression", regression)):
            if not value >= 0:
                raise ValueError(f"{self.name}: {field}={value}: expected at least 0")
        if len(taps) > 1:
            raise ValueError(f"{self.name}: taps={taps!r}: expected one, what the classifiers read")
        self.matching, self.regression = matching, regression
        self.connector: nn.Sequential = nn.Sequential()
        self.classifier: Tensor | None
        self.register_buffer("classifier", None)  # the teacher's; it does not learn

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        if teacher is student:
            raise ValueError(f"{self.name}: needs a finished teacher; here the student is taught by itself")
        chosen = super().resolve(student, teacher, batch)
        try:
            layer = classifier_of(teacher, batch.teacher, self.pairs[0][1])
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        self.classifier = layer.weight.detach().clone()
        return chosen

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        ((s, t),) = self.tensors(student, teacher)
        if s.ndim not in (2, 4):
            raise ValueError(
                f"{self.name}: the student's features are {tuple(s.shape)}; "
                "expected a map (B, C, H, W) or a vector (B, C)"
            )
        convolution = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
        self.connector = nn.Sequential(convolution, BatchNorm(t.shape[1]), nn.ReLU()).to(s)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        ((s, t),) = self.tensors(student, teacher)
        assert self.classifier is not None, "bind first"
        connected = self.connector(s if s.ndim == 4 else s[..., None, None])
        return softmax_regression(pooled(connected), pooled(t), self.classifier, self.matching, self.regression)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, matching={self.matching}, regression={self.regression}"
