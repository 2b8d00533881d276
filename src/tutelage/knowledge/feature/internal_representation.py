"""Internal representations of transformers: attention and the first token, layer after layer from the bottom."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.rows import unit_rows
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch, Inputs

Order = Literal["stacked", "progressive", "all"]
Heads = Literal["each", "mean"]


def attention_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(P_t ‖ P_s) of each query's attention, mean over heads and the sample's valid queries, then over samples.

    Args:
        student: (B, heads, T, T) probabilities: rows are queries and sum to 1 over the keys.
        teacher: the teacher's, of the same shape; no gradient flows to them.
        mask: (B, T) booleans; positions that are False (padding) count neither as queries nor as keys. A sample
            without any valid position costs 0.

    Returns:
        A scalar ≥ 0 in nats, and 0 for equal probabilities. Where the student's probability is 0 and the teacher's is
        not, the logarithm is that of the smallest normal number, and there is no gradient.

    Raises:
        ValueError: the shapes differ.

    Memory: linear in the probabilities.

    Aguilar, Ling, Zhang, Yao, Fan, Guo 2020, "Knowledge Distillation from Internal Representations",
    https://arxiv.org/abs/1910.03723

    >>> sure, unsure = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), torch.full((1, 1, 2, 2), 0.5)
    >>> attention_divergence(unsure, sure)  # log(2) / 2
    tensor(0.3466)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"attentions differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    q, p = in_float32(student), in_float32(teacher.detach())
    if mask is None:
        mask = torch.ones(len(q), q.shape[-1], dtype=torch.bool, device=q.device)
    counts = (mask.unsqueeze(1) & mask.unsqueeze(2)).unsqueeze(1)
    q, p = q.masked_fill(~counts, 1.0), p.masked_fill(~counts, 1.0)  # log 1 = 0, whatever stood there
    rows = (torch.xlogy(p, p) - p * q.clamp(min=torch.finfo(q.dtype).tiny).log()).sum(-1)
    return (rows.mean(1).sum(1) / mask.sum(1).clamp(min=1)).mean()


def first_token_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 − cos(h_s, h_t) of each sample's first token ([CLS]), mean over samples.

    Args:
        student: (B, T, D) hidden states.
        teacher: the teacher's, of the same shape; no gradient flows to them.
        mask: (B, T) booleans; the first token is the first that is True. A sample without any costs 0.

    Returns:
        A scalar from 0 to 2, and 0 for vectors of the same direction; a vector of zeros is at distance 1.

    Raises:
        ValueError: the shapes differ.

    >>> first_token_distance(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 0.0]]]))
    tensor(0.4000)
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"hidden states differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )
    if mask is None:
        mask = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
    first = torch.arange(len(mask), device=mask.device), mask.int().argmax(1)
    s, t = unit_rows(in_float32(student[first])), unit_rows(in_float32(teacher.detach()[first]))
    return (1 - (s * t).sum(1)).masked_fill(~mask.any(1), 0.0).mean()


def layers_in_turn(progress: float, layers: int, order: Order = "stacked", until: float = 1.0) -> range:
    """Which layers, counted from the bottom, are distilled at this part of the training.

    One after the other joins (``"stacked"``) or takes its turn (``"progressive"``), each after an equal part of the
    training up to ``until``; or there are ``"all"`` from the beginning. From ``until`` on there is none, if that is
    before the end.

    >>> [list(layers_in_turn(p, 2, until=0.5)) for p in (0.0, 0.25, 0.5)]
    [[0], [0, 1], []]
    >>> list(layers_in_turn(0.9, 3, "progressive"))
    [2]
    """
    if progress >= until and until < 1:
        return range(0)
    # not a layer too late for a rounding error of k / layers
    joined = layers if order == "all" else min(layers, int(progress / until * layers + 1e-9) + 1)
    return range(joined - 1 if order == "progressive" else 0, joined)


@method(
    section="2.2",
    role="losses",
    paper="Aguilar, Ling, Zhang, Yao, Fan, Guo: Knowledge Distillation from Internal Representations",
    year=2020,
    link="https://arxiv.org/abs/1910.03723",
    use="A transformer of fewer layers that shall attend as its teacher does, best in a stage before the task.",
)
class InternalRepresentation(Loss):
    """Transformer layers: KL of the attention of every head, and the cosine distance of the first token's state.

    Layers are distilled from the bottom (:func:`layers_in_turn`): ``"stacked"``, the paper's best, keeps what was
    distilled before and adds layer after layer; ``"progressive"`` has one layer at a time; ``"all"`` begins with every
    one. In the paper the next layer comes after a number of epochs or below a threshold, and the labels and soft
    labels come when the top is reached; here every layer has an equal part of the training. That is a stage with this
    term alone and a stage with ``TaskLoss`` and ``KD`` after it, or ``until`` beside them in one.

    The term is the sum, over the layers whose turn it is, of ``attention`` · :func:`attention_divergence` and
    ``hidden`` · :func:`first_token_distance`. It honours ``attention_mask`` of (B, T) among the student's inputs. The
    attention must be probabilities: in the student, attention dropout must be 0, since models return what it leaves.

    The paper's text was not at hand: that both parts weigh the same, and the mean over rows, are from memory of it.
    The paper's student and teacher have equally many heads and equal widths. Here heads that differ in number are
    refused unless they are averaged first, and where widths differ, a linear layer, made when binding, brings the
    student's first token to the teacher's width.

    Args:
        taps: two for each layer, its attention probabilities (B, heads, T, T) and its hidden states (B, T, D), from the
            bottom up. By default ``"@attentions[i]"`` and ``"@hidden_states[i + 1]"`` of every layer of the student,
            beside the teacher's last layer of the same part of its depth (2, 4, 6, ... of twice as many).
            A transformers model gives them with ``output_attentions=True, output_hidden_states=True`` and
            ``attn_implementation="eager"``.
        attention, hidden: weights of the two parts; 0 leaves one out.
        order: ``"stacked"``, ``"progressive"`` or ``"all"``.
        until: the part of the training in which layers are distilled; from then on the term is 0.
        heads: ``"each"`` with its own; ``"mean"`` averages the probabilities over heads first.
        weight: 1 by default.
        name: of the term.

    Raises:
        ValueError: an argument out of range, layers that cannot be compared, or rows of attention that do not sum to 1.

    Memory: linear in the attention probabilities, B · heads · T² for each layer.

    Aguilar, Ling, Zhang, Yao, Fan, Guo 2020, "Knowledge Distillation from Internal Representations",
    https://arxiv.org/abs/1910.03723

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallTransformer
    >>> student, teacher = SmallTransformer(8, depth=2, heads=2), SmallTransformer(16, depth=4, heads=2)
    >>> d = Distillation(student, teacher, losses=[InternalRepresentation()]).bind(torch.rand(2, 1, 28, 28))
    >>> d.losses["InternalRepresentation"].pairs[:2]
    [('@attentions[0]', '@attentions[1]'), ('@hidden_states[1]', '@hidden_states[2]')]
    """

    default_reads = "stages"

    def __init__(
        self,
        *taps: Tap,
        attention: float = 1.0,
        hidden: float = 1.0,
        order: Order = "stacked",
        until: float = 1.0,
        heads: Heads = "each",
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(*taps, weight=weight, name=name)
        if not (attention >= 0 and hidden >= 0 and attention + hidden > 0):
            raise ValueError(
                f"{self.name}: attention={attention}, hidden={hidden}: expected two weights ≥ 0, not both 0"
            )
        for field, value, choices in (("order", order, get_args(Order)), ("heads", heads, get_args(Heads))):
            if value not in choices:
                raise ValueError(f"{self.name}: {field}={value!r}: expected one of {choices}")
        if not 0 < until <= 1:
            raise ValueError(f"{self.name}: until={until}: expected a part of the training, above 0 and up to 1")
        self.attention, self.hidden, self.order, self.until, self.heads = attention, hidden, order, until, heads
        self.projectors = nn.ModuleList()

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        if self.taps:
            super().resolve(student, teacher, batch)
            if len(self.pairs) % 2:
                raise ValueError(
                    f"{self.name}: {len(self.pairs)} pairs of taps: expected two for each layer, its attention "
                    "probabilities and its hidden states"
                )
            return False
        mine = self._depth("student", student, batch.student)
        theirs = self._depth("teacher", teacher, batch.teacher)
        self.pairs = []
        for i in range(mine):
            j = -(-(i + 1) * theirs // mine) - 1  # the last of the teacher's layers up to the same part of its depth
            self.pairs.append((f"@attentions[{i}]", f"@attentions[{j}]"))
            self.pairs.append((f"@hidden_states[{i + 1}]", f"@hidden_states[{j + 1}]"))
        return True

    def _depth(self, side: str, model: nn.Module, inputs: Inputs) -> int:
        with torch.no_grad():
            output = inputs.call(model)
        found = [getattr(output, field, None) for field in ("attentions", "hidden_states")]
        lengths = [len(value) if isinstance(value, tuple | list) else 0 for value in found]
        if not lengths[0] or lengths[1] != lengths[0] + 1:
            raise ValueError(
                f"{self.name}: the output of the {side} ({type(model).__name__}) has {lengths[0]} attentions and "
                f"{lengths[1]} hidden_states; expected one of each layer, and the embedding before them. Of a "
                "transformers model they come with output_attentions=True, output_hidden_states=True and "
                "attn_implementation='eager'; else name the taps, two for each layer"
            )
        return lengths[0]

    def build(self, student: Record, teacher: Record, batch: Batch) -> None:
        self.projectors = nn.ModuleList()
        for (s, t), pair in zip(self.tensors(student, teacher)[1::2], self.pairs[1::2], strict=True):
            if s.ndim != 3 or t.ndim != 3:
                raise ValueError(
                    f"{self.name}: hidden states {tuple(s.shape)} at {pair[0]!r} (student) and {tuple(t.shape)} at "
                    f"{pair[1]!r} (teacher): expected (B, T, D)"
                )
            same = s.shape[2] == t.shape[2] or not self.hidden
            self.projectors.append(nn.Identity() if same else nn.Linear(s.shape[2], t.shape[2]).to(s))

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        mask = self._mask(batch)
        theirs = batch.teacher.kwargs.get("attention_mask")
        for (s, t), (mine, other) in zip(self.tensors(student, teacher)[::2], self.pairs[::2], strict=True):
            for side, x, address in (("student", s, mine), ("teacher", t, other)):
                where = f"{self.name}: attention at {address!r} of the {side}"
                if x.ndim != 4 or x.shape[2] != x.shape[3]:
                    raise ValueError(f"{where} is {tuple(x.shape)}: expected (B, heads, T, T)")
                if mask is not None and mask.shape != (len(x), x.shape[2]):
                    raise ValueError(
                        f"{where} is {tuple(x.shape)}, and the attention_mask {tuple(mask.shape)}: expected (B, T)"
                    )
                self._check_rows(x, mask, where)
            if s.shape[2] != t.shape[2]:
                raise ValueError(
                    f"{self.name}: the student has {s.shape[2]} tokens and the teacher {t.shape[2]}; attention needs "
                    "the same tokens"
                )
            if self.heads == "each" and s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"{self.name}: {s.shape[1]} heads of the student at {mine!r} and {t.shape[1]} of the teacher at "
                    f"{other!r}: expected as many, or heads='mean'"
                )
        if mask is not None and isinstance(theirs, Tensor) and not torch.equal(theirs.bool(), mask):
            raise ValueError(f"{self.name}: student and teacher have different attention masks; expected the same")

    def _check_rows(self, attention: Tensor, mask: Tensor | None, where: str) -> None:
        if not self.attention:
            return
        if mask is not None:
            attention = attention.masked_fill(~mask[:, None, None], 0)
        sums = attention.sum(-1).movedim(1, -1)
        wrong = sums if mask is None else sums[mask]
        if not bool(((wrong - 1).abs() < 0.01).all()):
            raise ValueError(
                f"{where} has rows that do not sum to 1 over the valid keys (from {float(wrong.min()):.3g} to "
                f"{float(wrong.max()):.3g}); expected probabilities: no logits, and attention dropout of 0 "
                "(attention_probs_dropout_prob in transformers), which changes them in training"
            )

    def _mask(self, batch: Batch) -> Tensor | None:
        mask = batch.student.kwargs.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) else None

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        mask, both = self._mask(batch), self.tensors(student, teacher)
        terms = [both[1][0][:0].sum()]  # 0, with a gradient
        for i in layers_in_turn(batch.progress, len(both) // 2, self.order, self.until):
            (p_s, p_t), (h_s, h_t) = both[2 * i : 2 * i + 2]
            if self.attention:
                if self.heads == "mean":
                    p_s, p_t = (in_float32(p).mean(1, keepdim=True) for p in (p_s, p_t))
                terms.append(self.attention * attention_divergence(p_s, p_t, mask))
            if self.hidden:
                terms.append(self.hidden * first_token_distance(self.projectors[i](h_s), h_t, mask))
        return torch.stack(terms).sum()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order!r}, until={self.until}"
