"""One-stage detection on a grid: each cell says what object has its middle there and where its box ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.detection_loss import DetectionLoss
from tutelage.record import in_float32
from tutelage.taps import Address
from tutelage.tasks import Figures
from tutelage.views import Batch

LEAST_SCORE = 0.05  # what is less sure is no detection
SURE = 0.5  # agreement is about what a model would show
OVERLAP = 0.5
_FIELDS = (Address.parse("@logits"), Address.parse("@boxes"))


@dataclass(frozen=True)
class DetectionMetrics(Figures):
    """What an evaluation of a detector found; shares are between 0 and 1.

    Args:
        ap50: :func:`average_precision` at an overlap of 0.5, mean over the classes.
        samples: how many images these are of.
        agreement: how alike the student's and the teacher's detections of probability 0.5 and more are:
            2 · (pairs of one class whose boxes overlap by 0.5) / (the student's + the teacher's); 0 if there is none.
    """

    main: ClassVar[str] = "ap50"
    title: ClassVar[str] = "AP@0.5"
    ap50: float
    samples: int
    agreement: float | None = None


@dataclass(frozen=True)
class Boxes:
    """The boxes of one image.

    Args:
        corners: (N, 4) left, top, right and bottom in pixels; right and bottom are the first pixels outside.
        classes: (N) class numbers.
        scores: (N) probabilities; 1 for the truth.
    """

    corners: Tensor
    classes: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def where(self, kept: Tensor) -> Boxes:
        """Those that the booleans or positions name."""
        return Boxes(self.corners[kept], self.classes[kept], self.scores[kept])


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of ``a`` (N, 4) with every one of ``b`` (M, 4), as (N, M).

    >>> overlap(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6]]))
    tensor([[0.3333, 0.0000]])
    """
    size = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])).clamp(min=0)
    shared = size.prod(2)
    areas = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(1) for x in (a, b)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-9)


def matches(found: Boxes, truth: Boxes, least: float = OVERLAP) -> Tensor:
    """Which of the boxes found are right (N): the surest first, each looks at the true box of its class that it
    overlaps most, and is right if that is by ``least`` or more and nobody before it took the box."""
    right = torch.zeros(len(found), dtype=torch.bool)
    if not len(found) or not len(truth):
        return right
    shared = overlap(found.corners, truth.corners)
    shared[found.classes[:, None] != truth.classes] = 0.0
    best, which = shared.max(1)
    taken: set[int] = set()
    for n in found.scores.argsort(descending=True, stable=True).tolist():
        if best[n] >= least and int(which[n]) not in taken:
            taken.add(int(which[n]))
            right[n] = True
    return right


def average_precision(found: Sequence[Boxes], truth: Sequence[Boxes], least: float = OVERLAP) -> float:
    """Mean over the classes that occur of the area under precision by recall.

    Over all images, the boxes of a class are taken from the surest on; precision is made monotone: at a recall it is
    the best one at that recall or a higher one (as in the Pascal VOC challenge since 2010).

    Args:
        found: the boxes found in each image.
        truth: the true boxes of the same images.
        least: intersection over union from which on a box is right.

    Raises:
        ValueError: there is no true box, or the numbers of images differ.

    >>> there = Boxes(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([1]), torch.ones(1))
    >>> twice = Boxes(torch.tensor([[9.0, 9, 12, 12], [0, 0, 4, 3]]), torch.tensor([1, 1]), torch.tensor([0.9, 0.8]))
    >>> average_precision([twice], [there])  # right at the second box
    0.5
    """
    if len(found) != len(truth):
        raise ValueError(f"boxes of {len(found)} images, and true boxes of {len(truth)}")
    known = torch.cat([t.classes for t in truth]) if truth else torch.zeros(0)
    if not len(known):
        raise ValueError("truth: there is no box, so that nothing can be found")
    right = torch.cat([matches(f, t, least) for f, t in zip(found, truth, strict=True)])
    classes, scores = torch.cat([f.classes for f in found]), torch.cat([f.scores for f in found])
    areas = []
    for number in known.unique().tolist():
        mine = classes == number
        hits = right[mine][scores[mine].argsort(descending=True, stable=True)].double()
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        best = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
        areas.append(float((best * hits).sum() / (known == number).sum()))
    return sum(areas) / len(areas)


