"""Graphs by multi-head attention: how the samples of a batch explain each other from one layer to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tutelage.beside import SideLearner
from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.relation.pairs import at_least_two, channel_projector, consecutive
from tutelage.knowledge.relation.svd_transfer import aligned_vectors
from tutelage.knowledge.rows import unit_rows
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def attention_graph_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(tanh G_s) ‖ softmax(tanh G_t)) of each row, mean over heads and rows of attention logits G.

    The direction and the tanh are the authors' code's, which sums over heads and rows and then clips this gradient
    to the norm of the task's, so that no weight belongs to it.

    Args:
        student: (heads, B, B) logits of the student's graph.
        teacher: the teacher's, of the same shape; no gradient flows to it.

    Returns:
        A scalar ≥ 0, and 0 for equal graphs.

    Raises:
        ValueError: the shapes differ.

    Memory: heads · B².

    Lee, Song 2019, "Graph-based Knowledge Distillation by Multi-head Attention Network",
    https://arxiv.org/abs/1907.02226

    >>> graph = torch.tensor([[[9.0, -9.0], [0.0, 0.0]]])
    >>> attention_graph_divergence(graph, graph), attention_graph_divergence(graph, -graph)
    (tensor(0.), tensor(0.7616))
    """
    if student.shape != teacher.shape:
        raise ValueError(f"graphs differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    log_q = in_float32(student).tanh().log_softmax(-1)
    log_p = in_float32(teacher.detach()).tanh().log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1).mean()


