"""Jacobian matching: what would change the teacher's answer, in the input, would change the student's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.connectors import match_size
from tutelage.knowledge.base import Loss, Tap
from tutelage.knowledge.rows import flat_rows, unit_rows
from tutelage.record import Record, in_float32
from tutelage.schedule import Weight
from tutelage.views import Batch, Inputs


def input_gradients(scores: Tensor, inputs: Tensor, create_graph: bool = False) -> Tensor:
    """∂(Σ_i score_i) / ∂inputs: of each sample's score with respect to its own input.

    Where samples meet inside the network (batch-norm in train mode), the gradient of the others' scores with respect to
    the input is in it too.

    Args:
        scores: (B,), one of each sample.
        inputs: (B, ...) that require gradients and that the scores were calculated from.
        create_graph: whether the result shall itself be differentiated, with respect to the network's weights.

    Returns:
        Of the inputs' shape. The graph of the scores is kept.

    Raises:
        ValueError: the scores were not calculated from these inputs with gradients.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> input_gradients((x**2).sum(1), x)
    tensor([[2., 4.],
            [6., 8.]])
    """
    if scores.requires_grad and inputs.requires_grad:
        (found,) = torch.autograd.grad(
            scores.sum(), inputs, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        if found is not None:
            return found
    raise ValueError(
        f"the scores {tuple(scores.shape)} have no gradient with respect to the inputs {tuple(inputs.shape)}: expected "
        "inputs that require gradients, a forward pass that keeps its graph, and a network that reads them"
    )


def jacobian_matching(student: Tensor, teacher: Tensor) -> Tensor:
    """‖J_s / ‖J_s‖ − J_t / ‖J_t‖‖², mean over samples: 2 − 2 cos of the two gradients' angle.

    Args:
        student: (B, ...), the gradient of one of the student's scores with respect to its inputs, made with
            ``create_graph=True``.
        teacher: the same of the teacher, of equal shape; no gradient flows to it.

    Returns:
        A scalar between 0 (proportional) and 4 (opposite). A gradient of zeros stays zero and costs 1.

    Raises:
        ValueError: the shapes differ.

    Srinivas, Fleuret 2018, "Knowledge Transfer with Jacobian Matching", https://arxiv.org/abs/1803.00443

    >>> jacobian_matching(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
    tensor(2.)
    """
    if student.shape != teacher.shape:
        raise ValueError(f"gradients differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return (unit_rows(flat_rows(student)) - unit_rows(flat_rows(teacher).detach())).square().sum(1).mean()


def matched_scores(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """One score of each sample, at the place that the teacher's maximum chooses, of both.

    Of vectors (logits) it is the value of the teacher's most probable class, of maps the attention Σ_c F_c² at the
    position where the teacher's is largest, of sequences likewise at a token. Maps meet at the smaller size.

    Args:
        student: (B, K), (B, C, H, W) or (B, N, C).
        teacher: (B, K), (B, D, H', W') or (B, N, D).

    Returns:
        Two tensors (B,), with their graphs.

    Raises:
        ValueError: different numbers of axes, of classes or of tokens, or other numbers of axes than these.

    >>> matched_scores(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 7.0, 5.0]]))
    (tensor([2.]), tensor([7.]))
    """
    if student.ndim != teacher.ndim or student.ndim not in (2, 3, 4):
        raise ValueError(
            f"tensors of shapes {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher): expected two "
            "vectors (B, K), two maps (B, C, H, W) or two sequences (B, N, C)"
        )
    student, teacher = in_float32(student), in_float32(teacher)
    if student.ndim == 4:
        student, teacher = match_size(student, teacher)
    if student.ndim > 2:
        channels = 1 if student.ndim == 4 else -1
        student, teacher = (x.square().sum(channels).flatten(1) for x in (student, teacher))
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student has {student.shape[1]} and the teacher {teacher.shape[1]} classes or tokens; "
            "the same are compared"
        )
    place = teacher.argmax(1, keepdim=True)
    return student.gather(1, place).squeeze(1), teacher.gather(1, place).squeeze(1)


@method(
    section="2.2",
    role="losses",
    paper="Srinivas, Fleuret: Knowledge Transfer with Jacobian Matching",
    year=2018,
    link="https://arxiv.org/abs/1803.00443",
    needs=("extra memory",),
    use="Few samples, or noisy inputs: how the teacher's answer would change around each sample, at about triple cost.",
)
class Jacobian(Loss):
    """Jacobian matching: the gradients of both networks' scores with respect to the input point the same way.

    The score is the logit of the teacher's most probable class, of both networks. Where a tap is a feature map, it is
    the attention Σ_c F_c² at the position where the teacher's is largest, for the same position of the student; any
    increasing function of it (its root, its mean over channels) has the same normalised gradient. Meant to stand beside
    losses that match the outputs or the attention themselves, such as ``KD`` and ``AttentionTransfer``.

    Both networks must see inputs of the same shape, of floating point; with several inputs the first such one counts.
    The student is differentiated twice, so every layer must have a second derivative: fused attention has none
    (``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` does), and a network that overwrites its input in place is
    refused by PyTorch.

    Args:
        taps: logits, or layers whose attention is matched; by default the logits. Several are summed.
        weight: 1 by default, which goes with the sum over the input's values and the mean over samples. The paper's
            own weights could not be checked, nor which of the two networks chooses the position of the attention.
        name: of the term.

    Memory: the graphs of both forward passes, and of the student's backward pass. See :func:`jacobian_matching` for the
    formula.

    >>> from tutelage import Distillation
    >>> student, teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), nn.Linear(4, 3)
    >>> losses = Distillation(student, teacher, losses=[Jacobian()])(torch.randn(5, 4))
    >>> losses.total.backward()
    >>> bool(0 < losses["Jacobian"] < 4), student[0].weight.grad.shape, teacher.weight.grad
    (True, torch.Size([8, 4]), None)
    """

    needs_input_gradients = True

    def __init__(self, *taps: Tap, weight: Weight = 1.0, name: str | None = None):
        super().__init__(*taps, weight=weight, name=name)

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        mine, theirs = self._inputs("student", batch.student), self._inputs("teacher", batch.teacher)
        if mine.shape != theirs.shape:
            raise ValueError(
                f"{self.name}: the student sees inputs {tuple(mine.shape)} and the teacher {tuple(theirs.shape)}; "
                "gradients with respect to them can be compared only if they are of the same shape"
            )
        return super().resolve(student, teacher, batch)

    def check(self, student: Record, teacher: Record, batch: Batch) -> None:
        for (mine, theirs), (s, t) in zip(self.pairs, self.tensors(student, teacher), strict=True):
            if "@logits" in (mine, theirs) and not s.ndim == t.ndim == 2:
                raise ValueError(
                    f"{self.name}: logits of shapes {tuple(s.shape)} (student) and {tuple(t.shape)} (teacher): "
                    "expected (B, K), one answer for each sample"
                )
            if not t.requires_grad:
                raise ValueError(
                    f"{self.name}: {theirs!r} of the teacher keeps no graph; expected a network of its own (Frozen), "
                    "and a layer that depends on the inputs"
                )

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        mine, theirs = self._inputs("student", batch.student), self._inputs("teacher", batch.teacher)
        losses = []
        for s, t in self.tensors(student, teacher):
            score_s, score_t = matched_scores(s, t)
            target = input_gradients(score_t, theirs)
            losses.append(jacobian_matching(input_gradients(score_s, mine, create_graph=True), target))
        return torch.stack(losses).sum()

    def _inputs(self, side: str, inputs: Inputs) -> Tensor:
        found = next((x for x in inputs.tensors() if x.is_floating_point()), None)
        if found is None:
            kinds = ", ".join(str(x.dtype) for x in inputs.tensors()) or "no tensors"
            raise ValueError(
                f"{self.name}: the inputs of the {side} are {kinds}, such as token ids, with respect to which nothing "
                "can be differentiated; expected floating point"
            )
        return found
