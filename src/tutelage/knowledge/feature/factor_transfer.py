"""Factor transfer: the teacher's features in other words, and a student that learns to say the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.connectors import match_size
from tutelage.knowledge.base import Tap
from tutelage.knowledge.feature.first_stage import FirstStage
from tutelage.knowledge.relation.pairs import as_map
from tutelage.knowledge.rows import flat_rows, unit_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch

Train = Literal["student", "paraphraser"]
Reconstruction = Literal["L1", "L2"]


def factor_transfer(student_factors: Tensor, teacher_factors: Tensor, p: float = 1.0) -> Tensor:
    """|F_s/‖F_s‖ − F_t/‖F_t‖|^p, mean over samples and entries, of factors that are flattened per sample.

    The factors themselves are compared, not where they are active: F and −F are as far apart as can be. The paper
    writes the p-norm of the difference; its authors' code, whose weight is 500, takes this mean with p = 1. A sample
    of zeros stays zero and has gradient zero.

    Args:
        student_factors: (B, ...), what the translator makes of the student's features.
        teacher_factors: of the same shape, the paraphraser's; no gradient flows to them.
        p: the power, at least 1.

    Returns:
        A scalar ≥ 0, and 0 for factors that differ by a positive number for each sample.

    Raises:
        ValueError: the shapes differ, or a ``p`` below 1, whose gradient is infinite at equal factors.

    Kim, Park, Kwak 2018, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
    https://arxiv.org/abs/1802.04977

    >>> factors = torch.tensor([[3.0, 4.0]])
    >>> factor_transfer(2 * factors, factors), factor_transfer(-factors, factors)
    (tensor(0.), tensor(1.4000))
    """
    if student_factors.shape != teacher_factors.shape:
        raise ValueError(
            f"factors differ in shape: student {tuple(student_factors.shape)}, teacher {tuple(teacher_factors.shape)}"
        )
    if not p >= 1:
        raise ValueError(f"p={p}: expected at least 1")
    difference = unit_rows(flat_rows(student_factors)) - unit_rows(flat_rows(teacher_factors.detach()))
    return difference.abs().pow(p).mean()


def _layers(kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], channels: Sequence[int], size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(channels):
        layers += [kind(a, b, size, padding=size // 2), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def translator(channels: int, factors: int, size: int = 3) -> nn.Sequential:
    """Three convolutions with leaky ReLU (0.1): the channels as they are, to the factors, the factors as they are.

    Args:
        channels: of the features.
        factors: channels of the factors.
        size: of the convolutions: 3 for maps as published, 1 where there are no neighbours.

    >>> [layer.out_channels for layer in translator(8, 4)[::2]]
    [8, 4, 4]
    """
    return _layers(nn.Conv2d, (channels, channels, factors, factors), size)


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's features, whose code are the factors.

    The encoder is built like :func:`translator`, the decoder mirrors it with transposed convolutions; neither has
    batch-norm, as in the authors' code.

    Args:
        channels: of the features.
        factors: channels of the factors.
        size: of the convolutions.

    >>> paraphraser = Paraphraser(8, 4)
    >>> paraphraser(torch.ones(2, 8, 5, 5)).shape, paraphraser.encoder(torch.ones(2, 8, 5, 5)).shape
    (torch.Size([2, 8, 5, 5]), torch.Size([2, 4, 5, 5]))
    """

    def __init__(self, channels: int, factors: int, size: int = 3):
        super().__init__()
        self.encoder = translator(channels, factors, size)
        self.decoder = _layers(nn.ConvTranspose2d, (factors, factors, channels, channels), size)

    def forward(self, features: Tensor) -> Tensor:
        """The features, reconstructed from their factors."""
        return self.decoder(self.encoder(features))


