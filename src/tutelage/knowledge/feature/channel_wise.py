"""Channel-wise distillation: for each channel, where in the image it is active, as a distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.connectors import match_size, projector
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.pairs import as_map
from tutelage.knowledge.response.rows import positive
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def channel_wise(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T² · KL(p_t ‖ p_s), mean over samples and channels, with p = softmax over positions of features / T.

    The divergence is summed over positions, as published: it does not grow with their number, because each channel's
    probabilities sum to 1. A number added to a whole channel changes nothing.

    Args:
        student: a map (B, C, H, W) of features or of a dense prediction's logits, or a sequence (B, N, C).
        teacher: of the same kind, channels and tokens; no gradient flows to it. The larger map is average-pooled to
            the size of the smaller, each axis by itself.
        temperature: T > 0.

    Returns:
        A scalar in nats · T², ≥ 0, and 0 for channels that differ by a constant.

    Raises:
        ValueError: ``temperature`` is not positive, or the shapes cannot be compared.

    Memory: linear in the features.

    Shu, Liu, Gao, Yan, Shen 2021, "Channel-Wise Knowledge Distillation for Dense Prediction",
    https://arxiv.org/abs/2011.13256

    >>> student, teacher = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[2.0, 1.0]]]])
    >>> channel_wise(student, teacher, temperature=1.0), channel_wise(student, student + 3)
    (tensor(0.4621), tensor(0.))
    """
    positive("temperature", temperature)
    tokens = student.ndim == 3 and student.shape[1] != teacher.shape[1]
    if student.ndim != teacher.ndim or student.ndim not in (3, 4) or tokens or len(student) != len(teacher):
        raise ValueError(
            f"channels of shapes {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher) cannot be "
            "compared: expected two maps (B, C, H, W), or two sequences (B, N, C) of the same tokens"
        )
    s, t = as_map(student), as_map(teacher.detach())
    if s.shape[1] != t.shape[1]:
        raise ValueError(
            f"the student has {s.shape[1]} channels and the teacher {t.shape[1]}: channel-wise distillation compares "
            "them one by one; project the student's to the teacher's"
        )
    s, t = match_size(s, t)
    log_q, log_p = (F.log_softmax(x.flatten(2) / temperature, dim=2) for x in (s, t))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / (len(s) * s.shape[1]) * temperature**2


@method(
    section="5.5+",
    role="losses",
    paper="Shu, Liu, Gao, Yan, Shen: Channel-Wise Knowledge Distillation for Dense Prediction",
    year=2021,
    link="https://arxiv.org/abs/2011.13256",
    use="Segmentation and other dense predictions: where each channel of a late layer, or each class, is found.",
)
class ChannelWise(Loss):
    """Channel-wise distillation: every channel's softmax over positions, compared by KL.

    Where channels differ, a 1×1 convolution (a linear layer for sequences), made when binding, brings the student's
    to the teacher's. It has no bias, which a softmax over positions would not see. The authors' code puts a
    batch norm and a ReLU behind it, which are not here.

    Args:
        taps: the layers; by default the last stage of each. ``"@logits"`` reads a dense prediction's logits, with
            the classes as channels. Several are summed.
        temperature: T; 4 by default, the authors'.
        weight: 50 by default, with which the CIRKD study runs the method on features. For logits it is 3, the
            authors' too. Both go with T² and the mean over channels.
        name: of the term.

    All positions count, padded ones too. See :func:`channel_wise` for the formula and the memory.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Conv2d(1, n, 3) for n in (4, 6))
    >>> loss = ChannelWise("0")
    >>> d = Distillation(nn.Sequential(student), nn.Sequential(teacher), losses=[loss]).bind(torch.rand(5, 1, 8, 8))
    >>> loss.projectors[0]
    Conv2d(4, 6, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """

    default_reads = "last stage"

    def __init__(self, *taps: Tap, temperature: float = 4.0, weight: Weight = 50.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        positive(f"{self.name}: temperature", temperature)
        self.temperature = temperature
        self.projectors = nn.ModuleList()

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        self.projectors = nn.ModuleList()
        for s, t in self.tensors(student, teacher):
            equal = s.ndim == t.ndim and as_map(s).shape[1] == as_map(t).shape[1]
            self.projectors.append(nn.Identity() if equal else projector(s.shape, t.shape, bias=False).to(s))

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        losses = []
        for project, (s, t) in zip(self.projectors, self.tensors(student, teacher), strict=True):
            if s.ndim == 4:
                s, t = match_size(s, t)  # pooling and the projection commute; the smaller map is cheaper
            losses.append(channel_wise(project(s), t, self.temperature))
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"
