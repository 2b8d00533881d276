"""Masked generation: from a part of its own features the student has to generate the teacher's whole ones."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.connectors import match_size
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.pairs import channel_projector
from tutelage.knowledge.rows import flat_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch

Masked = Literal["positions", "channels"]


def random_mask(
    features: Tensor, ratio: float, masked: Masked = "positions", generator: torch.Generator | None = None
) -> Tensor:
    """0 with probability ``ratio``, else 1: for every position of every sample, or for every channel.

    Args:
        features: a map (B, C, H, W).
        ratio: λ, from 0 (nothing is masked) to below 1.
        masked: ``"positions"`` hides all channels of a position, ``"channels"`` all positions of a channel.
        generator: of the random numbers; by default torch's own.

    Returns:
        (B, 1, H, W) or (B, C, 1, 1), to multiply the features by. What is left is not enlarged.

    Raises:
        ValueError: ``ratio`` or ``masked`` is none of these.

    >>> mask = random_mask(torch.ones(2, 3, 50, 50), 0.25)
    >>> mask.shape, abs(mask.mean() - 0.75) < 0.05
    (torch.Size([2, 1, 50, 50]), tensor(True))
    """
    _check_masking(ratio, masked)
    samples, channels, height, width = features.shape
    shape = (samples, 1, height, width) if masked == "positions" else (samples, channels, 1, 1)
    return (torch.rand(shape, device=features.device, generator=generator) >= ratio).to(features.dtype)


def generation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ (G − F_t)² over everything of a sample, mean over samples.

    The sum is the authors'; the value grows with the size of the map, and their weights belong to it.

    Args:
        student: G, what was generated from the student's masked features, (B, ...).
        teacher: F_t, of the same shape; no gradient flows to it.

    Returns:
        A scalar ≥ 0, and 0 for equal features.

    Raises:
        ValueError: the shapes differ.

    Yang et al. 2022, "Masked Generative Distillation", https://arxiv.org/abs/2205.01529

    >>> generation_distance(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    tensor(48.)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"features differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return (flat_rows(student) - flat_rows(teacher.detach())).square().sum(1).mean()


def _check_masking(ratio: float, masked: Masked) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio}: expected a number from 0 to below 1")
    if masked not in get_args(Masked):
        raise ValueError(f"masked={masked!r}: expected one of {get_args(Masked)}")


@method(
    section="2.2+",
    role="losses",
    paper="Yang, Li, Shao, Shi, Yuan, Yuan: Masked Generative Distillation",
    year=2022,
    link="https://arxiv.org/abs/2205.01529",
    use="Feature maps of classifiers, detectors and segmenters alike, where direct imitation of features gives little.",
)
class MGD(Loss):
    """Masked generation: random parts of the student's map are hidden, and a learned block generates the teacher's map.

    The student's map goes through a 1×1 convolution where the channels differ, is multiplied by :func:`random_mask`,
    and then goes through two 3×3 convolutions with a ReLU between, all learned and made when binding;
    :func:`generation_distance` compares. Maps of different sizes meet at the smaller by average pooling (the authors'
    have equal sizes).

    In train mode the mask is new at every call, from torch's random numbers. In eval mode it is always the same and
    torch's random numbers are not touched, so a validation repeats.

    The authors' numbers, all with the sum over channels and positions: detection 0.65 of the positions with weight
    2e-5 (two-stage detectors 0.45 with 5e-7) for each level of the pyramid, segmentation 0.75 with 2e-5,
    classification 7e-5, where their code hides 0.15 of the *channels* although the method is described with
    positions, of which half are hidden here by default. Other sizes of maps ask for other weights.

    Args:
        taps: maps (B, C, H, W), by default the last matched stage. Several are summed.
        ratio: λ, the part that is hidden.
        masked: ``"positions"`` or ``"channels"``.
        weight: 7e-5 by default, of the sum over channels and positions, for a last stage of some 512×7×7.
        name: of the term.

    Raises:
        ValueError: an argument out of range, or features that are no maps.

    Memory: linear in the features: three maps of the teacher's size for each pair.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Conv2d(1, n, 3), nn.ReLU()) for n in (4, 6))
    >>> loss = MGD("1")
    >>> d = Distillation(student, teacher, losses=[loss]).bind(torch.rand(5, 1, 8, 8))
    >>> loss.generators[0]
    Sequential(
      (0): Conv2d(6, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
      (1): ReLU()
      (2): Conv2d(6, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    )
    """

    default_reads = "last stage"

    def __init__(
        self,
        *taps: Tap,
        ratio: float = 0.5,
        masked: Masked = "positions",
        weight: Weight = 7e-5,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        _check_masking(ratio, masked)
        self.ratio, self.masked = ratio, masked

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        both = self.tensors(student, teacher)
        for (s_at, t_at), (s, t) in zip(self.pairs, both, strict=True):
            if s.ndim != 4 or t.ndim != 4:
                raise ValueError(
                    f"{self.name}: {s_at!r} is {tuple(s.shape)} and {t_at!r} {tuple(t.shape)}: expected maps "
                    "(B, C, H, W)"
                )
        self.aligners = nn.ModuleList(channel_projector(s, t) for s, t in both)
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(t.shape[1], t.shape[1], 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(t.shape[1], t.shape[1], 3, padding=1),
            ).to(s)
            for s, t in both
        )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        losses = []
        for align, generate, (s, t) in zip(self.aligners, self.generators, self.tensors(student, teacher), strict=True):
            s, t = match_size(s, t)
            s = align(s)
            fixed = None if self.training else torch.Generator(s.device).manual_seed(0)
            losses.append(generation_distance(generate(s * random_mask(s, self.ratio, self.masked, fixed)), t))
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}, masked={self.masked}"