@method(
    section="2.2",
    role="losses",
    paper="Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer",
    year=2018,
    link="https://arxiv.org/abs/1802.04977",
    needs=("extra stages",),
    use="Deep features of other widths, where you can afford to train a small autoencoder on the teacher's first.",
)
class FactorTransfer(FirstStage):
    """Factor transfer: a paraphraser puts the teacher's features into factors, which a translator of the student gives.

    Two stages. In the first, ``FactorTransfer(train="paraphraser")`` alone, the paraphraser, an autoencoder, learns to
    reconstruct the teacher's features, unsupervised; the student does not run. In the next, ``FactorTransfer()`` beside
    the task, the paraphraser is frozen, and the translator learns with the student. The stages of a recipe, and
    :meth:`tutelage.Distillation.continue_from`, carry the paraphraser over; the same ``taps``, ``rate`` and ``name``
    must be given in both.

    Both networks have 3×3 convolutions on maps, and layers over the channels alone on sequences and vectors, of which
    the paper has none. Factors of maps of different sizes meet at the smaller by average pooling.

    Networks, loss and weight are checked against the authors' code, not against the paper's text.

    Args:
        taps: the layers; by default the last of the matched stages, as published. Several are summed.
        train: ``"student"``, or ``"paraphraser"`` for the first stage.
        rate: the paper's k: factors have this part of the teacher's channels.
        p: the power of :func:`factor_transfer`.
        reconstruction: mean absolute (``"L1"``, the authors' code) or squared (``"L2"``, the paper) difference, which
            the paraphraser learns with.
        weight: by default 500, the authors' β on CIFAR-10, which goes with the mean over entries; 1 in the first
            stage.
        name: of the term.

    Raises:
        ValueError: an argument out of range, sequences of different tokens, or a second stage without the first.

    Memory: linear in the features; the first stage keeps those of the paraphraser's six layers.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Conv2d(1, n, 3), nn.ReLU()) for n in (4, 8))
    >>> images = torch.rand(2, 1, 6, 6)
    >>> first = Distillation(student, teacher, losses=[FactorTransfer("1", train="paraphraser")])
    >>> first(images).total.backward()  # and so on, with an optimiser of first.parameters()
    >>> second = Distillation(student, teacher, losses=[FactorTransfer("1")]).continue_from(first)
    >>> second(images)["FactorTransfer"] > 0
    tensor(True)
    """

    default_reads = "last stage"
    first_stage = 'FactorTransfer(train="paraphraser")'
    students_parts = ("translators",)

    def __init__(
        self,
        *taps: Tap,
        train: Train = "student",
        rate: float = 0.5,
        p: float = 1.0,
        reconstruction: Reconstruction = "L1",
        weight: Weight | None = None,
        name: str | None = None,
    ):
        first = train == "paraphraser"
        super().__init__(
            *taps, first=first, weight=weight if weight is not None else 1.0 if first else 500.0, name=name
        )
        for field, value, choices in (
            ("train", train, get_args(Train)),
            ("reconstruction", reconstruction, get_args(Reconstruction)),
        ):
            if value not in choices:
                raise ValueError(f"{self.name}: {field}={value!r}: expected one of {choices}")
        if not rate > 0:
            raise ValueError(f"{self.name}: rate={rate}: expected a positive number")
        if not p >= 1:
            raise ValueError(f"{self.name}: p={p}: expected at least 1")
        self.rate, self.p, self.reconstruction = rate, p, reconstruction
        self.paraphrasers = nn.ModuleList()
        self.translators = nn.ModuleList()

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        super().build(student, teacher, batch)
        self.paraphrasers, self.translators = nn.ModuleList(), nn.ModuleList()
        for s, t in self.tensors(student, teacher):
            channels = as_map(t).shape[1]
            factors, size = max(1, round(self.rate * channels)), 3 if t.ndim == 4 else 1
            self.paraphrasers.append(Paraphraser(channels, factors, size).requires_grad_(self.first).to(t))
            if not self.first:
                if s.ndim != t.ndim or (s.ndim == 3 and s.shape[1] != t.shape[1]):
                    raise ValueError(
                        f"{self.name}: shapes {tuple(s.shape)} (student) and {tuple(t.shape)} (teacher) have no "
                        "factors to compare: expected two maps, two vectors, or two sequences of the same tokens"
                    )
                self.translators.append(translator(as_map(s).shape[1], factors, size).to(s))

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        if self.first:
            self.taught()
        losses = []
        for n, (s, t) in enumerate(self.tensors(student, teacher)):
            paraphraser, features = self.paraphrasers[n], as_map(t.detach())
            assert isinstance(paraphraser, Paraphraser)
            if self.first:
                distance = F.l1_loss if self.reconstruction == "L1" else F.mse_loss
                losses.append(distance(paraphraser(features), features))
            else:
                mine, theirs = match_size(self.translators[n](as_map(s)), paraphraser.encoder(features))
                losses.append(factor_transfer(mine, theirs, self.p))
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, train={'paraphraser' if self.first else 'student'}, rate={self.rate}, p={self.p}"
        )
