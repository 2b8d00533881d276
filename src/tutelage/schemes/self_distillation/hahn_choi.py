"""Self-knowledge distillation: a language model's own embeddings say which words are near the true one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.errors import nearest
from tutelage.knowledge.classifiers import last_linear
from tutelage.knowledge.response.rows import LabelsAlone, positive, target_rows
from tutelage.record import Record, in_float32
from tutelage.schedule import StartAt, Weight, weight_at
from tutelage.views import Batch, Inputs


def word_closeness(embeddings: Tensor, words: Tensor, temperature: float = 0.4) -> Tensor:
    """q ∝ exp(−‖e_w − e_t‖ / (τ · λ)) over some words w, the first of which is the true one, t.

    λ is the root mean square distance between two words of the vocabulary, so q does not depend on the scale of the
    embeddings. No other word has more than t has.

    Args:
        embeddings: e (V, D), a row for each word; no gradient flows to it.
        words: (N, K) their numbers, the true ones in the first column.
        temperature: τ. Towards 0 q becomes the true word alone, for a large τ all K words alike.

    Returns:
        (N, K), rows that sum to 1.

    Memory: N·K·D.

    >>> line = torch.tensor([[0.0], [1.0], [3.0]])
    >>> word_closeness(line, torch.tensor([[0, 1, 2]]), temperature=0.5)
    tensor([[0.6857, 0.2717, 0.0426]])
    """
    e = in_float32(embeddings.detach())
    spread = (e - e.mean(0)).square().sum() * 2 / max(len(e) - 1, 1)  # Σ_i Σ_j ‖e_i − e_j‖² / (V·(V − 1))
    distance = (e[words] - e[words[:, :1]]).norm(dim=2)
    return (-distance / (temperature * spread.sqrt().clamp(min=torch.finfo(e.dtype).tiny))).softmax(1)


def hahn_choi(
    student: Tensor,
    target: Tensor,
    embeddings: Tensor,
    alpha: float = 0.5,
    words: int = 10,
    temperature: float = 0.4,
) -> Tensor:
    """−Σ_w y_w log softmax(z_s)_w, y = (1 − α) · one-hot + α · q, the mean over the positions that have a label.

    q is :func:`word_closeness` over the true word and the ``words`` others that the model itself finds likeliest. With
    all others and τ → ∞ it is label smoothing with ε = α.

    Args:
        student: logits (B, V) or (B, T, V).
        target: the true words (B) or (B, T); positions labelled -100 do not count. If none counts, the value is 0, with
            a gradient of 0.
        embeddings: (V, D), a row for each word; no gradient flows to it.
        alpha: how much of the target is q, from 0 to 1.
        words: how many others are looked at; more than there are is all.
        temperature: τ of :func:`word_closeness`.

    Returns:
        A scalar in nats, at least the entropy of y.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.

    Memory: linear in the logits, and N·(1 + ``words``)·D for N labelled positions.

    Hahn, Choi 2019, "Self-Knowledge Distillation in Natural Language Processing", https://arxiv.org/abs/1908.01851

    >>> logits, embeddings = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0], [0.0], [9.0]])
    >>> hahn_choi(logits, torch.tensor([0]), embeddings, alpha=0.5, words=1)  # y = 0.75, 0.25, 0
    tensor(0.6576)
    """
    _check(alpha, words, temperature)
    rows, labels = target_rows(student, target)
    if embeddings.ndim != 2 or len(embeddings) != rows.shape[1]:
        raise ValueError(
            f"embeddings of shape {tuple(embeddings.shape)}: expected a row for each of the {rows.shape[1]} words"
        )
    with torch.no_grad():
        true = labels[:, None]
        others = rows.scatter(1, true, float("-inf")).topk(min(words, rows.shape[1] - 1), dim=1).indices
        looked_at = torch.cat([true, others], dim=1)
        q = word_closeness(embeddings, looked_at, temperature).to(rows)
    said = F.log_softmax(rows, dim=1).gather(1, looked_at)
    return -((1 - alpha) * said[:, 0] + alpha * (q * said).sum(1)).sum() / max(len(rows), 1)


def _check(alpha: float, words: int, temperature: float, name: str = "") -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{name}alpha={alpha}: expected a number from 0 to 1")
    if words < 1:
        raise ValueError(f"{name}words={words}: expected 1 or more")
    positive(f"{name}temperature", temperature)


def embedding_layer(model: nn.Module, inputs: Inputs, address: str = "output") -> nn.Module:
    """The layer whose weight has a row for each word.

    Args:
        model: any.
        inputs: a few samples.
        address: ``"output"``, what transformers' models give as ``get_output_embeddings()``, otherwise the last linear
            layer; ``"input"``, their ``get_input_embeddings()``, otherwise the first ``nn.Embedding``; or the name of a
            module.

    Raises:
        ValueError: there is no such layer, or it has no matrix of real numbers as ``weight``.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    >>> embedding_layer(model, Inputs((torch.tensor([[1, 2]]),)), "input")
    Embedding(9, 4)
    """
    modules = dict(model.named_modules())
    layer: nn.Module | None = None
    if address in modules:
        layer = modules[address]
    elif address in ("input", "output"):
        given = getattr(model, f"get_{address}_embeddings", None)
        layer = given() if callable(given) else None
        if layer is None and address == "output":
            layer = last_linear(model, inputs)[1]
        elif layer is None:
            layer = next((m for m in modules.values() if isinstance(m, nn.Embedding)), None)
    if layer is None:
        what = f"no module of this name{nearest(address, modules)}" if address != "input" else "no nn.Embedding"
        raise ValueError(f"embedding={address!r}: {type(model).__name__} has {what}")
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"embedding={address!r}: expected a layer with a matrix of words, got {type(layer).__name__}")
    return layer


@method(
    section="3.3",
    role="losses",
    paper="Hahn, Choi: Self-Knowledge Distillation in Natural Language Processing",
    year=2019,
    link="https://arxiv.org/abs/1908.01851",
    use="A language or translation model without a teacher: words near the true one are less wrong than others.",
)
class HahnChoi(LabelsAlone):
    """Self-knowledge distillation: soft targets from the distances between the model's own word embeddings.

    It replaces ``TaskLoss``. At first it is cross-entropy, for embeddings that have not learned anything say nothing;
    from then on a part α of the target is spread over the true word and others near it in the space of the embeddings
    right below the softmax, which are read as they are in each step. Of the whole vocabulary only the words that the
    model finds likeliest are looked at, so that no matrix of words by words is needed.

    Of the paper the abstract could be read, and no code of its authors was found: that soft targets come from the
    embeddings below the softmax of the model that trains, and are approximated, is theirs. Not checked, and chosen
    here, are how a distance becomes a probability (:func:`tutelage.functional.word_closeness`), which words are looked
    at, the beginning with cross-entropy alone, and the values of ``alpha``, ``words`` and ``temperature``.

    Small models of :func:`tutelage.data.pydoc_loaders` put more of what they give to wrong words on near ones with it,
    and are better calibrated where a long training makes them too sure. Their perplexity is no better than with
    cross-entropy, and label smoothing's is.

    It is for one network: of a cohort it would read the first peer's embeddings for all.

    Args:
        embedding: whose rows are the words: the ``"output"`` layer, the ``"input"`` layer (the same matrix if they are
            tied), or a module's name (:func:`embedding_layer`).
        alpha: the part of the target that is soft: a number, or a schedule; by default 0.3 after the first fifth of the
            training.
        words: how many words beside the true one are looked at, the model's likeliest.
        temperature: τ of distances in units of the vocabulary's own spread.
        weight: 1, as the only term.
        name: of the term.

    Raises:
        ValueError: an argument out of range; when binding, there is no such layer, or its vocabulary is another one.

    See :func:`tutelage.functional.hahn_choi` for the formula and memory.

    >>> from tutelage import Distillation
    >>> from tutelage.models import SmallLSTM
    >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[2, 3, -100]])}
    >>> d = Distillation(SmallLSTM(vocabulary=9, width=4), losses=[HahnChoi(alpha=0.5)]).bind(batch)
    >>> d(batch).total.backward()
    """

    def __init__(
        self,
        embedding: str = "output",
        *,
        alpha: Weight = StartAt(0.3, at=0.2),  # noqa: B008  (it is frozen)
        words: int = 10,
        temperature: float = 0.4,
        weight: Weight = 1.0,
        name: str | None = None,
    ):
        super().__init__(weight=weight, name=name)
        _check(weight_at(alpha, 1.0), words, temperature, f"{self.name}: ")
        self.embedding, self.alpha, self.words, self.temperature = embedding, alpha, words, temperature
        self._layer: tuple[nn.Module, ...] = ()  # in a tuple, so that the student's layer is no part of the loss

    def resolve(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> bool:
        try:
            self._layer = (embedding_layer(student, batch.student, self.embedding),)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return super().resolve(student, teacher, batch)

    def check(self, student: Record, teacher: Record | None, batch: Batch) -> None:
        super().check(student, teacher, batch)
        rows, classes = len(self._layer[0].weight), student.logits.shape[-1]  # type: ignore[arg-type]
        if rows != classes:
            raise ValueError(
                f"{self.name}: embedding={self.embedding!r} has {rows} words and the logits have {classes}: name the "
                "layer that has the vocabulary which is predicted"
            )

    def forward(self, student: Record, teacher: Record | None, batch: Batch) -> Tensor:
        assert batch.labels is not None, "binding has checked it"
        weight = self._layer[0].weight
        assert isinstance(weight, Tensor), "binding has checked it"
        alpha = weight_at(self.alpha, batch.progress)
        return hahn_choi(student.logits, batch.labels, weight, alpha, self.words, self.temperature)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, embedding={self.embedding!r}, alpha={self.alpha}, words={self.words}, "
            f"temperature={self.temperature}"
        )
