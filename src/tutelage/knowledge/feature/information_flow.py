"""Information flow: the student's layers take on the neighbourhoods of the teacher's, the early ones early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage import taps
from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.feature.pkt import FLOOR, neighbour_probabilities
from tutelage.knowledge.relation.pairs import distances, paired_rows
from tutelage.knowledge.rows import flat_rows, unit_rows
from tutelage.record import Record
from tutelage.schedule import Weight, weight_at
from tutelage.views import Batch


@dataclass(frozen=True)
class CriticalPeriod:
    """The weight of the early layers: ``initial`` · ``decay`` ^ (``epochs`` · progress).

    Connections are formed in a network's first epochs, so its early layers are supervised strongly there and left to
    themselves afterwards. The defaults are the authors': 100 · 0.7^k in epoch k of 50. Theirs is constant within an
    epoch; here it falls from step to step.

    Args:
        initial: at the beginning.
        decay: from one epoch to the next, above 0.
        epochs: into which the training is divided, however long it is.

    Raises:
        ValueError: ``decay`` or ``epochs`` is not positive.

    >>> [round(CriticalPeriod()(k / 50), 3) for k in (0, 1, 2)]
    [100.0, 70.0, 49.0]
    """

    initial: float = 100.0
    decay: float = 0.7
    epochs: float = 50.0

    def __post_init__(self) -> None:
        for name, value in (("decay", self.decay), ("epochs", self.epochs)):
            if not value > 0:
                raise ValueError(f"{name}={value}: expected a positive number")

    def __call__(self, progress: float) -> float:
        return self.initial * self.decay ** (self.epochs * progress)


def information_flow(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ over two kernels of (p_ij − q_ij) · (log p_ij − log q_ij), mean over all B² pairs: Jeffreys' divergence.

    p are the teacher's and q the student's probabilities of neighbours, which are a kernel's rows divided by their
    sums: the cosine kernel (cos + 1) / 2 of :func:`tutelage.functional.pkt`, and the kernel 1 / (1 + ‖x_i − x_j‖). The
    second does not forget lengths. This is what the authors' code has, with its mean over pairs: like that of ``pkt``
    the value falls with B.

    Args:
        student: (B, ...) features of one layer, flattened.
        teacher: (B, ...) features of any other size; no gradient flows to them.

    Returns:
        A scalar ≥ 0, and 0 for features that differ by a rotation.

    Raises:
        ValueError: different numbers of samples.

    Memory: a few times B² beside the features.

    Passalis, Tzelepi, Tefas 2020, "Heterogeneous Knowledge Distillation using Information Flow Modeling",
    https://arxiv.org/abs/2005.00727

    >>> information_flow(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])).round(decimals=4)
    tensor(0.1490)
    """
    student, teacher = paired_rows(student, teacher)
    by_angle = _jeffreys(neighbour_probabilities(student), neighbour_probabilities(teacher))
    return by_angle + _jeffreys(_by_distance(student), _by_distance(teacher))


def _by_distance(rows: Tensor) -> Tensor:
    near = 1 / (1 + distances(rows))
    return near / near.sum(dim=1, keepdim=True)


def _jeffreys(q: Tensor, p: Tensor) -> Tensor:
    return ((p - q) * ((p + FLOOR).log() - (q + FLOOR).log())).mean()