def encoded(corners: Tensor, cells: Tensor, stride: int) -> Tensor:
    """Boxes as distances in strides from the middle of the cell: to the left, top, right and bottom.

    Args:
        corners: (N, 4) as in :class:`Boxes`.
        cells: (N, 2) column and row of the cell.
        stride: pixels of a cell's side.

    >>> encoded(torch.tensor([[2.0, 4, 10, 12]]), torch.tensor([[0, 1]]), stride=8)
    tensor([[0.2500, 1.0000, 0.7500, 0.0000]])
    """
    middle = (cells + 0.5) * stride
    return torch.cat([middle - corners[:, :2], corners[:, 2:] - middle], 1) / stride


class GridDetection:
    """The task of data whose labels are a class for each cell and whose field ``boxes`` are :func:`encoded` boxes.

    A cell's most likely object, if its probability is 0.05 or more, is a detection; every cell speaks for itself, no
    overlapping boxes are suppressed. Outputs have fields (or keys) ``logits`` (B, C, H, W) and ``boxes``
    (B, 4, H, W); class 0 is the background.

    Args:
        stride: pixels of a cell's side.
    """

    name = "detection"

    def __init__(self, stride: int):
        self.stride = stride

    def loss(self) -> Loss:
        return DetectionLoss()

    def look(self, output: Any, batch: Batch) -> tuple[list[Boxes], list[Boxes]]:
        assert batch.labels is not None
        logits, sides = (in_float32(field.read_output(output)) for field in _FIELDS)
        probabilities = logits.softmax(1)
        scores, classes = probabilities[:, 1:].max(1)
        found = self._boxes(classes + 1, scores, sides, scores >= LEAST_SCORE)
        truth = self._boxes(batch.labels, torch.ones_like(scores), batch.student.kwargs["boxes"], batch.labels > 0)
        return found, truth

    def figures(self, looks: list[Any], theirs: list[Any] | None = None) -> DetectionMetrics:
        found, truth = _images(looks)
        alike = None
        if theirs is not None:
            mine, other = ([b.where(b.scores >= SURE) for b in part] for part in (found, _images(theirs)[0]))
            both = sum(int(matches(m, o).sum()) for m, o in zip(mine, other, strict=True))
            said = sum(map(len, mine)) + sum(map(len, other))
            alike = 2 * both / said if said else 0.0
        return DetectionMetrics(average_precision(found, truth), len(truth), alike)

    def _boxes(self, classes: Tensor, scores: Tensor, boxes: Tensor, there: Tensor) -> list[Boxes]:
        """The boxes of each image in the cells where there is one."""
        classes, scores, boxes, there = (x.cpu() for x in (classes, scores, boxes, there))
        image, row, column = there.nonzero(as_tuple=True)
        middle = (torch.stack([column, row], 1) + 0.5) * self.stride
        distances = boxes.permute(0, 2, 3, 1)[there] * self.stride
        corners = torch.cat([middle - distances[:, :2], middle + distances[:, 2:]], 1)
        counts = torch.bincount(image, minlength=len(there)).tolist()
        parts = (corners.split(counts), classes[there].split(counts), scores[there].split(counts))
        return [Boxes(*part) for part in zip(*parts, strict=True)]


def _images(looks: list[tuple[list[Boxes], list[Boxes]]]) -> tuple[list[Boxes], list[Boxes]]:
    found = [boxes for look in looks for boxes in look[0]]
    return found, [boxes for look in looks for boxes in look[1]]
