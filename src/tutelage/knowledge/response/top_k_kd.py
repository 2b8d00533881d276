"""KD of the teacher's k likeliest classes, with all others as one bucket: what a cache of top-k logits can teach."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.catalogue import method
from tutelage.knowledge.base import Tap
from tutelage.knowledge.response.rows import TokenResponse, compared_rows, positive
from tutelage.record import Record
from tutelage.schedule import Weight
from tutelage.views import Batch


def top_k_divergence(student: Tensor, values: Tensor, indices: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL over k + 1 buckets, mean over rows: the k classes that are given, and all others together.

    KL = Σ_{c in top k} p_c · log(p_c / q_c) + p_rest · log(p_rest / q_rest), where q = softmax(z_s / T), q_rest is the
    mass of the classes that are not among the k, and p_rest = 1 − Σ p_c. So mass that the student puts elsewhere is
    punished; renormalising both sides over the k would leave it free. By the data processing inequality it is at most
    the whole KL, and equal to it for k = C − 1 or more.

    Args:
        student: logits (N, C).
        values: log p (N, k) of the teacher at the same T.
        indices: (N, k), their classes, each once.
        temperature: T > 0.

    Returns:
        A scalar in nats · T², ≥ 0.

    Memory: about three times the student's logits.

    >>> student = torch.tensor([[1.0, 0.0, 0.0]])
    >>> log_p = torch.tensor([[2.0, 1.0, 0.0]]).log_softmax(1)
    >>> top_k_divergence(student, *log_p.topk(1))
    tensor(0.0167)
    """
    positive("temperature", temperature)
    log_q = (student / temperature).log_softmax(1)
    kept = log_q.gather(1, indices)
    parts = F.kl_div(kept, values, reduction="none", log_target=True).sum(1)
    if indices.shape[1] < student.shape[1]:
        # A sum over the others, as 1 − Σ loses all digits of a small rest
        rest_q = log_q.scatter(1, indices, -torch.inf).logsumexp(1)
        rest_p = (1 - values.exp().sum(1)).clamp(min=0)
        parts = parts + torch.special.xlogy(rest_p, rest_p) - rest_p * rest_q
    return parts.clamp(min=0).sum() / max(len(student), 1) * temperature**2


def top_k_kd(
    student: Tensor, teacher: Tensor, k: int = 10, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """:func:`top_k_divergence` from the teacher's k likeliest classes, mean over the positions that count.

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W).
        teacher: logits of the same shape; no gradient flows to them.
        k: at least 1; more than there are classes means all of them.
        temperature: T > 0.
        mask: booleans of the logits' shape without classes; positions that are False (padding) do not count. If none
            counts, the value is 0, with a gradient of 0.

    Returns:
        A scalar in nats · T², ≥ 0, and 0 for equal logits.

    Raises:
        ValueError: ``k`` or ``temperature`` out of range, or the shapes differ.

    Memory: about four times the logits that count, in float32.

    >>> student, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> [round(top_k_kd(student, teacher, k).item(), 4) for k in (1, 2, 3)]
    [0.3929, 0.4205, 0.4205]
    """
    if k < 1:
        raise ValueError(f"k={k}: expected 1 or more")
    positive("temperature", temperature)
    rows_s, rows_t = compared_rows(student, teacher, mask)
    log_p = (rows_t / temperature).log_softmax(1)
    return top_k_divergence(rows_s, *log_p.topk(min(k, log_p.shape[1]), dim=1), temperature)


@method(
    section="2.1+",
    role="losses",
    paper="Anshumann et al.: Sparse Logit Sampling (top-k with a ghost token for the rest)",
    year=2025,
    link="https://arxiv.org/abs/2503.16870",
    use="Large vocabularies of which only the teacher's k likeliest words are kept or sent.",
)
class TopKKD(TokenResponse):
    """Soft targets of the teacher's k likeliest classes, all others being one bucket.

    Of sequences (logits (B, T, C), labels (B, T)) the tokens labelled -100 (padding, prompts) do not count. The bucket
    is what the paper calls a ghost token.

    Args:
        taps: which logits, by default the models' own.
        k: of the teacher's classes.
        temperature: T of both.
        weight: 1, as the only term.
        name: of the term.

    Raises:
        ValueError: ``k`` or ``temperature`` out of range.

    Memory: about four times the logits that count. See :func:`top_k_divergence` for the formula.

    >>> TopKKD(k=5)
    TopKKD(logits, weight=1.0, k=5, temperature=1.0)
    """

    def __init__(
        self, *taps: Tap, k: int = 10, temperature: float = 1.0, weight: Weight = 1.0, name: str | None = None
    ):
        super().__init__(*taps, weight=weight, name=name)
        if k < 1:
            raise ValueError(f"{self.name}: k={k}: expected 1 or more")
        positive(f"{self.name}: temperature", temperature)
        self.k, self.temperature = k, temperature

    def forward(self, student: Record, teacher: Record, batch: Batch) -> Tensor:
        terms = [
            top_k_kd(s, t, self.k, self.temperature, self.counted(s, batch)) for s, t in self.tensors(student, teacher)
        ]
        return torch.stack(terms).mean()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}, temperature={self.temperature}"
