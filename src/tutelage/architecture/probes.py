"""Probes: what a linear model can read from a network's features of data that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.evaluation import evaluating
from tutelage.record import in_float32
from tutelage.taps import Observer, embedding, stages
from tutelage.views import UNLABELLED, Batch, Inputs, SameView, move


def linear_probe(
    train: Tensor, choices: Tensor, held_out: Tensor, truth: Tensor, *, classes: int, penalty: float = 1e-2
) -> float:
    """Held-out accuracy of multinomial logistic regression: argmin_W mean CE(W·x + b, y) + penalty/2 · ‖W‖².

    The features are standardised with the training part's means and deviations. The problem is convex and begins at 0,
    so the answer depends on no random number; L-BFGS, at most 30 iterations.

    Args:
        train: (N, D) features.
        choices: (N,) classes of them.
        held_out: (M, D).
        truth: (M,) classes of these.
        classes: how many there are.
        penalty: of the weights, not of the biases.

    Raises:
        ValueError: a part without samples.

    Alain, Bengio 2016, "Understanding intermediate layers using linear classifier probes",
    https://arxiv.org/abs/1610.01644

    >>> x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    >>> linear_probe(x, torch.tensor([0, 0, 1, 1]), torch.tensor([[-3.0], [0.5]]), torch.tensor([0, 1]), classes=2)
    1.0
    """
    if not len(train) or not len(held_out):
        raise ValueError(f"probe: {len(train)} samples to fit and {len(held_out)} to judge; expected both")
    x, unseen = (part.float() for part in _standardised(train, held_out))
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=30, tolerance_change=1e-5, line_search_fn="strong_wolfe")

    def cost() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), choices) + penalty / 2 * weight.square().sum()
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(cost)
    said = F.linear(unseen, weight.detach(), bias.detach()).argmax(1)
    return float((said == truth).double().mean())


def ridge_r2(train: Tensor, targets: Tensor, held_out: Tensor, truth: Tensor, *, penalty: float = 1e-3) -> float:
    """Held-out R² of ridge regression: 1 − Σ‖y − ŷ‖² / Σ‖y − ȳ‖², with ȳ the training part's mean.

    ŷ = ȳ + W·x for standardised x, and W = (XᵀX + penalty·N·1)⁻¹ Xᵀ(Y − ȳ) in closed form. 1 is a perfect prediction, 0
    is what the mean says; below 0 is worse than the mean.

    Args:
        train: (N, D) features.
        targets: (N, E).
        held_out: (M, D).
        truth: (M, E); constant truth gives 0.
        penalty: for each sample.

    Raises:
        ValueError: a part without samples.

    Memory: D² beside the features.

    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> round(ridge_r2(x[:32], x[:32] @ torch.ones(3, 2), x[32:], x[32:] @ torch.ones(3, 2), penalty=1e-9), 4)
    1.0
    """
    if not len(train) or not len(held_out):
        raise ValueError(f"regression: {len(train)} samples to fit and {len(held_out)} to judge; expected both")
    x, unseen = _standardised(train, held_out)
    y, truth = targets.double(), truth.double()
    mean = y.mean(0)
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x.T @ (y - mean))
    whole = (truth - mean).square().sum()
    left = (truth - mean - unseen @ weights).square().sum()
    return float(1 - left / whole) if float(whole) > 0 else 0.0


def _standardised(train: Tensor, held_out: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, less the mean of the first and over its deviation; a feature that does not vary becomes 0."""
    x, unseen = train.double(), held_out.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    varies = deviation > 1e-6 * mean.abs().clamp(min=1e-6)
    scale = torch.where(varies, 1 / deviation.clamp(min=1e-300), torch.zeros_like(deviation))
    return (x - mean) * scale, (unseen - mean) * scale


@dataclass
class Seen:
    """What a network has of a loader's samples.

    Args:
        features: by address, (N, D): maps and sequences averaged over their positions.
        logits: (N, C).
    """

    features: dict[str, Tensor]
    logits: Tensor


def places(model: nn.Module, inputs: Inputs) -> list[str]:
    """Where to probe a network: its stages, if it has any, and its embedding.

    >>> from tutelage.models import SmallCNN
    >>> places(SmallCNN(width=4), Inputs((torch.zeros(2, 1, 28, 28),)))
    ['stage1', 'stage2', 'stage3', 'linear:input']
    """
    try:
        found = [stage.address for stage in stages(model, inputs)]
    except ValueError:  # a perceptron has none
        found = []
    return [*found, embedding(model, inputs)]


def look(
    student: tuple[nn.Module, list[str]],
    teacher: tuple[nn.Module, list[str]],
    loader: Iterable[Any],
    samples: int,
    views: Callable[[Any], Batch] | None = None,
) -> tuple[Seen, Seen, Tensor]:
    """What student and teacher have of the same samples, the loader's first ones, in eval mode.

    Both see each batch in one pass over the loader, which may shuffle and augment.

    Args:
        student, teacher: the network, on one device, and where to read it.
        loader: of batches.
        samples: the most that are used.
        views: what each of the two sees.

    Returns:
        The student's, the teacher's, and the labels (N,), -100 where there is none.

    Raises:
        ValueError: an empty loader, or outputs that are no (B, C) logits.
    """
    views, device = views or SameView(), next(student[0].parameters()).device
    observers = [Observer(model, [*addresses, "@logits"]) for model, addresses in (student, teacher)]
    found: list[list[dict[str, Tensor]]] = [[], []]
    labels: list[Tensor] = []
    with evaluating(student[0], teacher[0]):
        for raw in loader:
            batch = views(move(raw, device))
            for observer, inputs, parts in zip(observers, (batch.student, batch.teacher), found, strict=True):
                record = observer(inputs) if parts else observer.dry_run(inputs)
                logits = record.logits
                if logits.ndim != 2:
                    raise ValueError(f"logits of shape {tuple(logits.shape)}: expected (B, C), of a classifier")
                read = {address.text: _pooled(record[address.text]).cpu() for address in observer.addresses}
                parts.append(read)
            unknown = torch.full((len(logits),), UNLABELLED)
            labels.append(unknown if batch.labels is None else batch.labels.reshape(-1).cpu())
            if sum(map(len, labels)) >= samples:
                break
    if not labels:
        raise ValueError("probe: the loader is empty")
    seen = []
    for parts in found:
        features = {address: torch.cat([part[address] for part in parts])[:samples] for address in parts[0]}
        logits = features.pop("@logits")
        seen.append(Seen(features, logits))
    return seen[0], seen[1], torch.cat(labels)[:samples]


def _pooled(features: Tensor) -> Tensor:
    features = in_float32(features)
    if features.ndim == 3:  # tokens; of maps the positions stand behind the channels
        return features.mean(1)
    return features.flatten(2).mean(2) if features.ndim > 2 else features
