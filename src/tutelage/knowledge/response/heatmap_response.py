"""Responses of pose estimators: key points as heat maps, from the teacher and from the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.catalogue import method
from tutelage.errors import nearest
from tutelage.knowledge.base import Loss, Tap
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch


def heatmap_response(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 0.5, visible: Tensor | None = None
) -> Tensor:
    """α · (m_s − m_t)² + (1 − α) · (m_s − m_y)², mean over the visible key points and the positions.

    The teacher's heat maps also say how sure it is of a key point, and where else it might be; they are right where a
    label is missing or wrong.

    Args:
        student: heat maps (B, K, H, W), one for each key point.
        teacher: the same shape; no gradient flows to them.
        target: the true ones, the same shape: usually a Gaussian at each key point.
        alpha: α, 0 (the truth alone) to 1 (the teacher alone).
        visible: booleans (B, K); key points that are False do not count. If none counts, the value is 0, with a
            gradient of 0. By default all count.

    Returns:
        A scalar ≥ 0.

    Raises:
        ValueError: ``alpha`` is outside its range, or the shapes do not fit.

    Zhang, Zhu, Ye 2019, "Fast Human Pose Estimation", https://arxiv.org/abs/1811.05419

    >>> student, teacher, target = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0)
    >>> heatmap_response(student, teacher, target, alpha=0.75)  # 0.75 · 1 + 0.25 · 4
    tensor(1.7500)
    """
    _check_alpha(alpha)
    for who, maps in (("teacher", teacher), ("target", target)):
        if maps.shape != student.shape:
            raise ValueError(f"heat maps differ in shape: student {tuple(student.shape)}, {who} {tuple(maps.shape)}")
    mine, theirs, truth = (in_float32(x).flatten(2) for x in (student, teacher.detach(), target.detach()))
    if visible is not None:
        if visible.shape != student.shape[:2]:
            raise ValueError(f"visible of shape {tuple(visible.shape)}: expected {tuple(student.shape[:2])}")
        mine, theirs, truth = mine[visible], theirs[visible], truth[visible]
    squares = alpha * (mine - theirs).square() + (1 - alpha) * (mine - truth.to(mine)).square()
    return squares.sum() / max(squares.numel(), 1)


def _check_alpha(alpha: float, name: str = "") -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{name}alpha={alpha}: expected a number from 0 (truth) to 1 (teacher)")


@method(
    section="2.1",
    role="losses",
    paper="Zhang, Zhu, Ye: Fast Human Pose Estimation",
    year=2019,
    link="https://arxiv.org/abs/1811.05419",
    use="For key points as heat maps, where the teacher's are of the same number and size.",
)
class HeatmapResponse(Loss):
    """Fast pose distillation: heat maps regressed on the teacher's and the true ones together.

    It holds the loss on the truth and needs none beside it. The labels are the true heat maps, float (B, K, H, W), of
    the size of the models' output.

    Args:
        taps: the heat maps; by default the models' own output. Several (``(stage, "@logits")`` for each stage of a
            stacked student) are summed.
        alpha: α, the teacher's part; 0.5, as published.
        visible: the batch's field of booleans (B, K) that says which key points are labelled; ``None`` if all are.
        weight: 1 by default, which goes with the mean over key points and positions. The published code halves the
            mean and divides by the invisible key points too.
        name: of the term.

    Memory: linear in the heat maps. See :func:`heatmap_response` for the formula. Values and gradients were compared
    with the released code, for all key points visible.

    >>> HeatmapResponse()
    HeatmapResponse(logits, weight=1.0, alpha=0.5)
    """

    needs_labels = True

    def __init__(
        self,
        *taps: Tap,
        alpha: float = 0.5,
        visible: str | None = None,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        _check_alpha(alpha, f"{self.name}: ")
        self.alpha, self.visible = alpha, visible

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        assert batch.labels is not None, "binding has checked it"
        for s, t in self.tensors(student, teacher):
            if not s.shape == t.shape == batch.labels.shape or s.ndim != 4:
                raise ValueError(
                    f"{self.name}: the student's heat maps are {tuple(s.shape)}, the teacher's {tuple(t.shape)} and "
                    f"the labels {tuple(batch.labels.shape)}: expected one shape (B, K, H, W)"
                )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        assert batch.labels is not None, "binding has checked it"
        visible = self._visible(batch)
        pairs = self.tensors(student, teacher)
        return torch.stack([heatmap_response(s, t, batch.labels, self.alpha, visible) for s, t in pairs]).sum()

    def units(self, batch: Batch) -> Tensor | int:
        visible = self._visible(batch)
        return len(batch) if visible is None else visible.sum()

    def _visible(self, batch: Batch) -> Tensor | None:
        if self.visible is None:
            return None
        fields = batch.student.kwargs
        if self.visible not in fields:
            raise ValueError(f"{self.name}: the batch has no field {self.visible!r}{nearest(self.visible, fields)}")
        return fields[self.visible].bool()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"
