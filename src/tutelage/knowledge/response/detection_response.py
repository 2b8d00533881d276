"""Responses of detectors: classes with the background weighted, and boxes for which the teacher is a bound."""

from __future__ import annotations

from torch import Tensor

from tutelage.catalogue import method
from tutelage.errors import nearest
from tutelage.knowledge.base import Loss, Tap, class_axis, classes_last, labelled
from tutelage.knowledge.response.rows import check_target, compared_rows, positive
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import UNLABELLED, Batch


def detection_classes(
    student: Tensor,
    teacher: Tensor,
    background_weight: float = 1.5,
    background: int = 0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """−T² · Σ_c w_c p_c log q_c, mean over the regions that count; w is 1, and greater for the background.

    p and q are the teacher's and the student's predictions softmax(z / T). What detectors mistake is mostly background
    for object and object for background, which the weight makes dearer. It also moves the minimum from q = p to q in
    proportion to w · p.

    Args:
        student: class logits of the regions, (N, C), (B, A, C) or (B, C, H, W).
        teacher: logits of the same regions and shape; no gradient flows to them.
        background_weight: w of the background, ≥ 0.
        background: its class number.
        temperature: T > 0; the paper found 1 best for detection.
        mask: booleans of the logits' shape without classes; regions that are False do not count. If none counts, the
            value is 0, with a gradient of 0.

    Returns:
        A scalar ≥ 0 in nats · T².

    Raises:
        ValueError: an argument outside its range, or the shapes differ.

    Chen, Choi, Yu, Han, Chandraker 2017, "Learning Efficient Object Detection Models with Knowledge Distillation",
    https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation

    >>> import torch
    >>> student, teacher = torch.zeros(1, 2), torch.zeros(1, 2)
    >>> detection_classes(student, teacher, background_weight=3.0)  # (3 · 0.5 + 0.5) · log 2
    tensor(1.3863)
    """
    positive("temperature", temperature)
    if not background_weight >= 0:
        raise ValueError(f"background_weight={background_weight}: expected a number >= 0")
    rows_s, rows_t = compared_rows(student, teacher, mask)
    classes = rows_s.shape[1]
    if not 0 <= background < classes:
        raise ValueError(f"background={background}: expected one of the {classes} classes, from 0")
    weight = rows_s.new_ones(classes)
    weight[background] = background_weight
    said = weight * (rows_t / temperature).softmax(1) * (rows_s / temperature).log_softmax(1)
    return -said.sum() / max(len(rows_s), 1) * temperature**2


def bounded_box_regression(
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    target_boxes: Tensor,
    margin: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """‖r_s − y‖² where ‖r_s − y‖² + m > ‖r_t − y‖², else 0; mean over the regions that count.

    The teacher's box is no target, only a bound: a student that is nearer to the truth than its teacher, by more than
    the margin, is left alone.

    Args:
        student_boxes: regressed boxes, (N, 4), (B, A, 4) or (B, 4, H, W), in whatever coordinates the detector learns.
        teacher_boxes: of the same regions, shape and coordinates; no gradient flows to them.
        target_boxes: the true ones.
        margin: m, in squared coordinates.
        mask: booleans of the boxes' shape without the four; regions that are False (background) do not count. If none
            counts, the value is 0, with a gradient of 0.

    Returns:
        A scalar ≥ 0, and 0 for a student that is nowhere worse than its teacher minus the margin.

    Raises:
        ValueError: the shapes differ.

    Chen, Choi, Yu, Han, Chandraker 2017, "Learning Efficient Object Detection Models with Knowledge Distillation",
    https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation

    >>> import torch
    >>> truth, teacher = torch.zeros(2, 4), torch.full((2, 4), 0.5)
    >>> student = torch.tensor([[0.1, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])  # nearer than the teacher; farther
    >>> bounded_box_regression(student, teacher, truth)
    tensor(2.)
    """
    if target_boxes.shape != student_boxes.shape:
        raise ValueError(
            f"boxes differ in shape: student {tuple(student_boxes.shape)}, target {tuple(target_boxes.shape)}"
        )
    if teacher_boxes.shape != student_boxes.shape:
        raise ValueError(
            f"boxes differ in shape: student {tuple(student_boxes.shape)}, teacher {tuple(teacher_boxes.shape)}"
        )
    mine, theirs = compared_rows(student_boxes, teacher_boxes, mask)
    truth = classes_last(in_float32(target_boxes.detach()))
    if mask is not None:
        truth = truth[mask.reshape(-1)]
    error, bound = ((boxes - truth).square().sum(1) for boxes in (mine, theirs))
    worse = error.detach() + margin > bound
    return error.masked_fill(~worse, 0.0).sum() / max(len(error), 1)


@method(
    section="2.1",
    role="losses",
    paper="Chen, Choi, Yu, Han, Chandraker: Learning Efficient Object Detection Models with Knowledge Distillation",
    year=2017,
    link="https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation",
    use="For detectors whose regions (anchors, cells) are the teacher's, beside the detector's own loss.",
)
class DetectionResponse(Loss):
    """Responses of a detector: weighted soft classes of its regions, and teacher-bounded regression of their boxes.

    Both models must answer for the same regions: the same anchors, cells or proposals. The value is

        detection_classes + ν · (Σ over the regions with an object of the bounded box error) / (all labelled regions)

    and stands beside the detector's own loss on the truth, :class:`DetectionLoss` for example. The labels are the
    regions' classes, (B, A) for logits (B, A, C) or (B, H, W) for (B, C, H, W): the background's number where there is
    no object, -100 where the region does not count. Their true boxes are a further field of the batch, of the shape of
    the boxes; boxes are the same for all classes.

    Args:
        taps: two, the class logits and the boxes; ``"@logits"`` and ``"@boxes"`` by default, for models whose output
            has fields of these names.
        background_weight: w of the background; 1.5, as in the paper.
        background: its class number.
        margin: m of the boxes, in squared coordinates.
        nu: ν of the boxes; 0.5.
        temperature: T of the classes; 1, as in the paper.
        targets: the batch's field that holds the true boxes.
        weight: 0.5 by default; in the paper 1 − μ, where μ weighs the loss on the true classes.
        name: of the term.

    Memory: linear in the outputs. See :func:`detection_classes` and :func:`bounded_box_regression` for the formulas.
    The paper's full text was not at hand and its code is not public. The two formulas, the background's 1.5 and T = 1
    are confirmed by several summaries of it; ν = 0.5 by one implementation; μ and the margin by none, so that 0.5 and
    0 are a choice.

    >>> DetectionResponse("cls_head", "box_head")
    DetectionResponse(cls_head, box_head, weight=0.5, background_weight=1.5, margin=0.0, nu=0.5, temperature=1.0)
    """

    needs_labels = True

    def __init__(
        self,
        *taps: Tap,
        background_weight: float = 1.5,
        background: int = 0,
        margin: float = 0.0,
        nu: float = 0.5,
        temperature: float = 1.0,
        targets: str = "boxes",
        weight: Weight = 0.5,
        name: str | None = None,
    ):
        super().__init__(*(taps or ("@logits", "@boxes")), weight=weight, name=name)
        positive(f"{self.name}: temperature", temperature)
        for field, value in (("background_weight", background_weight), ("background", background), ("nu", nu)):
            if not value >= 0:
                raise ValueError(f"{self.name}: {field}={value}: expected a number >= 0")
        self.background_weight, self.background, self.temperature = background_weight, background, temperature
        self.margin, self.nu, self.targets = margin, nu, targets

    def at(self, *taps: Tap) -> Loss:
        if len(taps) != 2:
            raise ValueError(f"{type(self).__name__}: {len(taps)} taps: expected two, the class logits and the boxes")
        return super().at(*taps)

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        if len(self.pairs) != 2:
            raise ValueError(f"{self.name}: its taps name {len(self.pairs)} tensors: expected class logits and boxes")
        (classes, their_classes), (boxes, their_boxes) = self.tensors(student, teacher)
        for what, mine, theirs in (("class logits", classes, their_classes), ("boxes", boxes, their_boxes)):
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"{self.name}: the student's {what} are {tuple(mine.shape)} and the teacher's "
                    f"{tuple(theirs.shape)}; expected the same regions and classes"
                )
        check_target(self.name, classes, batch.labels)
        if not self.background < classes.shape[class_axis(classes)]:
            raise ValueError(f"{self.name}: background={self.background}: the logits have no such class")
        truth = self._truth(batch)
        if len(classes_last(boxes)) != len(classes_last(classes)) or truth.shape != boxes.shape:
            raise ValueError(
                f"{self.name}: class logits {tuple(classes.shape)}, boxes {tuple(boxes.shape)} and the batch's "
                f"{self.targets!r} {tuple(truth.shape)}: expected the same regions, and boxes of one shape"
            )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        assert batch.labels is not None, "binding has checked it"
        (classes, their_classes), (boxes, their_boxes) = self.tensors(student, teacher)
        counted = batch.labels != UNLABELLED
        objects = counted & (batch.labels != self.background)
        soft = detection_classes(
            classes, their_classes, self.background_weight, self.background, self.temperature, counted
        )
        bounded = bounded_box_regression(boxes, their_boxes, self._truth(batch), self.margin, objects)
        return soft + self.nu * bounded * objects.sum() / counted.sum().clamp(min=1)

    def units(self, batch: Batch) -> Tensor | int:
        assert batch.labels is not None, "binding has checked it"
        return labelled(batch.labels)

    def _truth(self, batch: Batch) -> Tensor:
        fields = batch.student.kwargs
        if self.targets not in fields:
            raise ValueError(
                f"{self.name}: the batch has no field {self.targets!r} with the true boxes"
                f"{nearest(self.targets, fields)}"
            )
        return fields[self.targets]

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, background_weight={self.background_weight}, margin={self.margin}, nu={self.nu}, "
            f"temperature={self.temperature}"
        )
