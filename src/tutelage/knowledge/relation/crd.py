"""Contrastive representation distillation: tell the teacher's embedding of this sample from those of others."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.memories import demand, gathered, other_classes, other_samples, process_count
from tutelage.knowledge.rows import flat_rows, unit_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def bank_scores(anchors: Tensor, bank: Tensor, candidates: Tensor, temperature: float = 0.07) -> Tensor:
    """v_iᵀ · m_c / τ for each anchor i and each of its candidate rows c of a memory bank.

    Args:
        anchors: (B, D) unit vectors.
        bank: (N, D) unit vectors, constants. It may be overwritten before the backward pass.
        candidates: (B, M) row numbers.
        temperature: τ > 0.

    Returns:
        (B, M).

    Memory: the smaller of B·M·D (the candidates' rows) and N·(B + D) (all products, and a copy of the bank).

    >>> bank_scores(torch.eye(2), torch.eye(2), torch.tensor([[0, 1, 1], [1, 0, 0]]), temperature=0.5)
    tensor([[2., 0., 0.],
            [2., 0., 0.]])
    """
    if _all_products(anchors, bank, candidates):
        if anchors.requires_grad and torch.is_grad_enabled():
            bank = bank.clone()  # autograd keeps it for the backward pass, and by then it may be another
        products = (anchors @ bank.T).gather(1, candidates)
    else:
        products = (bank[candidates] @ anchors.unsqueeze(2)).squeeze(2)
    return products / temperature


def _all_products(anchors: Tensor, bank: Tensor, candidates: Tensor) -> bool:
    """Whether one product with the whole bank holds fewer numbers than the rows of all candidates."""
    size, width = bank.shape
    return size * (len(anchors) + width) <= candidates.numel() * width


def log_mean_exp(positive: Tensor, negative: Tensor, keep: Tensor | None = None) -> Tensor:
    """log of the mean of exp(score) over all positives and (kept) negatives: log(Z / N) of the paper's constant Z.

    >>> log_mean_exp(torch.zeros(2), torch.zeros(2, 5))
    tensor(0.)
    """
    if keep is not None:
        negative = negative.masked_fill(~keep, -torch.inf)
    count = torch.isfinite(negative).sum() + positive.numel()
    return torch.cat([positive.reshape(-1), negative.reshape(-1)]).logsumexp(0) - count.log()


def contrastive_nce(positive: Tensor, negative: Tensor, log_mean: Tensor, keep: Tensor | None = None) -> Tensor:
    """Noise-contrastive estimation: −log h⁺ − Σ_k log(1 − h_k), mean over samples.

    h = r / (r + K) is the probability that a candidate is the sample's own rather than one of K negatives, for
    r = exp(score) / mean exp(score). With Z = N · mean exp(score), which the authors' code estimates on its first
    batch and keeps, this is their exp(score) / Z against a noise of K / N.

    Args:
        positive: (B,) scores of the pairs, already divided by the temperature.
        negative: (B, K) scores of the negatives.
        log_mean: scalar, log of the mean of exp(score); a constant (:func:`log_mean_exp`).
        keep: (B, K) booleans, which negatives count; by default all.

    Returns:
        A scalar > 0.

    Tian, Krishnan, Isola 2020, "Contrastive Representation Distillation", https://arxiv.org/abs/1910.10699

    >>> contrastive_nce(torch.zeros(1), torch.zeros(1, 1), torch.zeros(()))  # 2 · log 2
    tensor(1.3863)
    """
    if keep is None:
        log_noise = log_mean + math.log(max(1, negative.shape[1]))
        rejected = F.softplus(negative - log_noise)
    else:
        log_noise = log_mean + keep.sum(1).clamp(min=1).to(positive.dtype).log()
        rejected = F.softplus(negative - log_noise.unsqueeze(1)) * keep
    return (F.softplus(log_noise - positive) + rejected.sum(1)).mean()


def bank_nce(anchors: Tensor, bank: Tensor, candidates: Tensor, log_mean: Tensor, temperature: float = 0.07) -> Tensor:
    """:func:`contrastive_nce` of the :func:`bank_scores`, of which the first candidate is the anchor's own.

    The gradient is calculated together with the value, while the scores are at hand: σ(score − log noise) of each
    candidate, added up per row of the bank, times the bank. So nothing of the bank's size waits for the backward pass.

    Args:
        anchors: (B, D) unit vectors, to which the gradient flows (once: not twice differentiable).
        bank: (N, D) unit vectors, constants. It may be overwritten before the backward pass.
        candidates: (B, 1 + K) row numbers.
        log_mean: scalar, as in :func:`contrastive_nce`.
        temperature: τ > 0.

    Returns:
        A scalar > 0.

    Memory: as :func:`bank_scores` while it runs; B·D is kept.

    >>> bank_nce(torch.eye(2), torch.eye(2), torch.tensor([[0, 1], [1, 0]]), torch.zeros(()), temperature=1)
    tensor(1.0064)
    """
    return cast(Tensor, _BankNCE.apply(anchors, bank, candidates, log_mean, temperature))


class _BankNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, bank: Tensor, candidates: Tensor, log_mean: Tensor, temperature: float
    ) -> Tensor:
        logits = bank_scores(anchors, bank, candidates, temperature)
        logits -= log_mean + math.log(max(1, candidates.shape[1] - 1))
        logits[:, 0].neg_()  # the own one is missed as the others are accepted
        missed = softplus(logits).sum(1).mean()
        if ctx.needs_input_grad[0]:
            pull = logits.sigmoid_().div_(len(anchors) * temperature)
            pull[:, 0].neg_()
            if _all_products(anchors, bank, candidates):
                weights = pull.new_zeros(len(anchors), len(bank)).scatter_add_(1, candidates, pull)
                ctx.save_for_backward(weights @ bank)
            else:
                ctx.save_for_backward((pull.unsqueeze(1) @ bank[candidates]).squeeze(1))
        return missed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None, None


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) of constants, to rounding; on the processor in less time than torch's.

    With u = 1 + e and e = exp(−|x|), log(u)·e / (u − 1) is log(1 + e) without the loss of digits in u: log is fast
    where log1p is not.

    >>> softplus(torch.tensor([-20.0, 0.0, 20.0]))
    tensor([2.0612e-09, 6.9315e-01, 2.0000e+01])
    """
    if x.device.type != "cpu":
        return F.softplus(x)
    small = x.abs().neg_().exp_()
    above_one = small + 1
    rest = above_one.log()
    above_one -= 1
    # where u is 1, log(1 + e) is e
    rest = torch.where(above_one == 0, small, rest.mul_(small).div_(above_one))
    return rest.add_(x.clamp(min=0))


@method(
    section="2.3",
    role="losses",
    paper="Tian, Krishnan, Isola: Contrastive Representation Distillation",
    year=2020,
    link="https://arxiv.org/abs/1910.10699",
    needs=("ids", "extra memory"),
    use='Embeddings that shall carry over to other tasks, with room for a memory; memory="queue" needs no ids.',
)
class CRD(Loss):
    """Contrast: a sample's student and teacher embeddings are told from thousands of other samples', both ways.

    Both embeddings are projected (the projections are learned) and scaled to unit length. Each is compared with the
    other side's remembered embedding of its own sample and of ``k`` others. The memory follows with ``momentum``
    whenever a batch is trained on; evaluation does not change it. Among several processes every one remembers the
    samples of all.

    Buffers, made when binding: ``memory_student`` and ``memory_teacher`` (N, features), ``memory_labels`` (N),
    ``log_mean`` (2), and ``pointer`` of a queue. They are equal in all processes, so DDP need not broadcast them.

    Args:
        taps: the embedding, by default what the last linear layer reads. One pair.
        features: size of the projections.
        negatives: ``"all"`` draws from all other samples; ``"other classes"`` from those with another label, which
            the memory learns as it sees them (until then a sample's row is random, which pushes nothing away).
        memory: ``"bank"`` remembers every sample of the training set by its id. ``"queue"`` needs no ids: positives
            are the pairs of the batch, negatives the batch's others and the last ``queue`` embeddings.
        k: negatives of each sample (bank); never more than there are other samples.
        queue: the length of the queue; 0 for the batch's own negatives alone.
        temperature: τ.
        momentum: of the bank: new row = unit(momentum · old + (1 − momentum) · embedding).
        samples: N, the size of the training set; by default what :meth:`tutelage.Distillation.bind` was told.
        weight: 0.8 by default.
        name: of the term.

    Raises:
        ValueError: an argument out of range, an unknown N, an id outside the bank.

    Memory: 2·N·features for the bank; a step as :func:`bank_scores` says. With several processes a step exchanges
    the batches' embeddings, ids and labels, and waits once for their sizes.

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 3)) for n in (4, 16))
    >>> crd = CRD("1", memory="queue", queue=16)
    >>> d = Distillation(student, teacher, losses=[crd]).bind(torch.randn(5, 8))
    >>> crd.memory_student.shape
    torch.Size([16, 128])
    """

    default_reads = "embedding"
    memory_student: Tensor
    memory_teacher: Tensor
    memory_labels: Tensor
    log_mean: Tensor
    pointer: Tensor

    def __init__(
        self,
        *taps: Tap,
        features: int = 128,
        negatives: Literal["all", "other classes"] = "all",
        memory: Literal["bank", "queue"] = "bank",
        k: int = 16384,
        queue: int = 4096,
        temperature: float = 0.07,
        momentum: float = 0.5,
        samples: int | None = None,
        weight: Weight = 0.8,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        for field, value, choices in (
            ("negatives", negatives, ("all", "other classes")),
            ("memory", memory, ("bank", "queue")),
        ):
            if value not in choices:
                raise ValueError(f"{self.name}: {field}={value!r}: expected one of {choices}")
        for field, number, least in (("features", features, 1), ("k", k, 1), ("queue", queue, 0)):
            if number < least:
                raise ValueError(f"{self.name}: {field}={number}: expected at least {least}")
        if not temperature > 0:
            raise ValueError(f"{self.name}: temperature={temperature}: expected a positive number")
        if not 0 <= momentum < 1:
            raise ValueError(f"{self.name}: momentum={momentum}: expected a number from 0 to below 1")
        self.features, self.negatives, self.memory, self.k, self.queue = features, negatives, memory, k, queue
        self.temperature, self.momentum, self.samples = temperature, momentum, samples
        self.needs_ids = memory == "bank"
        self.needs_labels = negatives == "other classes"
        self.needs_samples = 2 if memory == "queue" and queue == 0 else 1

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        if len(self.pairs) != 1:
            raise ValueError(f"{self.name}: reads one pair of embeddings, not {len(self.pairs)}")
        s, t = (flat_rows(x) for x in self.tensors(student, teacher)[0])
        rows = self.queue
        if self.memory == "bank":
            rows = self.samples or batch.population or 0
            if rows < 2:
                raise ValueError(
                    f"{self.name}: the bank has a row for each training sample, whose number is unknown or below 2 "
                    f"(samples={self.samples}, population={batch.population}): give CRD(samples=...), or "
                    "population= when binding; memory='queue' needs neither"
                )
        self.embed_student = nn.Linear(s.shape[1], self.features).to(s)
        self.embed_teacher = nn.Linear(t.shape[1], self.features).to(t)
        for side, like in (("student", s), ("teacher", t)):
            memory = unit_rows(torch.randn(rows, self.features)).to(like)
            if process_count() > 1:
                dist.broadcast(memory, src=0)
            self.register_buffer(f"memory_{side}", memory)
        self._settled = False  # whether log_mean is surely known; asking the device would be waiting for it
        self.register_buffer("memory_labels", torch.full((rows,), -1, device=s.device))
        self.register_buffer("log_mean", torch.full((2,), torch.nan, dtype=s.dtype, device=s.device))
        if self.memory == "queue":
            self.register_buffer("pointer", torch.zeros((), dtype=torch.long, device=s.device))

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        labels = batch.labels
        if self.needs_labels and labels is not None and (labels.ndim != 1 or labels.is_floating_point()):
            raise ValueError(
                f"{self.name}: negatives='other classes' needs one class number for each sample, "
                f"not labels of shape {tuple(labels.shape)} and type {labels.dtype}"
            )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        s, t = (flat_rows(x) for x in self.tensors(student, teacher)[0])
        s, t = unit_rows(self.embed_student(s)), unit_rows(self.embed_teacher(t.detach()))
        unknown = torch.full((len(s),), -1, device=s.device)
        ids = batch.ids.long() if self.needs_ids and batch.ids is not None else unknown
        labels = batch.labels.long() if self.needs_labels and batch.labels is not None else unknown
        sides = ((s, self.memory_teacher), (t, self.memory_student))
        keep = None
        if self.memory == "bank":
            demand(
                ((ids >= 0) & (ids < len(self.memory_student))).all(),
                f"{self.name}: a sample id is not in 0..{len(self.memory_student) - 1}: ids number the samples of "
                "the training set, and samples= (or population=) is how many there are",
            )
            candidates = torch.cat([ids.unsqueeze(1), self._draw(ids, labels)], dim=1)
        else:
            keep = self._allowed(labels)
            parts = [
                (
                    (mine * theirs.detach()).sum(1) / self.temperature,
                    mine @ torch.cat([theirs.detach(), memory]).T / self.temperature,
                )
                for (mine, memory), theirs in zip(sides, (t, s), strict=True)
            ]
        here = self.log_mean
        if not self._settled:
            with torch.no_grad():
                if self.memory == "bank":
                    scores = [bank_scores(anchors, bank, candidates, self.temperature) for anchors, bank in sides]
                    parts = [(x[:, 0], x[:, 1:]) for x in scores]
                here = torch.stack([log_mean_exp(*part, keep) for part in parts])
        learning = self.training and torch.is_grad_enabled()
        if learning:
            everyone = self._everyone(s.detach(), t.detach(), ids, labels, here)
            here = everyone[-1]
            self.log_mean.copy_(torch.where(self.log_mean.isnan(), here, self.log_mean))
            self._settled = True
        constants = torch.where(self.log_mean.isnan(), here, self.log_mean)
        if self.memory == "bank":
            sums = [
                bank_nce(anchors, bank, candidates, constants[i], self.temperature)
                for i, (anchors, bank) in enumerate(sides)
            ]
        else:
            sums = [contrastive_nce(*part, constants[i], keep) for i, part in enumerate(parts)]
        if learning:
            self._remember(*everyone[:-1])
        return torch.stack(sums).sum()

    def _draw(self, ids: Tensor, labels: Tensor) -> Tensor:
        rows = len(self.memory_student)
        count = min(self.k, rows - 1)
        if self.negatives == "all":
            return other_samples(ids, rows, count)
        return other_classes(labels, self.memory_labels.index_copy(0, ids, labels), count)

    def _allowed(self, labels: Tensor) -> Tensor:
        """(B, B + queue): which candidates are negatives; never the sample itself."""
        own = labels.unsqueeze(1)
        others = (own != torch.cat([labels, self.memory_labels])) | (own < 0)
        return others & ~torch.eye(*others.shape, dtype=torch.bool, device=labels.device)

    def _everyone(
        self, s: Tensor, t: Tensor, ids: Tensor, labels: Tensor, log_mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same of all processes' batches."""
        if process_count() > 1:
            s, t, numbers, log_mean = gathered(s, t, torch.stack([ids, labels], dim=1), log_mean)
            ids, labels = (column.contiguous() for column in numbers.unbind(1))
        return s, t, ids, labels, log_mean

    @torch.no_grad()
    def _remember(self, s: Tensor, t: Tensor, ids: Tensor, labels: Tensor) -> None:
        """Write the batch (of all processes) into the memory."""
        if self.memory == "bank":
            # Equal ids get equal rows, the first one's, or the order of writing would decide.
            ordered, order = ids.sort(stable=True)
            first = order[torch.searchsorted(ordered, ids)]
            for memory, rows in ((self.memory_student, s), (self.memory_teacher, t)):
                moved = self.momentum * memory[ids] + (1 - self.momentum) * rows[first]
                memory.index_copy_(0, ids, unit_rows(moved))
            self.memory_labels.index_copy_(0, ids, labels[first])
        elif self.queue:
            s, t, labels = s[-self.queue :], t[-self.queue :], labels[-self.queue :]
            places = (self.pointer + torch.arange(len(s), device=s.device)) % self.queue
            self.memory_student.index_copy_(0, places, s)
            self.memory_teacher.index_copy_(0, places, t)
            self.memory_labels.index_copy_(0, places, labels)
            self.pointer.copy_((self.pointer + len(s)) % self.queue)

    def extra_repr(self) -> str:
        size = f"k={self.k}" if self.memory == "bank" else f"queue={self.queue}"
        return f"{super().extra_repr()}, negatives={self.negatives!r}, memory={self.memory!r}, {size}"
