"""KDCL: all peers learn from one target, which is made of what they say so that it is better than each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.data.loaders import Loaders
from tutelage.evaluation import evaluating
from tutelage.knowledge.base import Loss, class_axis, classes_last
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record, in_float32
from tutelage.schemes.online.cohort import PeerTeacher, group_record
from tutelage.teachers import Lesson
from tutelage.views import UNLABELLED, Batch, move, read_batch

Rule = Literal["naive", "linear", "min_logit", "general"]


def naive_weights(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """For each sample, 1 for the peer with the smallest cross-entropy and 0 for the others; (N, M), without a graph.

    Args:
        logits: of each of M peers, (N, C).
        labels: (N) class numbers, or (N, C) probabilities; samples labelled -100 weigh all peers alike.

    >>> unsure, right = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    >>> naive_weights([unsure, right], torch.tensor([1]))
    tensor([[0., 1.]])
    """
    relative, known = _relative(logits, labels)
    best = relative.logsumexp(2).argmin(0)
    return torch.where(known[:, None], nn.functional.one_hot(best, len(relative)).to(relative), 1 / len(relative))


def linear_weights(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """For each sample, the convex combination of the peers' logits that has the smallest cross-entropy.

    α = argmin CE(Σ_m α_m z_m, y) with α ≥ 0 and Σ α_m = 1: a convex problem. Weight goes from the peer with the
    steepest slope that has some to the one with the lowest, as much as is best between the two (Newton's steps, kept
    inside a bracket), until nothing is gained. Two peers need one such exchange.

    Args:
        logits: of each of M peers, (N, C).
        labels: (N) class numbers, or (N, C) probabilities; samples labelled -100 weigh all peers alike.

    Returns:
        (N, M), outside the graph.

    >>> left, right = torch.tensor([[2.0, 3.0, 0.0]]), torch.tensor([[2.0, 0.0, 3.0]])
    >>> linear_weights([left, right], torch.tensor([0]))  # each corrects the other's mistake
    tensor([[0.5000, 0.5000]])
    """
    relative, known = _relative(logits, labels)
    peers = len(relative)
    weights = relative.new_full((relative.shape[1], peers), 1 / peers)
    for _ in range(1 if peers == 2 else 8 * peers):
        mixed = torch.einsum("nm,mnc->nc", weights, relative)
        slope = torch.einsum("nc,mnc->nm", mixed.softmax(1), relative)
        low = slope.argmin(1)
        high = slope.masked_fill(weights <= 0, -torch.inf).argmax(1)
        rows = torch.arange(len(low), device=low.device)
        moved = _best_step(mixed, relative[low, rows] - relative[high, rows], weights[rows, high])
        weights = weights.scatter_add(1, low[:, None], moved[:, None]).scatter_add(1, high[:, None], -moved[:, None])
    return torch.where(known[:, None], weights, 1 / peers)


def _best_step(mixed: Tensor, direction: Tensor, most: Tensor) -> Tensor:
    """t in 0..most with the smallest logsumexp(mixed + t·direction) of each row, which falls at t = 0."""
    low, high = torch.zeros_like(most), most
    step = most  # first of all, whether to take everything
    for _ in range(24):
        p = (mixed + step[:, None] * direction).softmax(1)
        slope = (p * direction).sum(1)
        curvature = (p * (direction - slope[:, None]).square()).sum(1)
        low, high = torch.where(slope < 0, step, low), torch.where(slope > 0, step, high)
        newton = step - slope / curvature.clamp(min=1e-12)
        step = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
    return step


def min_logit(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """z_c = min_m (z_mc − z_my): of each class the logit of the peer that is surest against it.

    (N, C), without a graph; 0 at the true class y. Its cross-entropy is at most that of the best peer.

    Args:
        logits: of each of M peers, (N, C).
        labels: (N) class numbers, or (N, C) probabilities; samples labelled -100 get the mean of the logits.

    >>> min_logit([torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]])], torch.tensor([0]))
    tensor([[ 0., -2., -2.]])
    """
    relative, known = _relative(logits, labels)
    return torch.where(known[:, None], relative.amin(0), relative.mean(0))


def error_correlation(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """C_ij = 1/N Σ_n ⟨softmax(z_in) − y_n, softmax(z_jn) − y_n⟩: how the errors of M peers go together.

    Args:
        logits: of each of M peers, (N, C).
        labels: (N) class numbers, or (N, C) probabilities; samples labelled -100 do not count.

    Returns:
        (M, M), symmetric; float64.

    >>> error_correlation([torch.zeros(1, 2), torch.tensor([[100.0, 0.0]])], torch.tensor([1])).tolist()
    [[0.5, 1.0], [1.0, 2.0]]
    """
    stacked = torch.stack([z.detach() for z in logits]).double()
    truth, known = _one_hot(stacked, labels)
    errors = ((stacked.softmax(2) - truth) * known[:, None]).flatten(1)
    return errors @ errors.T / known.sum().clamp(min=1)


def general_weights(correlation: Tensor) -> Tensor:
    """w_i = Σ_j C⁻¹_ij / Σ_kj C⁻¹_kj: the weights of sum 1 with the smallest wᵀCw, the error of the average.

    A peer whose weight would be negative leaves, and the others' are found again. So that peers who err alike have an
    inverse, 1e-6 of the mean of C's diagonal is added to it.

    Args:
        correlation: C, (M, M), of :func:`error_correlation`.

    Returns:
        (M,), ≥ 0, of sum 1.

    >>> general_weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([0.7500, 0.2500])
    """
    c = correlation.double()
    c = c + torch.eye(len(c), dtype=c.dtype, device=c.device) * (1e-6 * c.diagonal().mean()).clamp(min=1e-12)
    weights, staying = c.new_zeros(len(c)), torch.arange(len(c), device=c.device)
    while True:
        w = torch.linalg.solve(c[staying][:, staying], torch.ones_like(staying, dtype=c.dtype))
        if bool((w >= 0).all()):
            weights[staying] = w / w.sum()
            return weights.to(correlation)
        staying = staying[w > 0]


@method(
    section="3.2",
    role="teacher",
    paper="Guo, Wang, Wu, Yu, Liang, Hu, Luo: Online Knowledge Distillation via Collaborative Learning",
    year=2020,
    link="https://openaccess.thecvf.com/content_CVPR_2020/html/"
    "Guo_Online_Knowledge_Distillation_via_Collaborative_Learning_CVPR_2020_paper.html",
    needs=("labels", "other models"),
    use="No trained teacher and peers of unequal strength: the weak ones do not pull the strong ones down.",
)
class KDCL(PeerTeacher):
    """Peers that learn from one target made of all their logits and the labels: CE(z_i, y) + λ·T²·KL(z ‖ z_i).

    The rule makes the target z of a sample from the peers' logits z_1 … z_M:

    - ``"naive"``: the logits of the peer with the smallest cross-entropy (:func:`naive_weights`).
    - ``"linear"``: the convex combination with the smallest cross-entropy (:func:`linear_weights`).
    - ``"min_logit"``: of each class the smallest logit relative to the true class's (:func:`min_logit`).
    - ``"general"``: one combination for all samples, from the inverse correlation of the peers' errors on validation
      data (:func:`general_weights`): the smallest error of the average, which is measured, not fitted.

    The first three look at the sample's own label, so their targets are never worse than the best peer's on training
    data. Samples without a label get the mean of the logits. Give the cohort ``augment``: in the paper each peer sees
    the image through a draw of its own, and all learn the same target. Any losses stand beside it: features have the
    peers' mean, weighted as the logits are, as their target.

    Where the paper could not be read in full: that ``naive`` and ``linear`` choose for each sample follows from their
    formulas; that ``general`` combines logits, as ``linear`` does, and not probabilities, is our reading. T = 2 and
    λ = 1 are as two independent accounts of the paper give them; no code of the authors is public. The paper's general
    weights may be negative; here they may not.

    The student role must be a :class:`tutelage.Cohort` of peers with the same classes.

    Args:
        rule: how the target is made.
        validation: labelled batches (or a :class:`tutelage.data.loaders.Loaders`), for ``"general"`` alone. They are
            read without views, and by every process in full.
        measurements: how often ``"general"`` measures, evenly over the training; the authors do once an epoch.

    Raises:
        ValueError: an unknown rule, ``"general"`` without validation data or another rule with it.

    Memory: a few copies of all peers' logits.

    Guo, Wang, Wu, Yu, Liang, Hu, Luo 2020, "Online Knowledge Distillation via Collaborative Learning",
    https://openaccess.thecvf.com/content_CVPR_2020/html/Guo_Online_Knowledge_Distillation_via_Collaborative_Learning_CVPR_2020_paper.html

    >>> from tutelage import Cohort, Distillation
    >>> cohort, teacher = Cohort([nn.Linear(8, 3), nn.Linear(8, 3)]), KDCL()
    >>> losses = Distillation(cohort, teacher, losses=teacher.losses())((torch.ones(4, 8), torch.zeros(4).long()))
    >>> sorted(losses.values)
    ['KD', 'TaskLoss']
    """

    def __init__(
        self, rule: Rule = "min_logit", validation: Iterable[Any] | Loaders | None = None, measurements: int = 100
    ):
        super().__init__()
        if rule not in get_args(Rule):
            raise ValueError(f"KDCL: rule={rule!r}: expected one of {get_args(Rule)}")
        if (rule == "general") != (validation is not None):
            raise ValueError(f"KDCL: rule={rule!r}: expected validation data for 'general', and for no other rule")
        if measurements < 1:
            raise ValueError(f"KDCL: measurements={measurements}: expected 1 or more")
        self.rule, self.measurements = rule, measurements
        self.validation = validation.validation if isinstance(validation, Loaders) else validation
        self.weights: Tensor | None = None
        self.measured = -1

    def losses(self, temperature: float = 2.0, weight: float = 1.0) -> list[Loss]:
        """The published ones.

        Args:
            temperature: T of the KL.
            weight: λ.
        """
        return [TaskLoss(), KD(temperature=temperature, weight=weight)]

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        self._student = (student,)
        return super().bind(student, student_reads, teacher_reads)

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        peers = self.records(student)
        target = group_record(peers, None) if peers[0].output is None else self._target(peers, batch)
        return [Lesson(mine, target, key=f"{i}_from_group") for i, mine in enumerate(peers)]

    def _target(self, peers: list[Record], batch: Batch) -> Record:
        shapes = [tuple(peer.logits.shape) for peer in peers]
        if len(set(shapes)) > 1:
            raise ValueError(f"KDCL: the peers' logits are {shapes}: one target for all needs the same classes")
        said = [classes_last(peer.logits.detach()) for peer in peers]
        axis, rest = class_axis(peers[0].logits), peers[0].logits.movedim(class_axis(peers[0].logits), -1).shape

        def whole(rows: Tensor) -> Tensor:
            return rows.reshape(rest).movedim(-1, axis)

        if self.rule == "general":
            weights = self._measured(batch).to(said[0]).expand(len(said[0]), -1)
        elif batch.labels is None:
            raise ValueError(f"KDCL: rule={self.rule!r} needs labels, and the batch has none")
        elif self.rule == "min_logit":
            return group_record(peers, whole(min_logit(said, batch.labels)))
        else:
            weights = (naive_weights if self.rule == "naive" else linear_weights)(said, batch.labels)
        logits = whole(torch.einsum("nm,mnc->nc", weights, torch.stack(said)))
        # features have a weight for each sample; of dense outputs the weights are of positions
        return group_record(peers, logits, weights if logits.ndim == 2 else None)

    def _measured(self, batch: Batch) -> Tensor:
        """The weights of ``"general"`` at this point of the training."""
        due = int(batch.progress * self.measurements)
        if self.weights is None or due != self.measured:
            cohort, totals, count = self._student[0], torch.zeros(()), 0
            device = next(cohort.parameters()).device
            # a loader may draw random numbers, which must not depend on whether it is time to measure
            with evaluating(cohort), torch.random.fork_rng(list(range(torch.cuda.device_count()))):
                for raw in self.validation or ():
                    seen = read_batch(move(raw, device))
                    if seen.labels is None:
                        raise ValueError("KDCL: validation: its batches have no labels")
                    said = [classes_last(Record(output).logits) for output in seen.student.call(cohort).peers]
                    known = int(TaskLoss().units(seen))
                    totals = totals.to(device) + error_correlation(said, seen.labels) * known
                    count += known
            if not count:
                raise ValueError("KDCL: validation: there is no batch in it, or none with labels")
            self.weights, self.measured = general_weights(totals / count), due
        return self.weights

    def own_state(self) -> dict[str, Any]:
        return {"weights": self.weights, "measured": self.measured}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.weights, self.measured = state["weights"], state["measured"]


def _relative(logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits minus the true class's (M, N, C), whose log-sum-exp is the cross-entropy; and who has a label."""
    stacked = in_float32(torch.stack([z.detach() for z in logits]))
    truth, known = _one_hot(stacked, labels)
    return stacked - (stacked * truth).sum(2, keepdim=True), known


def _one_hot(stacked: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _, samples, classes = stacked.shape
    if labels.is_floating_point():
        return classes_last(labels).to(stacked), torch.ones(samples, dtype=torch.bool, device=stacked.device)
    labels = labels.reshape(-1)
    if len(labels) != samples:
        raise ValueError(f"labels: {len(labels)} for logits of {samples} samples or positions")
    known = labels != UNLABELLED
    return nn.functional.one_hot(labels * known, classes).to(stacked) * known[:, None], known
