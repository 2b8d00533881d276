"""What a network with exits is worth: each exit's figures, what leaving early saves, and a network that ends early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import nearest
from tutelage.evaluation import Metrics, evaluate_together, evaluating
from tutelage.schemes.self_distillation.be_your_own_teacher import Exits, ExitsOutput
from tutelage.taps import Observer
from tutelage.views import UNLABELLED, Inputs, move, read_batch

DEEPEST, ENSEMBLE = "deepest", "ensemble"


class UntilExit(nn.Module):
    """The network up to one of its exits, as a plain module that returns that exit's logits.

    Nothing after the exit runs. It shares its weights with ``exits``, and holds the network's later layers without
    using them: an exported .onnx or .xml file does not have them, while a .pt2 file keeps their weights. To fine-tune
    it alone, or to prune it, take a copy (``copy.deepcopy``).

    Args:
        exits: the network with exits.
        exit: which one: its place in ``exits.at``, or the address there.
        passed: run the exits on the way too, as somebody does who asks each whether to go on.

    Raises:
        ValueError: there is no such exit.

    >>> from tutelage.models import SmallCNN
    >>> exits = Exits(SmallCNN(width=4), at=["stage1", "stage2"], example=(1, 28, 28))
    >>> UntilExit(exits, "stage1")(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, exits: Exits, exit: int | str, passed: bool = False):
        super().__init__()
        if exit not in (exits.at if isinstance(exit, str) else range(len(exits.at))):
            known = ", ".join(f"{i} ({address})" for i, address in enumerate(exits.at))
            raise ValueError(f"exit={exit!r}: expected one of {known}{nearest(str(exit), exits.at)}")
        last = exits.at.index(exit) if isinstance(exit, str) else exit
        used = range(0 if passed else last, last + 1)
        self.at = [exits.at[i] for i in used]
        self.model = exits.model
        self.bottlenecks = nn.ModuleList(exits.bottlenecks[i] for i in used)
        self.classifiers = nn.ModuleList(exits.classifiers[i] for i in used)
        self._observer = Observer(self.model, self.at)
        self._observer.copied = exits._observer.copied & set(self.at)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The last exit's logits."""
        # An exporter follows the modules that a pass enters and leaves, and cannot see one that stops half-way. What
        # nobody reads of a whole pass is no part of the graph that it writes.
        self._observer.partial = not torch.compiler.is_exporting()
        record = self._observer(Inputs(args, kwargs))
        dtype = next(self.classifiers.parameters()).dtype
        said = [c(b(record[a].to(dtype))) for a, b, c in zip(self.at, self.bottlenecks, self.classifiers, strict=True)]
        return said[-1]


def exit_costs(exits: Exits, example: Any) -> list[int]:
    """Multiply-accumulate operations of one sample that leaves at each exit, and last of one that goes to the end.

    A sample that leaves at an exit has run the network up to there and every exit on the way, and no more.

    Args:
        exits: the network with exits.
        example: a few inputs as the loader gives them, of which one is run.

    Returns:
        As many numbers as there are exits, the deepest among them; counted as in :func:`tutelage.deploy.measure`.
    """
    from tutelage.deploy.calling import resized
    from tutelage.deploy.footprint import macs

    inputs = read_batch(example).student
    one = resized(inputs.args or inputs.kwargs, 1)
    return [macs(UntilExit(exits, i, passed=True), one) for i in range(len(exits.at))] + [macs(exits, one)]


def evaluate_exits(
    exits: Exits, loader: Iterable[Any], *, device: torch.device | str | None = None
) -> dict[str, Metrics]:
    """The figures of each exit, by its address, of the ``"deepest"``, and of their ``"ensemble"``, in one pass.

    The ensemble's logits are the mean of all exits', the deepest among them, as in the authors' code.

    Args:
        exits: the network with exits.
        loader: batches with labels.
        device: by default the network's.

    Raises:
        ValueError: as :func:`tutelage.evaluate`.
    """
    device = device or next(exits.parameters()).device
    names = [*exits.at, DEEPEST]
    models: dict[str, nn.Module] = {name: _Said(i) for i, name in enumerate(names)}
    batches = ((said, labels) for said, labels in _answers(exits, loader, device))
    found = evaluate_together({**models, ENSEMBLE: _Said(None)}, batches, device=device)
    return {name: metrics for name, metrics in found.items() if isinstance(metrics, Metrics)}


