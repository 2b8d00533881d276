"""Knowledge distillation meets self-supervision: what a batch's rotated copies say of each other's originals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Tap
from tutelage.knowledge.feature.first_stage import FirstStage
from tutelage.knowledge.response.kd import kd_divergence
from tutelage.knowledge.rows import flat_rows, unit_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import UNLABELLED, Batch, Inputs, read_batch


@dataclass
class CopiedBatch(Batch):
    """B samples and after them ``copies`` transformed copies of all B, each copy in the order of the samples.

    Args:
        copies: how many of each sample; the batch holds (1 + copies) · B.
    """

    copies: int = 0


class Rotations:
    """Both models see each image as it is and turned by 90, 180 and 270 degrees.

    The images of the batch come first, then all of them turned once, twice and three times, anticlockwise. The turned
    ones are unlabelled (-100), so supervised losses pass over them, and keep the sample's id. ``KD`` counts every
    sample, labelled or not, and so the turned ones too. Where a distillation is evaluated with its views, the turned
    images are passed over as unlabelled, but run through the models.

    Args:
        augment: applied to the turned images alone. The authors crop each of the four by itself, after turning:
            ``CropFlip(4, flip=False)``, here with zeros of the normalised images around. It is drawn anew for the
            teacher where student and teacher are given different inputs.

    Raises:
        ValueError: an input that is no batch of square images (B, C, S, S), or labels that are no class numbers.

    Memory: four times the images.

    >>> batch = Rotations()((torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([7])))
    >>> batch.student.args[0].flatten(1)
    tensor([[1., 2., 3., 4.],
            [2., 4., 1., 3.],
            [4., 3., 2., 1.],
            [3., 1., 4., 2.]])
    >>> batch.labels, batch.copies
    (tensor([   7, -100, -100, -100]), 3)
    """

    def __init__(self, augment: Callable[[Tensor], Tensor] | None = None):
        self.augment = augment

    def __call__(self, raw: Any) -> CopiedBatch:
        batch = read_batch(raw)
        student = self._turned(batch.student)
        teacher = student if batch.teacher is batch.student else self._turned(batch.teacher)
        labels, ids = batch.labels, batch.ids
        if labels is not None:
            if labels.is_floating_point():
                raise ValueError(
                    f"Rotations: labels of type {labels.dtype}: expected class numbers, of which -100 says that a "
                    "turned image has none"
                )
            labels = torch.cat([labels, *[torch.full_like(labels, UNLABELLED)] * 3])
        if ids is not None:
            ids = ids.repeat(4)
        return CopiedBatch(student, teacher, labels, ids, batch.progress, batch.population, copies=3)

    def _turned(self, inputs: Inputs) -> Inputs:
        for tensor in inputs.tensors():
            if tensor.ndim != 4 or tensor.shape[2] != tensor.shape[3] or not tensor.is_floating_point():
                raise ValueError(
                    f"Rotations: expected square images (B, C, S, S) of floating-point numbers, got {tensor.dtype} of "
                    f"shape {tuple(tensor.shape)}"
                )
        return inputs.map(self._four)

    def _four(self, images: Tensor) -> Tensor:
        # copied into tensors like the images, which keeps their memory format
        turned = [torch.empty_like(images).copy_(torch.rot90(images, k, (2, 3))) for k in (1, 2, 3)]
        return torch.cat([images, *(self.augment(x) if self.augment else x for x in turned)])


def copy_similarities(features: Tensor, copies: int = 3) -> Tensor:
    """cos(copy, original) of every transformed copy with every original.

    Args:
        features: ((1 + copies) · B, ...), the B originals first, then each copy of all of them in the same order.
        copies: of each original.

    Returns:
        (copies · B, B) cosines; with a row of zeros they are 0.

    Raises:
        ValueError: the rows are no originals with so many copies.

    >>> copy_similarities(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [0.0, 0.0]]), copies=1)
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    size, left = divmod(len(features), 1 + copies)
    if left or copies < 1:
        raise ValueError(f"{len(features)} rows are not originals with {copies} copies of each")
    rows = unit_rows(flat_rows(features))
    return rows[size:] @ rows[:size].mT