class GraphHeads(nn.Module):
    """Attention from a layer's samples to the previous layer's, and the estimate of the layer that it is learned by.

    Args:
        previous: the number of features of the previous layer.
        features: of the layer.
        heads: how many graphs.

    >>> GraphHeads(4, 6, heads=2).graph(torch.ones(5, 4), torch.ones(5, 6)).shape
    torch.Size([2, 5, 5])
    """

    def __init__(self, previous: int, features: int, heads: int):
        super().__init__()
        self.heads = heads
        width = max(1, (previous + features) // 2)
        self.sender = nn.Sequential(nn.Linear(features, heads * width), nn.BatchNorm1d(heads * width))
        self.receiver = nn.Sequential(nn.Linear(previous, heads * width), nn.BatchNorm1d(heads * width))
        self.value = nn.Sequential(nn.Linear(previous, width), nn.BatchNorm1d(width), nn.ReLU())
        self.answer = nn.Linear(heads * width, features)

    def graph(self, previous: Tensor, features: Tensor) -> Tensor:
        """(heads, B, B) attention logits: which samples of the previous layer explain each sample of this one."""
        senders, receivers = (
            x.unflatten(1, (self.heads, -1)).movedim(1, 0) for x in (self.sender(features), self.receiver(previous))
        )
        return senders @ receivers.mT

    def forward(self, previous: Tensor, features: Tensor) -> Tensor:
        """The layer's features, estimated from the previous layer's of all samples; rows of unit length.

        In train mode a random part of the heads is left out for each sample.
        """
        attention = self.graph(previous, features).softmax(-1)
        if self.training:
            noise = torch.randn(*attention.shape[:2], 1, device=attention.device, dtype=attention.dtype)
            attention = attention * (noise >= noise.mean(0, keepdim=True))
        seen = (attention @ self.value(previous)).movedim(0, 1).flatten(1)
        return unit_rows(self.answer(seen))


def estimation_loss(estimate: Tensor, features: Tensor) -> Tensor:
    """1 − cos between the estimated and the real features, mean over samples.

    >>> estimation_loss(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
    tensor(1.)
    """
    return 1 - (unit_rows(estimate) * unit_rows(features)).sum(1).mean()


@method(
    section="2.3",
    role="losses",
    paper="Lee, Song: Graph-based Knowledge Distillation by Multi-head Attention Network",
    year=2019,
    link="https://arxiv.org/abs/1907.02226",
    use="Networks of the same stages and long trainings: what the teacher's stages do with a batch is learned first.",
)
class MHGD(Loss):
    """Multi-head graph distillation: attention between two layers' samples, learned on the teacher, matched by KL.

    Each sample's layer is compressed to its leading singular vector over channels
    (:func:`tutelage.knowledge.relation.svd_transfer.aligned_vectors`). From layer to layer, attention heads learn to
    tell the teacher's next vectors from its previous ones (:func:`estimation_loss`). Their attention logits are
    the graphs; the same heads, frozen, draw the student's, which shall be the teacher's
    (:func:`attention_graph_divergence`).

    The heads learn during the first part of the training, beside the student, from the teacher's detached features
    and with an optimiser of their own; meanwhile this term is 0. They are in no student and not in
    ``parameters()``. Who runs a loop of their own sets ``Distillation.progress``, or gives ``until=0``: then the heads
    learn throughout, and the student follows them from the first batch.

    Where channels differ, a 1×1 convolution (a linear layer for sequences), made when binding, brings the student's
    layer to the teacher's; the authors' networks have equal ones.

    Args:
        taps: two layers or more in the order of the forward pass; the terms are summed. By default every matched
            stage.
        heads: graphs for each step from layer to layer; 8 by default.
        until: the part of the training in which the heads learn: 40 of 140 epochs in the authors' code, which trains
            the student in the other 100 only.
        optimizer: makes the heads' optimiser from their parameters; by default SGD with ``lr``, Nesterov's momentum
            0.9 and weight decay 5e-4, as the authors'.
        lr: of the default optimiser.
        weight: 1 by default, for the mean over heads and samples; see :func:`attention_graph_divergence`.
        name: of the term.

    Memory: heads · B² for each step, and the heads.

    Lee, Song 2019, "Graph-based Knowledge Distillation by Multi-head Attention Network",
    https://arxiv.org/abs/1907.02226

    >>> from tutelage import Distillation
    >>> student, teacher = (nn.Sequential(nn.Conv2d(1, n, 3), nn.Conv2d(n, n, 3)) for n in (4, 6))
    >>> d = Distillation(student, teacher, losses=[MHGD("0", "1", heads=2)]).bind(torch.rand(5, 1, 8, 8))
    >>> list(d.side_learners())
    ['MHGD.graphs']
    """

    default_reads = "stages"
    needs_samples = 2

    def __init__(
        self,
        *taps: Tap,
        heads: int = 8,
        until: float = 40 / 140,
        optimizer: MakeOptimizer | None = None,
        lr: float = 0.1,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        if heads < 1:
            raise ValueError(f"{self.name}: heads={heads}: expected at least 1")
        if not 0 <= until < 1:
            raise ValueError(f"{self.name}: until={until}: expected a part of the training, from 0 to below 1")
        self.heads, self.until = heads, until
        self.optimizer = optimizer or partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.projectors = nn.ModuleList()
        self.graphs: SideLearner | None = None

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        at_least_two(self.name, self.pairs)
        both = self.tensors(student, teacher)
        self.projectors = nn.ModuleList(channel_projector(s, t) for s, t in both)
        vectors = [theirs for _, theirs in self._vectors(student, teacher)]
        heads = nn.ModuleList(GraphHeads(a.shape[1], b.shape[1], self.heads) for a, b in consecutive(vectors))
        self.graphs = SideLearner(heads.to(vectors[0]), self.optimizer)

    def _vectors(self, student: Record, teacher: Record) -> list[tuple[Tensor, Tensor]]:
        both = zip(self.projectors, self.tensors(student, teacher), strict=True)
        aligned = [aligned_vectors(project(s), t) for project, (s, t) in both]
        return [(s.squeeze(2), t.squeeze(2)) for s, t in aligned]

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        assert self.graphs is not None, "bind first"
        vectors = self._vectors(student, teacher)
        mine, theirs = consecutive([s for s, _ in vectors]), consecutive([t for _, t in vectors])
        heads = self.graphs.module
        assert isinstance(heads, nn.ModuleList)
        estimating = batch.progress < self.until or self.until == 0
        if self.training and torch.is_grad_enabled() and estimating and len(batch) > 1:
            estimates = [estimation_loss(head(a, b), b) for head, (a, b) in zip(heads, theirs, strict=True)]
            self.graphs.update(torch.stack(estimates).sum())
        if batch.progress < self.until:
            return torch.stack([s.sum() for s, _ in vectors]).sum() * 0.0
        was_training = heads.training
        heads.eval()  # the running statistics of the teacher's features, for both
        try:
            graphs = [self._graphs(head, *pairs) for head, *pairs in zip(heads, mine, theirs, strict=True)]
        finally:
            heads.train(was_training)
        return torch.stack([attention_graph_divergence(s, t) for s, t in graphs]).sum()

    @staticmethod
    def _graphs(head: nn.Module, mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # With copies of its weights the head gets no gradient, and a later update cannot spoil this graph.
        frozen = {n: v.detach().clone() for n, v in (*head.named_parameters(), *head.named_buffers())}
        with torch.no_grad():
            teacher = functional_call(_Graph(head), {f"head.{n}": v for n, v in frozen.items()}, theirs)
        return functional_call(_Graph(head), {f"head.{n}": v for n, v in frozen.items()}, mine), teacher

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}, until={self.until:.3g}"


class _Graph(nn.Module):
    """A head whose call is its graph and not its estimate."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, previous: Tensor, features: Tensor) -> Tensor:
        assert isinstance(self.head, GraphHeads)
        return self.head.graph(previous, features)
