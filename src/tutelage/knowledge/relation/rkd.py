"""Relational knowledge distillation: the distances and angles between the samples of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.rows import flat_rows, unit_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch

CHUNK_NUMBERS = 2**23
"""How many numbers (32 MiB of float32) a chunk of :func:`rkd_angle` may hold at once, about."""


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if len(student) != len(teacher):
        raise ValueError(f"different samples: {len(student)} of the student, {len(teacher)} of the teacher")
    return flat_rows(student), flat_rows(teacher.detach())


def _distances(rows: Tensor) -> Tensor:
    # |x|² + |y|² − 2xy loses every digit of a distance that is small beside the norms.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.masked_fill(mean == 0, 1.0)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber(d_s(i, j) / μ_s − d_t(i, j) / μ_t), mean over all B² pairs (i, i among them); μ = mean of distances > 0.

    Huber's β is 1, d the Euclidean distance of the flattened embeddings. The gradient at a distance of 0 is 0.

    Args:
        student: (B, ...) embeddings.
        teacher: (B, ...) embeddings of any other size; no gradient flows to them.

    Returns:
        A scalar ≥ 0, and 0 for embeddings that differ by a rotation, a shift or a factor.

    Raises:
        ValueError: different numbers of samples.

    Memory: B² beside the embeddings.

    Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", https://arxiv.org/abs/1904.05068

    >>> rkd_distance(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [5.0]]))
    tensor(0.0450)
    """
    student, teacher = _rows(student, teacher)
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor, chunk: int | None = None) -> Tensor:
    """Huber(cos ∠_s(j, i, k) − cos ∠_t(j, i, k)), mean over all B³ triples; i is the vertex of the angle.

    The cosine of an angle with a side of length 0 (j = i among them) counts as 0, with gradient 0. Huber's β is 1.

    Args:
        student: (B, ...) embeddings.
        teacher: (B, ...) embeddings of any other size; no gradient flows to them.
        chunk: vertices that are treated at once; by default as many as hold about ``CHUNK_NUMBERS`` numbers.

    Returns:
        A scalar ≥ 0, and 0 for embeddings that differ by a rotation, a shift or a factor.

    Raises:
        ValueError: different numbers of samples, or a ``chunk`` below 1.

    Embeddings of more than 4·B numbers are first turned into the space that the batch spans, which changes no angle, so
    the time grows with B³·min(D, 4B) and not with B³·D.

    Memory: chunk · B · (min(D_s, 4B) + min(D_t, 4B) + 2B), in the backward pass too, where each chunk is calculated
    again if there are several; never B³. Where D > 4B, a copy of the embeddings in float64.

    Park, Kim, Lu, Cho 2019, "Relational Knowledge Distillation", https://arxiv.org/abs/1904.05068

    >>> corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> rkd_angle(corner, 3 * corner) < 1e-9, rkd_angle(corner, corner * torch.tensor([1.0, 2.0])).round(decimals=4)
    (tensor(True), tensor(0.0038))
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1")
    student, teacher = _rows(student, teacher)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = _compact(student), _compact(teacher)
    size = len(student)
    numbers = sum(rows.shape[1] * rows.element_size() / 4 for rows in (student, teacher))
    per_vertex = int(size * (numbers + 2 * size))
    chunk = min(size, chunk or max(1, CHUNK_NUMBERS // max(1, per_vertex)))
    parts = []
    for vertices in torch.arange(size, device=student.device).split(chunk):
        if chunk < size and torch.is_grad_enabled():
            args = (student, teacher, vertices, dtype)
            parts.append(checkpoint(_angles, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_angles(student, teacher, vertices, dtype))
    return torch.stack(parts).sum() / size**3


def _compact(rows: Tensor) -> Tensor:
    """Rows with the same inner products of their differences, but of at most B numbers.

    They are X·Q with an orthonormal basis Q of the centred rows, which is held fixed: the gradient (df/d(XQ))·Qᵀ is
    then exact, as that of a function of differences lies in their span. In float64, where rows that differ little
    still do.
    """
    size, width = rows.shape
    if width <= 4 * size or rows.device.type == "mps":  # little to gain from float64, or no float64
        return rows
    wide = rows.double()
    basis, _ = torch.linalg.qr((wide - wide.mean(0)).detach().T)
    return (wide - wide.mean(0).detach()) @ basis


def _angles(student: Tensor, teacher: Tensor, vertices: Tensor, dtype: torch.dtype) -> Tensor:
    def cosines(rows: Tensor) -> Tensor:
        sides = rows - rows[vertices].unsqueeze(1)
        if rows.dtype is torch.float64:  # of rows that were equal, what the turning left of their difference
            length = sides.detach().norm(dim=-1, keepdim=True)
            sides = sides.masked_fill(length <= 1e-12 * rows.detach().abs().max(), 0.0)
        sides = unit_rows(sides).to(dtype)
        return sides @ sides.mT

    return F.smooth_l1_loss(cosines(student), cosines(teacher), reduction="sum")


@method(
    section="2.3",
    role="losses",
    paper="Park, Kim, Lu, Cho: Relational Knowledge Distillation",
    year=2019,
    link="https://arxiv.org/abs/1904.05068",
    use="Embeddings (retrieval, faces), or models whose classes or widths differ: only relations are compared.",
)
class RKD(Loss):
    """Relations: the distances of the batch's pairs and the angles of its triples, Huber loss.

    Args:
        taps: the embeddings, by default what the last linear layer reads. Several are summed.
        distance: weight of :func:`rkd_distance` inside the term; 25 by default.
        angle: weight of :func:`rkd_angle`; 50 by default.
        weight: of the term; 1 by default.
        name: of the term.

    Memory: quadratic in the batch, never cubic; see the two functions for it and for the formulas.

    >>> RKD()
    RKD(embedding, weight=1.0, distance=25.0, angle=50.0)
    """

    default_reads = "embedding"
    needs_samples = 2

    def __init__(
        self,
        *taps: Tap,
        distance: float = 25.0,
        angle: float = 50.0,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        if distance < 0 or angle < 0 or distance + angle == 0:
            raise ValueError(f"{self.name}: distance={distance}, angle={angle}: expected two weights ≥ 0, not both 0")
        self.distance = distance
        self.angle = angle

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        terms = []
        for s, t in self.tensors(student, teacher):
            if self.distance:
                terms.append(self.distance * rkd_distance(s, t))
            if self.angle:
                terms.append(self.angle * rkd_angle(s, t))
        return torch.stack(terms).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, distance={self.distance}, angle={self.angle}"