def copy_contrast(features: Tensor, copies: int = 3) -> Tensor:
    """−log softmax(:func:`copy_similarities`) at each copy's own original, mean over copies: the pretext task.

    The cosines are not divided by a temperature, as in the authors' code.

    Args:
        features: ((1 + copies) · B, ...) as in :func:`copy_similarities`.
        copies: of each original.

    Returns:
        A scalar ≥ 0.

    >>> copy_contrast(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), copies=1)  # log(1 + e⁻²)
    tensor(0.1269)
    """
    similarities = copy_similarities(features, copies)
    return F.cross_entropy(similarities, _own(similarities))


def _own(similarities: Tensor) -> Tensor:
    """Each copy's original."""
    copies, originals = similarities.shape
    return torch.arange(originals, device=similarities.device).repeat(copies // max(originals, 1))


def selected(scores: Tensor, truth: Tensor, ratio: float) -> Tensor:
    """Which rows of a teacher's predictions to learn from: all right ones, and a part of the wrong, the least wrong.

    How wrong a row is, is the rank of the truth in it: the number of classes that score higher. Of rows of the same
    rank those come first in which the truth is more probable (the authors leave it to chance).

    Args:
        scores: (N, C) logits or similarities.
        truth: (N,) class numbers; a negative one (no label) counts as predicted rightly.
        ratio: the part of the wrong rows to keep, rounded down.

    Returns:
        (N,) booleans.

    >>> selected(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0, 0]), ratio=0.5)
    tensor([ True,  True, False])
    """
    scores = scores.detach().log_softmax(1)
    own = scores.gather(1, truth.clamp(min=0).unsqueeze(1))
    rank = (scores > own).sum(1).masked_fill(truth < 0, 0)
    probable = own.squeeze(1).argsort(descending=True)
    order = probable[rank[probable].argsort(stable=True)]
    right = (rank == 0).sum()
    keep = right + ((len(rank) - right) * ratio).long()
    return torch.empty_like(rank, dtype=torch.bool).index_copy(
        0, order, torch.arange(len(rank), device=rank.device) < keep
    )


def similarity_divergence(
    student: Tensor, teacher: Tensor, copies: int = 3, temperature: float = 0.5, ratio: float = 0.75
) -> Tensor:
    """τ² · KL(softmax(A_t / τ) ‖ softmax(A_s / τ)), mean over the selected rows of A = :func:`copy_similarities`.

    Row i says which original a copy is thought to be of. Rows in which the teacher finds the right one all count, and
    of the others the ``ratio`` that is least wrong (:func:`selected`).

    Args:
        student: ((1 + copies) · B, ...) features of the originals and then of their copies.
        teacher: the teacher's, of any other size; no gradient flows to them.
        copies: of each original.
        temperature: τ.
        ratio: the part of the wrongly solved rows that counts.

    Returns:
        A scalar ≥ 0 in nats · τ², and 0 for equal similarities.

    Raises:
        ValueError: different numbers of rows, or no originals with so many copies.

    Memory: copies · B².

    Xu, Liu, Li, Loy 2020, "Knowledge Distillation Meets Self-Supervision", https://arxiv.org/abs/2006.07114

    >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> similarity_divergence(features, 2 * features, copies=1)
    tensor(0.)
    """
    s, t = copy_similarities(student, copies), copy_similarities(teacher.detach(), copies)
    return kd_divergence(s, t, temperature, mask=selected(t, _own(t), ratio))


class ContrastHead(nn.Sequential):
    """Two layers of an embedding's own width, whose outputs' angles solve the pretext task.

    Buffers: ``trained``, whether it has learned by :func:`copy_contrast`.

    Args:
        features: of the embedding.

    >>> ContrastHead(4)(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    trained: Tensor

    def __init__(self, features: int):
        super().__init__(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features))
        self.register_buffer("trained", torch.tensor(False))


@method(
    section="2.3",
    role="losses",
    paper="Xu, Liu, Li, Loy: Knowledge Distillation Meets Self-Supervision",
    year=2020,
    link="https://arxiv.org/abs/2006.07114",
    needs=("extra stages", "extra memory"),
    use="Square images and time for four passes each: few or noisy labels, or a student of another architecture.",
)
class SSKD(FirstStage):
    """Self-supervision: how the teacher matches rotated images with their originals, and what it says of them.

    It goes with ``views=Rotations()`` (or any view that returns a :class:`CopiedBatch`) and two stages. In the first,
    ``SSKD(train="teacher head")``, a two-layer head on the frozen teacher's embedding learns to tell which original a
    turned image is of (:func:`copy_contrast`); the student's forward pass does not run. In the second, beside
    ``TaskLoss(weight=0.1)``, whose labels the turned images lack, the term is the sum of

    - ``normal`` · T²·KL of the logits of the images as they are,
    - ``transformed`` · T²·KL of the logits of the turned ones, of which those that the teacher gets wrong may be left
      out by ``transformed_ratio`` (:func:`selected`),
    - ``similarity`` · :func:`similarity_divergence` of the heads' outputs; the student's head learns with the student.

    The numbers are the defaults of the authors' code, whose commands change none of them; the weights belong to means
    over samples, over the selected turned images and over the selected rows. Because ``KD`` counts turned images too,
    ``KD(weight=3.6)`` is the first two terms in one (0.9 of a quarter and 2.7 of three quarters of the batch), so that
    ``SSKD(normal=0, transformed=0)`` may stand beside it. The heads are in no student that is saved or exported.

    Args:
        taps: the embedding, by default what the last linear layer reads. One pair.
        train: ``"teacher head"`` in the first stage, ``"student"`` in the second.
        normal, transformed, similarity: weights of the parts; 0 leaves one out.
        temperature: T of the logits.
        similarity_temperature: τ of the similarities.
        transformed_ratio: the part of the turned images that the teacher classifies wrongly that counts. Below 1 it
            needs labels, of which the originals' are taken; unlabelled samples count.
        similarity_ratio: the part of the turned images that the teacher matches wrongly that counts.
        weight: of the term.
        name: of the term; the same in both stages.

    Raises:
        ValueError: an argument out of range, a batch without copies, or no stage before that trained the teacher's
            head.

    Memory: the forward passes of four times the batch, copies · B², and two heads of D² for embeddings of size D.

    Xu, Liu, Li, Loy 2020, "Knowledge Distillation Meets Self-Supervision", https://arxiv.org/abs/2006.07114

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallCNN
    >>> images, student, teacher = torch.randn(4, 1, 8, 8), SmallCNN(2), SmallCNN(4)
    >>> first = Distillation(student, teacher, [SSKD(train="teacher head")], Rotations()).bind(images)
    >>> first(images).total.backward()
    >>> second = Distillation(student, teacher, [SSKD()], Rotations()).continue_from(first).bind(images)
    >>> bool(second(images).total > 0)
    True
    """

    default_reads = "embedding"
    students_parts = ("head_student",)

    def __init__(
        self,
        *taps: Tap,
        train: Literal["student", "teacher head"] = "student",
        normal: float = 0.9,
        transformed: float = 2.7,
        similarity: float = 10.0,
        temperature: float = 4.0,
        similarity_temperature: float = 0.5,
        transformed_ratio: float = 1.0,
        similarity_ratio: float = 0.75,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, first=train == "teacher head", weight=weight, name=name)
        if train not in ("student", "teacher head"):
            raise ValueError(f"{self.name}: train={train!r}: expected 'student' or 'teacher head'")
        parts = {"normal": normal, "transformed": transformed, "similarity": similarity}
        for field, number in parts.items():
            if not number >= 0:
                raise ValueError(f"{self.name}: {field}={number}: expected a weight of 0 or more")
        if not any(parts.values()):
            raise ValueError(f"{self.name}: normal, transformed and similarity are all 0: expected one that is not")
        for field, number in (("temperature", temperature), ("similarity_temperature", similarity_temperature)):
            if not number > 0:
                raise ValueError(f"{self.name}: {field}={number}: expected a positive number")
        for field, number in (("transformed_ratio", transformed_ratio), ("similarity_ratio", similarity_ratio)):
            if not 0 <= number <= 1:
                raise ValueError(f"{self.name}: {field}={number}: expected a part between 0 and 1")
        self.normal, self.transformed, self.similarity = normal, transformed, similarity
        self.temperature, self.similarity_temperature = temperature, similarity_temperature
        self.transformed_ratio, self.similarity_ratio = transformed_ratio, similarity_ratio
        self.needs_labels = not self.first and transformed > 0 and transformed_ratio < 1

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        chosen = super().resolve(student, teacher, batch)
        if len(self.pairs) != 1:
            raise ValueError(f"{self.name}: reads one pair of embeddings, not {len(self.pairs)}")
        if not self.first and (self.normal or self.transformed):
            self.pairs = [*self.pairs, ("@logits", "@logits")]
        return chosen

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        s, t = (flat_rows(x) for x in self.tensors(student, teacher)[0])
        self.head_teacher = ContrastHead(t.shape[1]).requires_grad_(self.first).to(t)
        self.head_student = nn.Identity() if self.first or not self.similarity else ContrastHead(s.shape[1]).to(s)

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        if not isinstance(batch, CopiedBatch):
            raise ValueError(
                f"{self.name}: the batch has no transformed copies of its samples: give views=Rotations(), or a view "
                "that returns a CopiedBatch"
            )
        if len(batch) < 2 * (1 + batch.copies):
            raise ValueError(f"{self.name} compares samples and needs at least 2 in a batch; the first batch has 1")
        if self.needs_labels and batch.labels is not None and batch.labels.ndim != 1:
            raise ValueError(
                f"{self.name}: transformed_ratio={self.transformed_ratio} needs one class number for each sample, not "
                f"labels of shape {tuple(batch.labels.shape)}"
            )
        if not self.first and self.similarity and not bool(self.head_teacher.trained):
            raise ValueError(
                f"{self.name}: the teacher's head has learned nothing: let a stage with "
                f"{type(self).__name__}(train='teacher head') of the same name go before"
            )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        assert isinstance(batch, CopiedBatch), "binding has checked it"
        both = self.tensors(student, teacher)
        if self.first:
            if self.training and torch.is_grad_enabled():
                self.head_teacher.trained.fill_(True)
            return copy_contrast(self.head_teacher(flat_rows(both[0][1])), batch.copies)
        size = len(batch) // (1 + batch.copies)
        terms = []
        if self.normal:
            s, t = (logits[:size] for logits in both[1])
            terms.append(self.normal * kd_divergence(s, t, self.temperature))
        if self.transformed:
            s, t = (logits[size:] for logits in both[1])
            keep = None
            if self.needs_labels and batch.labels is not None:
                keep = selected(t, batch.labels[:size].repeat(batch.copies), self.transformed_ratio)
            terms.append(self.transformed * kd_divergence(s, t, self.temperature, mask=keep))
        if self.similarity:
            mine, theirs = self.head_student(flat_rows(both[0][0])), self.head_teacher(flat_rows(both[0][1]))
            options = (batch.copies, self.similarity_temperature, self.similarity_ratio)
            terms.append(self.similarity * similarity_divergence(mine, theirs, *options))
        return torch.stack(terms).sum()

    def extra_repr(self) -> str:
        if self.first:
            return f"{super().extra_repr()}, train='teacher head'"
        parts = ", ".join(f"{name}={getattr(self, name)}" for name in ("normal", "transformed", "similarity"))
        return f"{super().extra_repr()}, {parts}"
