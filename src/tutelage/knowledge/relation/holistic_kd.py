"""Holistic knowledge: each sample's embedding together with its neighbours', by a graph encoder, in contrast."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.crd import bank_scores
from tutelage.knowledge.relation.memories import demand, gathered, other_classes, other_samples, process_count
from tutelage.knowledge.rows import flat_rows, unit_rows
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def neighbour_graph(logits: Tensor, k: int) -> Tensor:
    """(B, B) matrix of 1/k at each sample's k nearest of the batch, itself the first, and 0 elsewhere.

    Near are samples whose predicted probabilities have a large cosine; of equally near ones any may be taken. No
    gradient flows to the logits. In a batch of fewer than k samples all are neighbours.

    Args:
        logits: (B, C).
        k: how many neighbours, at least 1.

    Raises:
        ValueError: ``k`` is below 1.

    >>> neighbour_graph(torch.tensor([[9.0, 0.0], [8.0, 0.0], [0.0, 9.0]]), k=2)
    tensor([[0.5000, 0.5000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.5000]])
    """
    if k < 1:
        raise ValueError(f"k={k}: expected at least 1 neighbour")
    rows = unit_rows(flat_rows(logits.detach()).softmax(1))
    nearness = (rows @ rows.mT).fill_diagonal_(torch.inf)
    count = min(k, len(rows))
    return torch.zeros_like(nearness).scatter_(1, nearness.topk(count, dim=1).indices, 1 / max(count, 1))


class GraphEncoder(nn.Module):
    """W · [h, A h, A² h, ...] + b with rows of unit length: a topology-adaptive graph convolution.

    With the same number of neighbours for every sample the usual normalisation by their degrees is A's mean.

    Args:
        features: of a sample, before and after.
        hops: the highest power of A.

    >>> GraphEncoder(4, hops=2)(torch.ones(3, 4), torch.eye(3)).shape
    torch.Size([3, 4])
    """

    def __init__(self, features: int, hops: int = 1):
        super().__init__()
        self.hops = hops
        self.linear = nn.Linear((1 + hops) * features, features)
        nn.init.xavier_normal_(self.linear.weight, nn.init.calculate_gain("relu"))

    def forward(self, rows: Tensor, graph: Tensor) -> Tensor:
        """(B, features) of rows (B, features) and a graph (B, B)."""
        seen = [rows]
        for _ in range(self.hops):
            seen.append(graph @ seen[-1])
        return unit_rows(self.linear(torch.cat(seen, dim=1)))


def info_nce(positive: Tensor, negative: Tensor) -> Tensor:
    """−log(e^p / (e^p + Σ_k e^{n_k})), mean over samples.

    Args:
        positive: (B,) scores p of the pairs, already divided by the temperature.
        negative: (B, K) scores n of the negatives.

    Returns:
        A scalar > 0.

    >>> info_nce(torch.zeros(2), torch.zeros(2, 3))  # log 4
    tensor(1.3863)
    """
    return (torch.cat([positive.unsqueeze(1), negative], dim=1).logsumexp(1) - positive).mean()


@method(
    section="2.3",
    role="losses",
    paper="Zhou, Wang, Chen, Chen, Wang, Wang, Bu: Distilling Holistic Knowledge with Graph Neural Networks",
    year=2021,
    link="https://arxiv.org/abs/2108.05507",
    needs=("ids", "extra memory"),
    use="As CRD, with labels and batches in which most samples have some of their own class to be neighbours.",
)
class HolisticKD(Loss):
    """Individual and relational knowledge in one: embeddings, and their mixture over a graph of the batch, in contrast.

    Both models' embeddings are projected (learned) to unit vectors e. Each model's own predictions draw a graph of the
    batch (:func:`neighbour_graph`), over which a learned encoder (:class:`GraphEncoder`) turns e into g. Two memories
    hold a unit vector for every training sample: new row = unit(``momentum`` · old + (1 − ``momentum``) · e). The term
    is the sum of four :func:`info_nce`: for the student's e and g and the teacher's e and g. The positive of e is the
    other model's memory of the sample; that of g is unit(``smoothing`` · this memory + (1 − ``smoothing``) · the other
    model's g), a constant. The negatives of both are the own model's memories of ``k`` samples of other classes, as in
    the authors' code. Evaluation changes no memory.

    The code is the authority here (the text of the paper was not at hand): weights, temperatures, the two momenta, the
    graph of logits and the negatives are its. It differs in that it draws negatives without replacement, and leaves g
    out in batches that are smaller than the number of neighbours.

    Buffers, made when binding: ``memory_student`` and ``memory_teacher`` (N, features) and ``memory_labels`` (N). They
    are equal in all processes; the graph is that of one process's batch.

    Args:
        taps: the embedding, by default what the last linear layer reads. One pair. The logits are read beside it.
        features: size of the projections.
        neighbours: of each sample in the graph, itself among them.
        hops: of the encoder.
        negatives: ``"other classes"`` draws from samples of another label, which the memory learns as it sees them;
            ``"all"`` from all other samples, without labels.
        k: negatives of each sample; never more than there are other samples.
        temperature: of the scores.
        momentum: of the memories.
        smoothing: the memory's part of g's positive.
        samples: N, the size of the training set; by default what :meth:`tutelage.Distillation.bind` was told.
        weight: 3 by default, beside the task's loss of weight 1 (and KD with weight 1 in the authors' best).
        name: of the term.

    Raises:
        ValueError: an argument out of range, an unknown N, an id outside the memory.

    Memory: 2·N·features; a step as :func:`tutelage.knowledge.relation.crd.bank_scores` says for twice the batch and
    either memory, and B² for each graph.

    Zhou, Wang, Chen, Chen, Wang, Wang, Bu 2021, "Distilling Holistic Knowledge with Graph Neural Networks",
    https://arxiv.org/abs/2108.05507

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 3)) for n in (4, 16))
    >>> batch = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)
    >>> d = Distillation(student, teacher, losses=[HolisticKD(features=8)]).bind(batch, population=20)
    >>> d.losses["HolisticKD"].memory_student.shape
    torch.Size([20, 8])
    """

    default_reads = "embedding"
    needs_labels = True
    needs_ids = True
    needs_samples = 2
    memory_student: Tensor
    memory_teacher: Tensor
    memory_labels: Tensor

    def __init__(
        self,
        *taps: Tap,
        features: int = 128,
        neighbours: int = 8,
        hops: int = 1,
        negatives: Literal["other classes", "all"] = "other classes",
        k: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.9,
        smoothing: float = 0.75,
        samples: int | None = None,
        weight: Weight = 3.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        if negatives not in ("other classes", "all"):
            raise ValueError(f"{self.name}: negatives={negatives!r}: expected 'other classes' or 'all'")
        for field, number in (("features", features), ("neighbours", neighbours), ("hops", hops), ("k", k)):
            if number < 1:
                raise ValueError(f"{self.name}: {field}={number}: expected at least 1")
        if not temperature > 0:
            raise ValueError(f"{self.name}: temperature={temperature}: expected a positive number")
        for field, part in (("momentum", momentum), ("smoothing", smoothing)):
            if not 0 <= part < 1:
                raise ValueError(f"{self.name}: {field}={part}: expected a number from 0 to below 1")
        self.features, self.neighbours, self.hops, self.negatives, self.k = features, neighbours, hops, negatives, k
        self.temperature, self.momentum, self.smoothing, self.samples = temperature, momentum, smoothing, samples
        self.needs_labels = negatives == "other classes"

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        chosen = super().resolve(student, teacher, batch)
        if len(self.pairs) != 1:
            raise ValueError(f"{self.name}: reads one pair of embeddings, not {len(self.pairs)}")
        self.pairs = [*self.pairs, ("@logits", "@logits")]
        return chosen

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        s, t = (flat_rows(x) for x in self.tensors(student, teacher)[0])
        rows = self.samples or batch.population or 0
        if rows < 2:
            raise ValueError(
                f"{self.name}: the memory has a row for each training sample, whose number is unknown or below 2 "
                f"(samples={self.samples}, population={batch.population}): give HolisticKD(samples=...), or "
                "population= when binding"
            )
        self.embed_student = nn.Linear(s.shape[1], self.features).to(s)
        self.embed_teacher = nn.Linear(t.shape[1], self.features).to(t)
        self.encode_student = GraphEncoder(self.features, self.hops).to(s)
        self.encode_teacher = GraphEncoder(self.features, self.hops).to(t)
        for side, like in (("student", s), ("teacher", t)):
            memory = unit_rows(torch.randn(rows, self.features)).to(like)
            if process_count() > 1:
                dist.broadcast(memory, src=0)
            self.register_buffer(f"memory_{side}", memory)
        self.register_buffer("memory_labels", torch.full((rows,), -1, device=s.device))

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        labels = batch.labels
        if self.needs_labels and labels is not None and (labels.ndim != 1 or labels.is_floating_point()):
            raise ValueError(
                f"{self.name}: negatives='other classes' needs one class number for each sample, "
                f"not labels of shape {tuple(labels.shape)} and type {labels.dtype}"
            )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        assert batch.ids is not None, "binding has checked it"
        ids, size = batch.ids.long(), len(self.memory_student)
        demand(
            ((ids >= 0) & (ids < size)).all(),
            f"{self.name}: a sample id is not in 0..{size - 1}: ids number the samples of the training set, and "
            "samples= (or population=) is how many there are",
        )
        labels = batch.labels.long() if self.needs_labels and batch.labels is not None else torch.full_like(ids, -1)
        (s, t), logits = self.tensors(student, teacher)
        e_s, e_t = unit_rows(self.embed_student(flat_rows(s))), unit_rows(self.embed_teacher(flat_rows(t.detach())))
        graph_s, graph_t = (neighbour_graph(z, self.neighbours) for z in logits)
        g_s, g_t = self.encode_student(e_s, graph_s), self.encode_teacher(e_t, graph_t)
        candidates = self._draw(ids, labels)
        terms = [
            self._contrast(e_s, g_s, self.memory_student, self.memory_teacher[ids], g_t.detach(), candidates),
            self._contrast(e_t, g_t, self.memory_teacher, self.memory_student[ids], g_s.detach(), candidates),
        ]
        if self.training and torch.is_grad_enabled():
            self._remember(e_s.detach(), e_t.detach(), ids, labels)
        return torch.stack(terms).sum()

    def _contrast(
        self, e: Tensor, g: Tensor, own: Tensor, remembered: Tensor, other: Tensor, candidates: Tensor
    ) -> Tensor:
        """info_nce of e and of g: against the other model's memory and mixture, and the ``own`` memory's candidates."""
        mixed = unit_rows(self.smoothing * remembered + (1 - self.smoothing) * other)
        anchors = torch.cat([e, g])
        positive = (anchors * torch.cat([remembered, mixed])).sum(1) / self.temperature
        negative = bank_scores(anchors, own, candidates.repeat(2, 1), self.temperature)
        return 2 * info_nce(positive, negative)  # the mean over twice the batch is half the sum of the two

    def _draw(self, ids: Tensor, labels: Tensor) -> Tensor:
        rows = len(self.memory_student)
        count = min(self.k, rows - 1)
        if self.negatives == "all":
            return other_samples(ids, rows, count)
        return other_classes(labels, self.memory_labels.index_copy(0, ids, labels), count)

    @torch.no_grad()
    def _remember(self, s: Tensor, t: Tensor, ids: Tensor, labels: Tensor) -> None:
        """Write the batch (of all processes) into the memories."""
        if process_count() > 1:
            s, t, numbers, _ = gathered(s, t, torch.stack([ids, labels], dim=1), s.new_zeros(2))
            ids, labels = (column.contiguous() for column in numbers.unbind(1))
        # Equal ids get equal rows, the first one's, or the order of writing would decide.
        ordered, order = ids.sort(stable=True)
        first = order[torch.searchsorted(ordered, ids)]
        for memory, rows in ((self.memory_student, s), (self.memory_teacher, t)):
            memory.index_copy_(0, ids, unit_rows(self.momentum * memory[ids] + (1 - self.momentum) * rows[first]))
        self.memory_labels.index_copy_(0, ids, labels[first])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, neighbours={self.neighbours}, negatives={self.negatives!r}, k={self.k}"
