"""Activation boundaries: the student's neurons learn to be on where the teacher's are, and off where they are off."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.catalogue import method
from tutelage.knowledge.base import Tap
from tutelage.knowledge.feature.pre_activation import PreActivationLoss
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch


def activation_boundary(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """max(0, margin − σ·s)², summed over channels and positions, mean over samples; σ is 1 where t > 0, else −1.

    The paper's alternative loss, with which its network learns in place of the count of neurons on the wrong side: a
    student's neuron costs nothing once it is on the teacher's side of zero by the margin, however far. Both tensors
    are read before their activation; after it, nothing is below zero.

    Args:
        student: (B, ...).
        teacher: of the same shape; only its sign counts, and no gradient flows to it.
        margin: μ > 0.

    Returns:
        A scalar ≥ 0, and 0 where every neuron of the student is beyond the margin on the teacher's side.

    Raises:
        ValueError: the shapes differ, or ``margin`` is not positive.

    Memory: linear in the features.

    Heo, Lee, Yun, Choi 2019, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
    https://arxiv.org/abs/1811.03233

    >>> teacher = torch.tensor([[0.1, -5.0, 0.1, -5.0]])
    >>> activation_boundary(torch.tensor([[1.0, -9.0, 0.0, 1.0]]), teacher)
    tensor(5.)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"neurons differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    if not margin > 0:
        raise ValueError(f"margin={margin}: expected a positive number")
    student = in_float32(student)
    towards = torch.where(teacher.detach() > 0, student, -student)
    return F.relu(margin - towards).square().sum() / len(student)


@method(
    section="2.2",
    role="losses",
    paper="Heo, Lee, Yun, Choi: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
    year=2019,
    link="https://arxiv.org/abs/1811.03233",
    needs=("extra stages",),
    use="A start for a student with ReLUs before it learns the task, above all when data or epochs are few.",
)
class ActivationBoundary(PreActivationLoss):
    """Activation boundaries: a margin loss on the sign of the tensors before the activations, layer by layer.

    As published it is a first stage of its own, from whose weights the student then learns the task (or soft targets,
    as in the authors' CIFAR-10 code) alone: two stages of a recipe. The value is Σ_i 2^(i−L+1) ·
    :func:`activation_boundary` of L layers, the authors' scale. Where channels differ, a connector, 1×1 convolution
    and batch-norm, learns with the student. Sizes and the weights of layers: :class:`PreActivationLoss`.

    The authors' CIFAR-10 code runs the teacher's batch-norm with the batch's statistics
    (``Frozen(teacher, batch_statistics=True)``), their transfer-learning code with the running averages.

    Args:
        taps: tensors before their activation, first to last, such as ``"layer1.0.relu#2:input"`` or a batch-norm
            layer; by default what the last activation module at each resolution reads, matched from the deepest
            backwards. A tensor that is nowhere negative on the first batch is refused.
        margin: μ, in units of the teacher's tensor; 1 as published, which suits what batch-norm gives.
        weight: by default 3/1000, the authors' factor for CIFAR-10, which belongs to the sum over channels and
            positions; their transfer-learning code has 1/1000.
        name: of the term.

    Raises:
        ValueError: a margin that is not positive, no activation modules to find the taps by, shapes that cannot be
            compared, or a tensor after its activation.

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallCNN
    >>> loss = ActivationBoundary()
    >>> d = Distillation(SmallCNN(4), SmallCNN(8), losses=[loss]).bind(torch.randn(2, 1, 8, 8))
    >>> loss.pairs[-1], loss.connectors[-1][0]
    (('stage3.2:input', 'stage3.2:input'), Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1), bias=False))
    """

    always_connect = False

    def __init__(self, *taps: Tap, margin: float = 1.0, weight: Weight = 0.003, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        if not margin > 0:
            raise ValueError(f"{self.name}: margin={margin}: expected a positive number")
        self.margin = margin

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        terms = [w * activation_boundary(s, t, self.margin) for w, s, t in self.layers(student, teacher)]
        return torch.stack(terms).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, margin={self.margin}"