def class_information(features: Tensor, labels: Tensor) -> Tensor:
    """½ · Σ_c P(c)² · ‖μ_c − μ‖²: the quadratic mutual information between features and classes, by the cosine kernel.

    It is Σ_c ∫ (p(c, x) − P(c) · p(x))² dx with densities estimated by the kernel (cos + 1) / 2, written with the means
    of a class and of all samples after each sample's features are brought to unit length.

    Args:
        features: (B, ...) of one layer, flattened.
        labels: (B,) class numbers.

    Returns:
        A scalar ≥ 0, and 0 where every class has the same mean direction.

    Raises:
        ValueError: not one label for each sample.

    Memory: linear in the features, and classes · samples.

    >>> class_information(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    tensor(0.1250)
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} for {len(features)} samples: expected one for each")
    rows = unit_rows(flat_rows(features))
    belongs = F.one_hot(labels.unique(return_inverse=True)[1]).to(rows)
    share = belongs.mean(dim=0, keepdim=True)
    return ((belongs - share).T @ rows / len(rows)).square().sum() / 2


def match_layers(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> list[int]:
    """Which layer of the teacher each layer of the student follows: the one that knows as much of the classes.

    The information flow of a network is ω = (I(x_1; y), ..., I(x_L; y)), with :func:`class_information` as I. The last
    layer follows the last one; every other layer i follows argmin_j (ω_s,i − ω_t,j)², which makes the divergence
    Σ_i (ω_s,i − ω_t,κ(i))² of the two flows least. Whether the paper estimates I by this kernel could not be checked.

    Args:
        student: each layer's features (B, ...) of the same samples, first to last.
        teacher: likewise, of any number of layers.
        labels: (B,) class numbers.

    Returns:
        κ, one index into ``teacher`` for each layer of the student.

    Raises:
        ValueError: no layer, or not one label for each sample.

    >>> apart, mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> match_layers([mixed, apart], [mixed, mixed + 1, apart], torch.tensor([0, 1]))
    [0, 2]
    """
    if not student or not teacher:
        raise ValueError(
            f"{len(student)} layers of the student and {len(teacher)} of the teacher: expected some of each"
        )
    mine, theirs = (torch.stack([class_information(x, labels) for x in side]) for side in (student, teacher))
    nearest = (mine[:-1, None] - theirs).square().argmin(dim=1)
    return [*nearest.tolist(), len(teacher) - 1]


@method(
    section="2.2",
    role="losses",
    paper="Passalis, Tzelepi, Tefas: Heterogeneous Knowledge Distillation using Information Flow Modeling",
    year=2020,
    link="https://arxiv.org/abs/2005.00727",
    needs=("several layers",),
    use="Networks of different forms, for features as well as for classes; an assistant of the student's form helps.",
)
class InformationFlow(Loss):
    """Information flow: neighbour probabilities of several layers, of which the early ones count at the beginning.

        J(last pair) + α(progress) · Σ over the other pairs of J

    with J of :func:`information_flow` and α = ``early``.

    As published it follows an auxiliary teacher: a network of the student's form, somewhat larger (in the authors' code
    with twice its channels), so that the layers correspond one to one. That one has learned from the teacher before, by
    its last layer alone. It is a :func:`tutelage.teacher_assistant` chain: in a recipe the field ``assistants``, with
    ``InformationFlow`` of one pair among the ``assistant_losses``. With layers that do not correspond,
    :func:`match_layers` says which to name.

    Args:
        taps: the layers, first to last; by default the matched stages and then what the last linear layer reads. Maps
            are flattened as they are.
        early: α, the weight of every pair but the last.
        weight: 1 by default, as in the authors' code, where nothing stands beside it and the optimiser is Adam, which
            does not see a factor. Beside a task's loss the last layer is then hardly heard: the packaged recipe has 10.
        name: of the term.

    Memory: a few times B² for each pair. See :func:`information_flow` for the formula.

    >>> InformationFlow("layer1", "layer2").early
    CriticalPeriod(initial=100.0, decay=0.7, epochs=50.0)
    """

    default_reads = "stages"
    needs_samples = 2

    def __init__(self, *taps: Tap, early: Weight = CriticalPeriod(), weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)
        if not callable(early) and not isinstance(early, int | float):
            raise TypeError(f"{self.name}: early={early!r}: expected a number or a schedule")
        self.early = early

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        chosen = super().resolve(student, teacher, batch)
        if chosen:
            self.pairs.append((taps.embedding(student, batch.student), taps.embedding(teacher, batch.teacher)))
        return chosen

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        *before, last = [information_flow(s, t) for s, t in self.tensors(student, teacher)]
        early = weight_at(self.early, batch.progress)
        return last + early * torch.stack(before).sum() if before else last

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, early={self.early}"
