"""What a student and its teacher say of the same samples: calibration, confusion, disagreements, similar layers."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.data.arrays import ArrayLoader
from tutelage.deploy.calling import device_of, undisturbed
from tutelage.deploy.report import Example, example_of
from tutelage.deploy.similarity import cka_matrix
from tutelage.knowledge.base import classes_last
from tutelage.record import in_float32, logits_of
from tutelage.run import random_state, restore_random
from tutelage.taps import Observer, stages
from tutelage.views import UNLABELLED, Batch, Inputs, judging, move

BINS = 15
# Feature maps are averaged down to so many positions a side before they are compared.
_SIDE = 7


@dataclass(frozen=True)
class Bin:
    """The answers whose confidence lies in (low, high]: how many, how sure on average, and how often right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(eq=False)
class Analysis:
    """What :func:`analyse` found; plain values apart from the examples' images. What is unknown is empty.

    Attributes:
        samples: How many samples (positions, for dense outputs) the figures are of.
        differing: On how many of them student and teacher differ; None without a teacher.
        student_bins: The student's answers by confidence, ``BINS`` of equal width; empty without labels.
        teacher_bins: The teacher's.
        classes: Names of the classes; empty where nobody knows them.
        confusion: (teacher's choice, student's choice, how often), the pairs that occur, most frequent first.
        worst: The disagreements of which both are surest, by the product of their confidences.
        student_stages: Addresses of the student's stages, first to last.
        teacher_stages: Addresses of the teacher's.
        similarity: Linear CKA of each of the student's stages (rows) with each of the teacher's.
        similarity_samples: How many samples that is of.
    """

    samples: int
    differing: int | None = None
    student_bins: list[Bin] = field(default_factory=list)
    teacher_bins: list[Bin] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    confusion: list[tuple[int, int, int]] = field(default_factory=list)
    worst: list[Example] = field(default_factory=list)
    student_stages: list[str] = field(default_factory=list)
    teacher_stages: list[str] = field(default_factory=list)
    similarity: list[list[float]] = field(default_factory=list)
    similarity_samples: int = 0

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> Analysis:
        """An analysis as it stands in a report's file."""
        read = {
            "student_bins": [Bin(**b) for b in stored["student_bins"]],
            "teacher_bins": [Bin(**b) for b in stored["teacher_bins"]],
            "confusion": [(t, s, n) for t, s, n in stored["confusion"]],
            "worst": [example_of(e) for e in stored["worst"]],
        }
        return cls(**{**stored, **read})

    def name_of(self, index: int) -> str:
        """The class's name, or its number."""
        return self.classes[index] if 0 <= index < len(self.classes) else str(index)

    def most_confused(self, limit: int = 20) -> list[int]:
        """Up to ``limit`` classes in the order of their numbers: those with most samples on which the two differ.

        >>> Analysis(9, confusion=[(0, 0, 5), (1, 2, 3), (3, 0, 1)]).most_confused(2)
        [1, 2]
        """
        counts: Counter[int] = Counter()
        for t, s, n in self.confusion:
            counts[t] += n * (t != s)
            counts[s] += n * (t != s)
        return sorted(sorted(counts, key=lambda c: (-counts[c], c))[:limit])


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: Σ_b n_b / N · |accuracy_b − confidence_b|.

    Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599

    >>> round(calibration_error([Bin(0.0, 0.5, 1, 0.4, 0.0), Bin(0.5, 1.0, 3, 0.8, 1.0)]), 4)
    0.25
    """
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total if total else 0.0


def analyse(
    student: nn.Module,
    teacher: nn.Module | None,
    loader: Iterable[Any],
    *,
    views: Any = None,
    classes: Sequence[str] | None = None,
    worst: int = 12,
    similarity_samples: int = 512,
) -> Analysis:
    """Let student and teacher answer the same samples, and compare what they say.

    Nothing of either changes: no mode, no buffer, no global random number. Of a cohort the first peer is looked at,
    of a network with exits the network itself.

    Features are compared as (N, C · h · w) with feature maps averaged down to h, w ≤ 7, and as (N, D) with sequences
    averaged over their tokens, of the stages that :func:`tutelage.taps.stages` finds.

    Args:
        student: Returns logits, as for :func:`tutelage.evaluation.evaluate`.
        teacher: The same; without it, or if its output has no logits, only the student's calibration is found.
        loader: Batches; samples labelled -100 are left out. Without labels there is no calibration.
        views: As in training.
        classes: Names of the classes; by default the ``classes`` of the loader's data set, if it has them.
        worst: How many disagreements to keep.
        similarity_samples: How many samples to compare the layers with; 0 for none.

    Returns:
        The analysis. Pictures are the data set's own pixels for an :class:`tutelage.data.ArrayLoader`, and else the
        student's input stretched to 0..255; a text is a field of the batch that is a list of strings.

    Raises:
        ValueError: The loader is empty, the student has no logits, or labels are not one to each answer.

    Memory: the features of ``similarity_samples`` samples in float32, and their squared number for each stage.

    >>> data = [(torch.eye(3), torch.tensor([0, 1, 1]))]
    >>> found = analyse(nn.Linear(3, 3), nn.Linear(3, 3), data, classes=["ant", "bee", "cow"])
    >>> found.samples, sum(n for _, _, n in found.confusion), len(found.student_bins)
    (3, 3, 15)
    """
    networks = [_plain(m) for m in (student, teacher) if m is not None]
    device = device_of(student)
    views = judging(views)
    seen = _Seen(classes if classes is not None else _known_classes(loader), worst)
    features: _Features | None = None
    before = random_state()
    try:
        with contextlib.ExitStack() as stack:
            for network in networks:
                stack.enter_context(undisturbed(network))
            for raw in loader:
                batch = views(move(raw, device))
                answers = _answers(networks[0], batch.student)
                if answers is None:
                    raise ValueError(f"analyse: no logits in the output of {type(student).__name__}")
                theirs = _answers(networks[1], batch.teacher) if len(networks) > 1 else None
                seen.add(batch, answers, theirs, lambda i, b=batch: _picture(loader, b, i))
                if theirs is not None and similarity_samples > 1:
                    features = features or _Features(networks[0], networks[1], batch)
                    features.add(batch, similarity_samples)
    finally:
        restore_random(before)
    found = seen.result()
    if features and features.count > 1:
        found.student_stages, found.teacher_stages = (list(side.parts) for side in features.sides)
        whole = [[torch.cat(parts) for parts in side.parts.values()] for side in features.sides]
        found.similarity = cka_matrix(*whole).tolist()
        found.similarity_samples = features.count
    return found


def _plain(model: nn.Module) -> nn.Module:
    """The one network among several, or inside another, whose answers count."""
    from tutelage.schemes.online.cohort import Cohort
    from tutelage.schemes.self_distillation.be_your_own_teacher import Exits

    if isinstance(model, Cohort):
        return model.peers[0]
    return model.model if isinstance(model, Exits) else model


def _answers(network: nn.Module, inputs: Inputs) -> Tensor | None:
    """Probabilities, a row for each sample or position."""
    logits = logits_of(inputs.call(network))
    return None if logits is None else classes_last(in_float32(logits)).softmax(1)


class _Seen:
    """What has been counted so far."""

    def __init__(self, classes: Sequence[str], worst: int):
        self.classes, self.limit = list(classes), worst
        self.samples = 0
        self.compared = False
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.sums = [torch.zeros(3, BINS, dtype=torch.float64) for _ in range(2)]
        self.worst: list[tuple[float, int, Example]] = []
        self.order = itertools.count()

    def add(self, batch: Batch, mine: Tensor, theirs: Tensor | None, picture: Any) -> None:
        labels = batch.labels
        per_sample = max(1, len(mine) // max(1, len(batch)))
        sample = torch.arange(len(mine), device=mine.device) // per_sample
        if theirs is not None and len(theirs) != len(mine):
            raise ValueError(f"analyse: the student gives {len(mine)} answers and the teacher {len(theirs)}")
        if labels is not None:
            if labels.is_floating_point() or labels.numel() != len(mine):
                raise ValueError(
                    f"analyse: labels are {labels.dtype} of shape {tuple(labels.shape)}: expected one whole number for "
                    f"each of {len(mine)} answers"
                )
            labels = labels.reshape(-1).to(mine.device)
            kept = labels != UNLABELLED
            labels, mine, sample = labels[kept], mine[kept], sample[kept]
            theirs = None if theirs is None else theirs[kept]
        self.samples += len(mine)
        sides = [mine.max(1)] + ([] if theirs is None else [theirs.max(1)])
        if labels is not None:
            for sums, (sure, choice) in zip(self.sums, sides, strict=False):
                _count(sums, sure, choice == labels)
        if theirs is None:
            return
        self.compared = True
        (sure, choice), (their_sure, their_choice) = sides
        pairs, counts = torch.stack([their_choice, choice], 1).unique(dim=0, return_counts=True)
        for (t, s), n in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.pairs[t, s] += n
        score = torch.where(choice != their_choice, sure * their_sure, -1.0)
        for i in score.topk(min(self.limit, len(score))).indices.tolist():
            value = float(score[i])
            if value < 0 or (len(self.worst) == self.limit and value <= self.worst[0][0]):
                continue
            image, text = picture(int(sample[i]))
            label = self._name(int(labels[i])) if labels is not None else ""
            said, answer = self._name(int(their_choice[i])), self._name(int(choice[i]))
            example = Example(image, text, label, said, answer, float(their_sure[i]), float(sure[i]))
            # The number in the middle keeps equal ones in the order in which they came.
            entry = (value, -next(self.order), example)
            (heapq.heappushpop if len(self.worst) == self.limit else heapq.heappush)(self.worst, entry)

    def _name(self, index: int) -> str:
        return self.classes[index] if index < len(self.classes) else str(index)

    def result(self) -> Analysis:
        if not self.samples:
            raise ValueError("analyse: the loader gave no sample to look at")
        bins = [_bins(sums) for sums in self.sums]
        confusion = sorted(((t, s, n) for (t, s), n in self.pairs.items()), key=lambda c: (-c[2], c[0], c[1]))
        return Analysis(
            samples=self.samples,
            differing=sum(n for t, s, n in confusion if t != s) if self.compared else None,
            student_bins=bins[0],
            teacher_bins=bins[1],
            classes=self.classes,
            confusion=confusion,
            worst=[example for _, _, example in sorted(self.worst, key=lambda e: e[:2], reverse=True)],
        )


def _count(sums: Tensor, sure: Tensor, right: Tensor) -> None:
    """Add to the bins' counts, confidences and right answers."""
    sure = sure.double().cpu()
    # Bin b is (b/B, (b+1)/B], as in the definition of the calibration error.
    index = (sure * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
    for total, values in zip(sums, (torch.ones_like(sure), sure, right.double().cpu()), strict=True):
        total.index_add_(0, index, values)


def _bins(sums: Tensor) -> list[Bin]:
    if not sums[0].any():
        return []
    mean = (sums[1:] / sums[0].clamp(min=1)).tolist()
    counts = sums[0].long().tolist()
    return [Bin(i / BINS, (i + 1) / BINS, n, mean[0][i], mean[1][i]) for i, n in enumerate(counts)]


class _Stages:
    """One network's stage outputs by address, a tensor for each batch.

    Raises:
        ValueError: The network has no stages whose first axis is the batch's.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, rows: int):
        found = [t.address for t in stages(network, inputs) if t.shape[:1] == (rows,)]
        if not found:
            raise ValueError(f"{type(network).__name__} has no stages of {rows} rows")
        self.observer = Observer(network, found)
        self.observer.dry_run(inputs)
        self.parts: dict[str, list[Tensor]] = {address: [] for address in found}

    def read(self, inputs: Inputs) -> dict[str, Tensor]:
        record = self.observer(inputs)
        return {address: _vectors(record[address]).float().cpu() for address in self.parts}

    def fits(self, found: dict[str, Tensor]) -> bool:
        """Whether the features are as long as those before: with inputs of another size they may not be."""
        return all(not parts or parts[0].shape[1] == found[address].shape[1] for address, parts in self.parts.items())


class _Features:
    """The stages of student and teacher on the same samples; none where one of them has no stages."""

    def __init__(self, student: nn.Module, teacher: nn.Module, batch: Batch):
        self.count = 0
        self.sides: list[_Stages] = []
        with contextlib.suppress(ValueError):
            self.sides = [_Stages(m, i, len(batch)) for m, i in ((student, batch.student), (teacher, batch.teacher))]

    def add(self, batch: Batch, limit: int) -> None:
        wanted = min(limit - self.count, len(batch))
        if wanted <= 0 or not self.sides:
            return
        found = [s.read(i) for s, i in zip(self.sides, (batch.student, batch.teacher), strict=True)]
        if not all(side.fits(read) for side, read in zip(self.sides, found, strict=True)):
            return
        for side, read in zip(self.sides, found, strict=True):
            for address, parts in side.parts.items():
                parts.append(read[address][:wanted])
        self.count += wanted


def _vectors(features: Tensor) -> Tensor:
    if features.ndim == 3:
        return features.mean(1)
    if features.ndim == 4 and max(features.shape[2:]) > _SIDE:
        height, width = (min(n, _SIDE) for n in features.shape[2:])
        features = F.adaptive_avg_pool2d(features, (height, width))
    return features.flatten(1)


def _known_classes(loader: Any) -> list[str]:
    return [str(name) for name in getattr(getattr(loader, "dataset", None), "classes", None) or []]


def _picture(loader: Any, batch: Batch, sample: int) -> tuple[np.ndarray | None, str | None]:
    """What a person can look at: an image, a text, or neither."""
    size = len(batch)
    values = [*batch.student.args, *batch.student.kwargs.values()]
    text = next((v[sample] for v in values if _is_texts(v, size)), None)
    if isinstance(loader, ArrayLoader) and batch.ids is not None:
        pixels = loader.dataset.images[int(batch.ids[sample])]
        if pixels.shape[-1] in (1, 3):
            return pixels.numpy(), text
    image = next((v[sample] for v in values if isinstance(v, Tensor) and v.ndim == 4 and v.shape[1] in (1, 3)), None)
    if image is None or min(image.shape[1:]) < 2:
        return None, text
    image = image.detach().float().nan_to_num().cpu()
    low, high = image.min(), image.max()
    scaled = (image - low) / (high - low).clamp(min=1e-12) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy(), text


def _is_texts(value: Any, size: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == size and size > 0 and isinstance(value[0], str)
