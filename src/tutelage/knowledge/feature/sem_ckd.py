"""Semantic calibration: every layer of the student chooses, sample by sample, which of the teacher's it learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.connectors import match_size
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.feature.batch_norm import BatchNorm
from tutelage.knowledge.rows import flat_rows, unit_rows
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.taps import stages
from tutelage.views import Batch


def calibrated_hint(
    student: Sequence[Sequence[Tensor]], teacher: Sequence[Sequence[Tensor]], attention: Tensor
) -> Tensor:
    """Σ_ij α_bij · mean (P_ij(F_i) − F_j)² / S, mean over the samples b: hints between all layers, weighed.

    Args:
        student: P_ij(F_i), the i-th of the student's S layers projected to the j-th of the teacher's T: S lists of T
            tensors (B, ...).
        teacher: F_j at the size of P_ij(F_i), likewise; no gradient flows to them.
        attention: α, (B, S, T), whose rows sum to 1.

    Returns:
        A scalar ≥ 0, and 0 for equal features.

    Raises:
        ValueError: the shapes of a pair differ, or ``attention`` has another shape than (B, S, T).

    Chen et al. 2021, "Cross-Layer Distillation with Semantic Calibration", https://arxiv.org/abs/2012.03236

    >>> near, far, zero = torch.ones(2, 3), 3 * torch.ones(2, 5), torch.zeros(2, 5)
    >>> calibrated_hint([[near, far]], [[zero[:, :3], zero]], torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]))
    tensor(3.)
    """
    layers = len(student), len(student[0])
    expected = (len(student[0][0]), *layers)
    if tuple(attention.shape) != expected:
        raise ValueError(f"attention of shape {tuple(attention.shape)}: expected (samples, layers, layers) {expected}")
    distances = []
    for mine, theirs in zip(student, teacher, strict=True):
        for s, t in zip(mine, theirs, strict=True):
            if s.shape != t.shape:
                raise ValueError(
                    f"hints differ in shape: student {tuple(s.shape)}, teacher {tuple(t.shape)}; project the student's"
                )
            distances.append((flat_rows(s) - flat_rows(t.detach())).square().mean(1))
    weighed = torch.stack(distances, dim=1) * in_float32(attention).flatten(1)
    return weighed.sum(1).mean() / layers[0]


def similarity_rows(features: Tensor) -> Tensor:
    """√B · A_i / |A_i| for the rows of A = F Fᵀ: how similar each sample is to the others of its batch, in this layer.

    The scale makes the mean of squares 1, whatever the layer's size and the batch's. A row of zeros stays zero.

    Args:
        features: (B, ...).

    Returns:
        (B, B).

    >>> similarity_rows(torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    tensor([[1.2247, 1.2247, 0.0000],
            [1.2247, 1.2247, 0.0000],
            [0.0000, 0.0000, 1.7321]])
    """
    rows = flat_rows(features)
    return unit_rows(rows @ rows.T) * len(rows) ** 0.5


class LayerAttention(nn.Module):
    """α_bij: how much the i-th of the student's layers attends to the j-th of the teacher's for sample b.

    α = softmax over j of ⟨q_bi, k_bj⟩; the query q of a student's layer is an embedding of the sample's row of
    :func:`similarity_rows`, the key k one of the teacher's, both of unit length. An embedding applies one small
    perceptron (a layer's own) to every entry of the row, so the rows of B numbers are compared entry by entry, for
    any B and in any order of the batch.

    Args:
        student: S, the number of the student's layers.
        teacher: T, the number of the teacher's.
        width: numbers that an entry becomes.

    >>> attend = LayerAttention(2, 3)
    >>> maps = [torch.randn(5, c, 4, 4) for c in (2, 3, 4)]
    >>> attend(maps[:2], maps).shape
    torch.Size([5, 2, 3])
    """

    def __init__(self, student: int, teacher: int, width: int = 4):
        super().__init__()
        self.query, self.key = (
            nn.ModuleList(
                nn.Sequential(nn.Linear(1, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(layers)
            )
            for layers in (student, teacher)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """(B, S, T) of features (B, ...) of the student's S layers and the teacher's T."""
        queries, keys = (
            torch.stack(
                [
                    unit_rows(embed(similarity_rows(features).unsqueeze(2)).flatten(1))
                    for embed, features in zip(embeds, layers, strict=True)
                ],
                dim=1,
            )
            for embeds, layers in ((self.query, student), (self.key, teacher))
        )
        return (queries @ keys.mT).softmax(dim=2)


def bottleneck(channels: int, teacher: int) -> nn.Sequential:
    """The learned projection of a map to the teacher's channels: convolutions 1×1, 3×3, 1×1 with batch-norm and ReLU
    between them, twice the teacher's channels wide.

    >>> bottleneck(4, 8)(torch.ones(2, 4, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """
    wide = 2 * teacher
    return nn.Sequential(
        nn.Conv2d(channels, wide, 1, bias=False),
        BatchNorm(wide),
        nn.ReLU(),
        nn.Conv2d(wide, wide, 3, padding=1, bias=False),
        BatchNorm(wide),
        nn.ReLU(),
        nn.Conv2d(wide, teacher, 1, bias=False),
    )


@method(
    section="2.2",
    role="losses",
    paper="Chen, Mei, Zhang, Wang, Wang, Feng, Chen: Cross-Layer Distillation with Semantic Calibration",
    year=2021,
    link="https://arxiv.org/abs/2012.03236",
    use="Networks whose stages do not correspond, or whose correspondence you do not want to choose: it is learned.",
)
class SemCKD(Loss):
    """Semantic calibration: each layer of the student learns from all of the teacher's, by learned attention.

    Every one of the student's layers is projected to every one of the teacher's (:func:`bottleneck`; maps meet at
    the smaller size by average pooling), and :func:`calibrated_hint` weighs the squared differences with
    :class:`LayerAttention`: layers in which a sample is similar to the same others attract each other. As in the
    authors' code, the student is also taught through the attention.

    The attention differs from the authors' in one point. They give a sample's whole row of B similarities, as inner
    products, to a perceptron with B inputs: it exists for one batch size only (their loop passes over an epoch's last,
    smaller batch), and learns one weight for each place in a shuffled batch. Here the perceptron is shared between
    the places, which is theirs with tied weights, and the rows are of a fixed scale.

    Args:
        taps: maps (B, C, H, W). The student's layers are those that the pairs name, each once, and the teacher's
            likewise; which stands beside which means nothing, and a name may be repeated where one network has more:
            ``("stage1", "layer1"), ("stage2", "layer2"), ("stage2", "layer3")``. By default all stages of both.
        width: of :class:`LayerAttention`.
        weight: 400 by default, the authors' for CIFAR-100 (50 for ImageNet), of the mean over samples, the student's
            layers, channels and positions.
        name: of the term.

    Raises:
        ValueError: ``width`` below 1, or features that are no maps.

    Memory: S·T projections, whose widest maps have twice the teacher's channels, and ``width`` · B² numbers for each
    layer. The authors' dimensions (convolutions, width of the attention relative to B) were taken from their code;
    the text of the paper was not at hand.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(*(nn.Conv2d(1, n, 3), nn.Conv2d(n, n, 3, 2))) for n in (4, 6))
    >>> loss = SemCKD(("0", "0"), ("1", "0"))
    >>> d = Distillation(student, teacher, losses=[loss]).bind(torch.rand(5, 1, 8, 8))
    >>> loss.layers
    (['0', '1'], ['0'])
    """

    default_reads = "stages"

    def __init__(self, *taps: Tap, width: int = 4, weight: Weight = 400.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        if width < 1:
            raise ValueError(f"{self.name}: width={width}: expected at least 1")
        self.width = width

    @property
    def layers(self) -> tuple[list[str], list[str]]:
        """The addresses of the student's layers and of the teacher's, each once."""
        return list(dict.fromkeys(s for s, _ in self.pairs)), list(dict.fromkeys(t for _, t in self.pairs))

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        chosen = super().resolve(student, teacher, batch)
        if chosen:
            mine, theirs = stages(student, batch.student), stages(teacher, batch.teacher)
            self.pairs = [
                (mine[min(i, len(mine) - 1)].address, theirs[min(i, len(theirs) - 1)].address)
                for i in range(max(len(mine), len(theirs)))
            ]
        return chosen

    def _features(self, student: Record, teacher: Record) -> tuple[list[Tensor], list[Tensor]]:
        mine, theirs = self.layers
        return [in_float32(student[at]) for at in mine], [in_float32(teacher[at]).detach() for at in theirs]

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        mine, theirs = self._features(student, teacher)
        for side, layers, addresses in zip(("student", "teacher"), (mine, theirs), self.layers, strict=True):
            for features, address in zip(layers, addresses, strict=True):
                if features.ndim != 4:
                    raise ValueError(
                        f"{self.name}: {side} {address!r} is of shape {tuple(features.shape)}: expected a map "
                        "(B, C, H, W)"
                    )
        self.attend = LayerAttention(len(mine), len(theirs), self.width).to(mine[0])
        self.projections = nn.ModuleList(bottleneck(s.shape[1], t.shape[1]).to(s) for s in mine for t in theirs)

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        mine, theirs = self._features(student, teacher)
        projections = iter(self.projections)
        projected: list[list[Tensor]] = []
        targets: list[list[Tensor]] = []
        for s in mine:
            met = [match_size(s, t) for t in theirs]
            projected.append([next(projections)(x) for x, _ in met])
            targets.append([t for _, t in met])
        return calibrated_hint(projected, targets, self.attend(mine, theirs))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}"
