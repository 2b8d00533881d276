"""Everybody above teaches: the lessons of several frozen networks, and the chain of them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import (
    KD,
    RKD,
    DeepMutualLearning,
    Distillation,
    FitNets,
    SeveralTeachers,
    TaskLoss,
    Training,
    densely_guided,
    procedures,
)
from tutelage.catalogue import methods
from tutelage.engine import fit
from tutelage.taps import UnknownTap


def network(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def labelled(count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return [(a, b) for a, b in zip(x.split(32), x[:, :3].argmax(1).split(32), strict=True)]


X, Y = labelled(32)[0]


def divergence(student: nn.Module, teacher: nn.Module, temperature: float) -> torch.Tensor:
    s, t = F.log_softmax(student(X) / temperature, 1), F.softmax(teacher(X) / temperature, 1)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean")


def test_the_loss_is_the_papers_equation_7_over_the_number_of_teachers():
    student, teachers, rest, temperature = network(4), [network(w, w) for w in (32, 16, 8)], 0.3, 5.0
    losses = [TaskLoss(weight=rest), KD(temperature=temperature, weight=1 - rest)]
    total = Distillation(student, SeveralTeachers(teachers), losses=losses)((X, Y)).total
    n = len(teachers) - 1  # assistants
    ce = F.cross_entropy(student(X), Y)
    paper = (n + 1) * rest * ce + (1 - rest) * sum(divergence(student, t, temperature) for t in teachers)
    torch.testing.assert_close(total, paper / (n + 1))


def test_with_fixed_drops_the_sum_of_the_authors_code_is_a_weight():
    # labels once, the divergences of those that stay summed
    student, teachers = network(4), [network(w, w) for w in (32, 16, 8)]
    d = Distillation(student, SeveralTeachers(teachers, drop=1), losses=[TaskLoss(weight=0.5), KD(weight=0.5 * 2)])
    each = [float(divergence(student, t, 4.0)) for t in teachers]
    half = 0.5 * float(F.cross_entropy(student(X), Y))
    possible = {round(half + 0.5 * (sum(each) - left_out), 5) for left_out in each}
    d.bind((X, Y))
    found = {round(float(d((X, Y)).total), 5) for _ in range(60)}
    assert len(found) == 3
    for a, b in zip(sorted(found), sorted(possible), strict=True):
        assert a == pytest.approx(b, abs=3e-5)


@pytest.mark.parametrize(("drop", "kept"), [(0, 4), (1, 3), (3, 1), (9, 1)])
def test_so_many_run_in_each_batch_and_each_is_as_likely(drop, kept):
    runs = [0, 0, 0, 0]
    teachers = [network(w, w) for w in (10, 9, 8, 7)]
    d = Distillation(network(4), SeveralTeachers(teachers, drop), losses=[KD()]).bind((X, Y))
    for i, teacher in enumerate(teachers):
        teacher.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    torch.manual_seed(0)
    for _ in range(400):
        before = sum(runs)
        d((X, Y))
        assert sum(runs) - before == kept
    assert all(abs(r - 100 * kept) < 50 for r in runs)


def test_a_seed_fixes_who_is_left_out():
    d = Distillation(network(4), SeveralTeachers([network(9, 1), network(8, 2)], 1), losses=[KD()]).bind((X, Y))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append([float(d((X, Y)).total) for _ in range(12)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_any_losses_and_what_they_own_they_own_for_each_teacher():
    student, teachers = network(4), [network(w, w) for w in (12, 9)]
    before = [copy.deepcopy(t.state_dict()) for t in teachers]
    losses = [TaskLoss(), KD(), FitNets("1"), RKD("1")]
    d = Distillation(student, SeveralTeachers(teachers), losses=losses).bind((X, Y))
    shapes = {tuple(p.shape) for n, p in d.named_parameters() if not n.startswith("student") and p.ndim > 1}
    assert shapes == {(12, 4), (9, 4)}
    d((X, Y)).total.backward()
    assert all(p.grad is not None for p in d.parameters())
    for teacher, weights in zip(teachers, before, strict=True):
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(weights[k], v) for k, v in teacher.state_dict().items())
        assert not teacher.training


def test_what_cannot_teach_is_refused():
    a, student = network(8), network(4)
    for teachers, error, said in (
        ([], ValueError, "at least one"),
        ([a, a], ValueError, "appears twice"),
        ([a, DeepMutualLearning()], TypeError, "expected an nn.Module"),
    ):
        with pytest.raises(error, match=said):
            SeveralTeachers(teachers)
    with pytest.raises(ValueError, match="drop=-1"):
        SeveralTeachers([a], drop=-1)
    other = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    with pytest.raises(UnknownTap, match="teacher 1 lacks a tap"):
        Distillation(student, SeveralTeachers([a, other]), losses=[FitNets(("1", "2")), RKD("2")]).bind((X, Y))
    with pytest.raises(ValueError, match="the student object itself"):
        Distillation(student, SeveralTeachers([a, student]), losses=[KD()]).bind((X, Y))


def test_an_interrupted_training_ends_as_it_would_have(tmp_path):
    train = labelled(128)

    def run(folder, **how):
        teacher = SeveralTeachers([network(9, 1), network(8, 2), network(7, 3)], drop=1)
        d = Distillation(network(4), teacher, losses=[KD()])
        settings = Training(epochs=3, lr=0.1, cpu=True, progress=False, checkpoint_every=1)
        return fit(d, train, None, training=settings, out=folder, **how), d.student

    class Stop(Exception):
        pass

    def stop(line):
        raise Stop

    _, whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", after_epoch=stop)
    _, parts = run(tmp_path / "parts", resume=True)
    assert torch.equal(whole[0].weight, parts[0].weight)


def test_in_the_chain_everybody_above_teaches(monkeypatch):
    calls = []

    def stand_in(student, teacher, train, validation, **arguments):
        calls.append(SimpleNamespace(student=student, teacher=teacher, **arguments))
        return SimpleNamespace(student=student)

    monkeypatch.setattr(procedures, "distill", stand_in)
    teacher, first, second, student = (network(w) for w in (8, 6, 4, 2))
    results = densely_guided(student, [first, second], teacher, [], drop=1, losses=[KD()])
    assert [r.student for r in results] == [first, second, student]
    above = [[t.module for t in call.teacher.teachers] for call in calls]
    assert above == [[teacher], [teacher, first], [teacher, first, second]]
    assert [call.teacher.drop for call in calls] == [0, 1, 1]
    assert len({id(call.losses[0]) for call in calls}) == 3
    with pytest.raises(ValueError, match="two places"):
        densely_guided(student, [teacher], teacher, [])
    with pytest.raises(ValueError, match="one network or more"):
        densely_guided(student, [], teacher, [])


def test_a_real_chain_learns_what_the_teacher_knows_without_labels():
    train, test = labelled(256), labelled(256, 1)
    teacher = network(32)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(20):
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(teacher(x), y).backward()
            optimizer.step()
    unlabelled = [x for x, _ in train]
    results = densely_guided(
        network(4, 1), [network(16, 2), network(8, 3)], teacher, unlabelled, None, test=test, losses=[KD()],
        epochs=10, lr=0.1, cpu=True, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        taught = torch.cat([teacher(x).argmax(1) == y for x, y in test]).float().mean()
    assert results[-1].metrics.accuracy > float(taught) - 0.15
    assert results[-1].metrics.accuracy > 0.7


def test_it_is_in_the_catalogue():
    entered = {m.name: (m.section, m.role, m.recipe) for m in methods()}
    assert entered["densely_guided"] == ("4+", "procedure", "densely_guided.yaml")
