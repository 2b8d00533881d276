"""What a training, an evaluation, a binding and their errors leave: nothing on the networks, and nothing alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tutelage import CRD, KD, CleanToNoisy, Distillation, FitNets, LogitCritic, TaskLoss, Training, evaluate
from tutelage.data import Indexed
from tutelage.engine import fit
from tutelage.knowledge.base import Loss

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(32, 6, generator=GENERATOR)
Y = torch.arange(32) % 3


class Remembers(Loss):
    """Zero; has weak references to all that a graph would keep, and breaks in its n-th batch if asked to."""

    default_reads = "2"

    def __init__(self, breaks_at: int | None = None):
        super().__init__("2")
        self.breaks_at, self.graphs = breaks_at, []

    def forward(self, student, teacher, batch):
        ((tapped, _),) = self.tensors(student, teacher)
        value = 0 * tapped.pow(2).mean() + 0 * student.logits.sum()
        if self.training and torch.is_grad_enabled():
            self.graphs += [weakref.ref(t) for t in (tapped, student.logits, teacher.logits, value)]
            if len(self.graphs) // 4 == self.breaks_at:
                raise ArithmeticError("a bug in a loss")
        return value


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, 3))


def distillation(breaks_at: int | None = None) -> Distillation:
    """Everything that holds something: taps that are overwritten, a projector, a memory, a critic, views."""
    losses = [
        TaskLoss(),
        KD(),
        FitNets("1", weight=1.0),
        CRD("2", features=4, k=5),
        LogitCritic(hidden=8),
        Remembers(breaks_at),
    ]
    return Distillation(network(5, 0), network(9, 1), losses, views=CleanToNoisy(std=0.1))


def loader() -> DataLoader:
    return DataLoader(Indexed(TensorDataset(X, Y)), batch_size=8, shuffle=True)


def train(d: Distillation, out: Path | None = None, **options) -> None:
    settings = {"epochs": 2, "lr": 1e-4, "progress": False, "cpu": True, **options}
    fit(d, loader(), [(X, Y)], training=Training(**settings), out=out)


def marks(*networks: nn.Module) -> list:
    """Everything on the modules that calls or modes could leave: hooks, replaced methods, modes, further attributes."""
    modules = [m for n in networks for m in n.modules()]
    hooks = [sorted((k, len(v)) for k, v in vars(m).items() if "hooks" in k and hasattr(v, "__len__")) for m in modules]
    return [*hooks, *(sorted(vars(m)) for m in modules), *(vars(m).get("forward") for m in modules)]


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def alive(references: list) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def breaking(d: Distillation, out: Path) -> None:
    with pytest.raises(ArithmeticError):
        train(d, out, precision="bf16")


ENDS: dict[str, tuple[int | None, Callable[[Distillation, Path], None]]] = {
    "fit": (None, train),
    "fit in bf16": (None, lambda d, out: train(d, out, precision="bf16")),
    "an error in fit": (3, breaking),
    "bind": (None, lambda d, out: d.bind(next(iter(loader())), population=32) and None),
    "evaluate": (None, lambda d, out: evaluate(d.student, [(X, Y)], d.teacher.module) and None),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_networks_are_as_they_were(name, tmp_path):
    breaks_at, work = ENDS[name]
    d = distillation(breaks_at)
    student, teacher = d.student, d.teacher.module
    before = marks(student, teacher), vars(d).get("forward")
    work(d, tmp_path / "run")
    assert (marks(student, teacher), vars(d).get("forward")) == before


def test_a_binding_that_is_refused_leaves_nothing():
    student, teacher = network(5, 0), network(9, 1)
    before = marks(student, teacher)
    d = Distillation(student, teacher, [CRD("2", features=4, k=5)])
    with pytest.raises(ValueError, match="needs sample ids"):
        d.bind((X[:8], Y[:8]))
    d = Distillation(student, teacher, [FitNets("nowhere")])
    with pytest.raises(ValueError, match="nowhere"):
        d.bind((X[:8], Y[:8]))
    assert marks(student, teacher) == before
    assert all(m.training for m in student.modules())


@pytest.mark.parametrize("breaks_at", [None, 3])
def test_no_graph_is_alive_and_all_can_be_collected(breaks_at, tmp_path):
    d = distillation(breaks_at)
    graphs = d.terms["Remembers"].graphs
    (train if breaks_at is None else breaking)(d, tmp_path / "run")
    assert len(graphs) >= 12
    assert alive(graphs) == 0
    things = [d, d.student, d.teacher, d.teacher.module, d.terms["CRD"], next(d.student.parameters())]
    references = [weakref.ref(thing) for thing in things]
    assert alive(references) == len(things)
    del d, things
    assert alive(references) == 0


def test_in_ones_own_loop_a_step_leaves_no_graph():
    d = distillation()
    optimizer = torch.optim.SGD(d.bind(next(iter(loader())), population=32).parameters(), lr=0.01)
    graphs, counts = d.terms["Remembers"].graphs, []
    for _ in range(3):
        for batch in loader():
            losses = d(batch)
            assert any(reference() is not None for reference in graphs[-4:])
            losses.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            del losses
            assert alive(graphs) == 0
        counts.append(tensors())
    assert counts[1] == counts[2]


def test_a_second_training_leaves_as_many_tensors_as_the_first(tmp_path):
    """Of the first, torch and accelerate may keep what they make once."""
    counts = []
    for n in range(3):
        d = distillation()
        train(d, tmp_path / f"run-{n}")
        evaluate(d.student, [(X, Y)], d.teacher.module)
        del d
        counts.append(tensors())
    assert counts[1] == counts[2]