class _Said(nn.Module):
    """One exit's logits of (B, exits, K), or the mean of all."""

    def __init__(self, exit: int | None):
        super().__init__()
        self.exit = exit

    def forward(self, said: Tensor) -> Tensor:
        return said.mean(1) if self.exit is None else said[:, self.exit]


def _answers(exits: Exits, loader: Iterable[Any], device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, exits, K) logits, the deepest exit's last, and labels."""
    for raw in loader:
        batch = read_batch(move(raw, device))
        if batch.labels is None:
            raise ValueError("exits: their figures need labels, and the batches have none")
        with evaluating(exits):
            output: ExitsOutput = batch.student.call(exits)
        yield torch.stack([*output.exits, output.logits], dim=1).float(), batch.labels


@dataclass(frozen=True)
class EarlyExit:
    """What it costs and gives to leave at the first exit that is sure enough.

    Args:
        threshold: how sure: the probability of the most likely class.
        accuracy: of the answers, each from where its sample left.
        macs: multiply-accumulate operations, mean over samples.
        shares: the part of the samples that left at each exit; the deepest last.
    """

    threshold: float
    accuracy: float
    macs: float
    shares: tuple[float, ...]


def early_exit_curve(
    exits: Exits,
    loader: Iterable[Any],
    thresholds: Sequence[float],
    *,
    device: torch.device | str | None = None,
) -> list[EarlyExit]:
    """Accuracy against operations: a sample leaves at the first exit whose top probability reaches the threshold.

    At 0 everybody leaves at the first exit, above 1 everybody goes to the end. The higher the threshold, the later a
    sample leaves, so the operations never fall along ascending thresholds; the accuracy mostly rises.

    Args:
        exits: the network with exits, ``at`` in the order of the forward pass.
        loader: batches with labels; samples labelled -100 do not count.
        thresholds: one point of the curve each.
        device: by default the network's.

    Returns:
        The points, in the order of the thresholds. Operations are :func:`exit_costs`.

    Raises:
        ValueError: a threshold that is no number, no threshold, no batch, or no label.

    Memory: two numbers for each sample and exit.

    >>> from tutelage.models import MLP
    >>> exits = Exits(MLP(8, (16, 16), 3), at=["hidden.0"], example=(8,))
    >>> data = [(torch.randn(20, 8), torch.arange(20) % 3)]
    >>> [(point.macs, point.shares) for point in early_exit_curve(exits, data, [0.0, 1.1])]
    [(432.0, (1.0, 0.0)), (736.0, (0.0, 1.0))]
    """
    if not thresholds or any(math.isnan(t) for t in thresholds):
        raise ValueError(f"thresholds={thresholds!r}: expected numbers, one or more")
    device = device or next(exits.parameters()).device
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise ValueError("early_exit_curve: the loader is empty")
    costs = torch.tensor(exit_costs(exits, move(first, device)), dtype=torch.float64)
    sure, right = [], []
    for said, labels in _answers(exits, _chained(first, batches), device):
        known = labels != UNLABELLED
        probability, answer = said[known].softmax(2).max(2)
        sure.append(probability.cpu())
        right.append((answer == labels[known, None]).cpu())
    surety, hits = torch.cat(sure), torch.cat(right)
    if not len(surety):
        raise ValueError("early_exit_curve: no sample has a label (all are -100)")
    points = []
    for threshold in thresholds:
        leaves = surety >= threshold
        leaves[:, -1] = True  # who comes to the end has to answer
        where = leaves.float().argmax(1)  # the first of them
        shares = torch.bincount(where, minlength=len(costs)).double() / len(where)
        accuracy = hits.gather(1, where[:, None]).double().mean()
        points.append(EarlyExit(float(threshold), float(accuracy), float(shares @ costs), tuple(shares.tolist())))
    return points


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
