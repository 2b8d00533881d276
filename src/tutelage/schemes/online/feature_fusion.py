"""Feature fusion learning: sub-networks teach a classifier of their fused feature maps, which teaches them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.algorithms.multi_teacher.averaged_ensemble import average_logits
from tutelage.catalogue import method
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.schedule import RampUp
from tutelage.schemes.online.cohort import Cohort, CohortOutput, PeerTeacher, group_record
from tutelage.schemes.online.headed import HeadedCohort, Spoken
from tutelage.taps import stages
from tutelage.teachers import Lesson
from tutelage.views import Batch, Inputs


@dataclass
class FusedOutput(CohortOutput):
    """What sub-networks and the classifier of their fused features say; ``logits`` are the first sub-network's.

    Args:
        peers: the sub-networks' outputs.
        fused: (B, K), the fused classifier's logits.
    """

    fused: Tensor


class FusionModule(nn.Module):
    """A classifier of several feature maps: side by side, 3×3 depthwise, 1×1 pointwise, mean, linear.

    Both convolutions are without bias and followed by batch-norm and ReLU. Maps of different sizes are brought to the
    smallest by averaging; of different widths, to that of the output by the pointwise convolution.

    Args:
        channels: of each map.
        width: of the fused map.
        classes: how many.

    >>> FusionModule([4, 4], width=4, classes=10)([torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8)]).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: Sequence[int], width: int, classes: int):
        super().__init__()
        total = sum(channels)
        self.depthwise = nn.Conv2d(total, total, 3, padding=1, groups=total, bias=False)
        self.pointwise = nn.Conv2d(total, width, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(total), nn.BatchNorm2d(width)])
        self.classifier = nn.Linear(width, classes)
        for layer in (self.depthwise, self.pointwise):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, K) of maps (B, C_i, H_i, W_i)."""
        height, width = min(m.shape[2] for m in maps), min(m.shape[3] for m in maps)
        alike = [m if m.shape[2:] == (height, width) else F.adaptive_avg_pool2d(m, (height, width)) for m in maps]
        x = self.norms[0](self.depthwise(torch.cat(alike, dim=1))).relu()
        x = self.norms[1](self.pointwise(x)).relu()
        return self.classifier(x.mean((2, 3)))


class FusedFeatures(HeadedCohort):
    """Sub-networks with a :class:`FusionModule` on their last feature maps: the student role of ``FeatureFusion``.

    They may be networks of different architectures (:class:`tutelage.Cohort`) or branches of one
    (:class:`tutelage.Branches`), as in the authors' code. Afterwards :meth:`fused` gives the fused classifier as one
    plain network, :meth:`peer` each sub-network, and :meth:`ensemble` their average.

    Args:
        cohort: the sub-networks.
        example: a few inputs, or the shape of one input without the batch axis.
        at: the address of the feature map; by default each one's last stage.
        width: of the fused map; by default that of the widest map.

    Raises:
        ValueError: something that is no feature map (B, C, H, W).

    Memory: that of all sub-networks; the fusion has (ΣC)·(9 + width) + width·K weights.

    >>> from tutelage.models import SmallCNN
    >>> student = FusedFeatures(Cohort([SmallCNN(width=4), SmallCNN(width=6)]), example=(1, 28, 28))
    >>> student(torch.zeros(2, 1, 28, 28)).fused.shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        cohort: Cohort,
        example: Tensor | Mapping[str, Any] | Sequence[int],
        at: str | Sequence[str] | None = None,
        width: int | None = None,
    ):
        super().__init__(cohort, example, at, lambda peer, inputs: stages(peer, inputs)[-1].address)
        if any(len(shape) != 4 for shape in self.shapes):
            found = dict(zip(self.at, self.shapes, strict=True))
            raise ValueError(f"at: only feature maps (B, C, H, W) can be fused; got {found}")
        channels = [shape[1] for shape in self.shapes]
        parameter = next(cohort.parameters())
        self.fusion = FusionModule(channels, width or max(channels), self.classes)
        self.fusion.to(parameter.device, parameter.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> FusedOutput:
        """Every sub-network's output and the fused classifier's logits."""
        peers, maps = self.read(Inputs(args, kwargs))
        dtype = self.fusion.classifier.weight.dtype  # records are in float32, the networks may not be
        return FusedOutput(peers, self.fusion([m.to(dtype) for m in maps]))

    def fused(self) -> nn.Module:
        """The fused classifier with all sub-networks below it as one plain network, which returns logits; a copy.

        >>> from tutelage.models import SmallCNN
        >>> student = FusedFeatures(Cohort([SmallCNN(width=4), SmallCNN(width=4)]), example=(1, 28, 28)).eval()
        >>> x = torch.rand(2, 1, 28, 28)
        >>> torch.equal(student.fused()(x), student(x).fused)
        True
        """
        return Spoken(self, "fused")


@method(
    section="3.2",
    role="teacher",
    paper="Kim, Hyun, Chung, Kwak: Feature Fusion for Online Mutual Knowledge Distillation",
    year=2019,
    link="https://arxiv.org/abs/1904.09058",
    needs=("labels",),
    use="No trained teacher, and a strong model that may cost as much as all its parts: their fused features.",
)
class FeatureFusion(PeerTeacher):
    """The ensemble of sub-networks teaches the fused classifier, and this one teaches every sub-network.

    The student role must be :class:`tutelage.FusedFeatures`. With :meth:`losses`, sub-networks z_i and fused logits z_f
    the total is

        Σ_i CE(z_i, y) + CE(z_f, y)
            + T² · [ KL(softmax(z_e/T) ‖ softmax(z_f/T)) + Σ_i KL(softmax(z_f/T) ‖ softmax(z_i/T)) ]

    where z_e is the mean of the z_i, T = 3, and the teacher's side of each KL is detached. What the fused classifier
    learns reaches the sub-networks through their feature maps. Each KL is a lesson, so any loss can stand there; at
    other addresses the sub-networks' mean teaches them, and the fused classifier, which has none, learns nothing.

    The fusion module, T, the terms and the warm-up over 80 of 300 epochs are those of the authors' code, which fuses
    two branches of a ResNet and leaves out what maps of different sizes or widths need: averaging to the smallest, and
    the pointwise convolution, are this library's. There the fusion has a tenth of the networks' weight decay.

    Kim, Hyun, Chung, Kwak 2019, "Feature Fusion for Online Mutual Knowledge Distillation",
    https://arxiv.org/abs/1904.09058

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallCNN
    >>> student = FusedFeatures(Cohort([SmallCNN(width=4), SmallCNN(width=4)]), example=(1, 28, 28))
    >>> d = Distillation(student, FeatureFusion(), losses=FeatureFusion().losses())
    >>> sorted(d((torch.rand(4, 1, 28, 28), torch.zeros(4).long())).values)
    ['KD', 'TaskLoss']
    """

    cohort = FusedFeatures

    def losses(self, temperature: float = 3.0, warm_up: float = 80 / 300) -> list[Loss]:
        """The published terms.

        Args:
            temperature: T.
            warm_up: the part of the training in which the KL comes up to its weight of 1.
        """
        return [TaskLoss(), KD(temperature=temperature, weight=RampUp(1.0, until=warm_up))]

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        return [*super().bind(student, student_reads, teacher_reads), "@logits"]  # the fused, whatever the losses read

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        said: FusedOutput = student.output
        peers = self.records(student)
        ensemble = group_record(peers, average_logits([peer.logits for peer in peers]))
        target = replace(ensemble, output=said.fused.detach())
        learners = [Lesson(peer, target, key=f"{i}_from_fused") for i, peer in enumerate(peers)]
        return [Lesson(replace(ensemble, output=said.fused), ensemble, key="fused"), *learners]
