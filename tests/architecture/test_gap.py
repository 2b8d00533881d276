"""The capacity gap: probes against known answers, the order of pairs, the rules, and that nothing is touched."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn

from tutelage import Gap, capacity_gap, distill, recommend
from tutelage.architecture.probes import linear_probe, look, places, ridge_r2
from tutelage.architecture.remedies import Reached, Size
from tutelage.data import fashion_loaders
from tutelage.models import MLP, SmallCNN
from tutelage.run import random_state
from tutelage.views import Inputs


def samples(count: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=g)
    return x, x[:, :3].argmax(1)


def batches(count: int = 64, seed: int = 0):
    x, y = samples(count, seed)
    return [(a, b) for a, b in zip(x.split(32), y.split(32), strict=True)]


def test_a_probe_finds_what_is_linear_and_nothing_in_noise():
    (x, y), (unseen, truth) = samples(600), samples(400, 1)
    assert linear_probe(x, y, unseen, truth, classes=3) > 0.95
    assert linear_probe(100 * x + 7, y, 100 * unseen + 7, truth, classes=3) > 0.95
    noise = torch.randn(600, 6, generator=torch.Generator().manual_seed(2))
    assert linear_probe(noise, y, unseen.flip(1) * 0, truth, classes=3) < 0.5
    with pytest.raises(ValueError, match="0 samples"):
        linear_probe(x[:0], y[:0], unseen, truth, classes=3)


def test_ridge_regression_is_that_of_the_normal_equations():
    (x, _), (unseen, _) = samples(50), samples(30, 1)
    g = torch.Generator().manual_seed(3)
    w = torch.randn(6, 2, generator=g)
    y, truth = (a @ w + 0.5 * torch.randn(len(a), 2, generator=g) + 1 for a in (x, unseen))
    a, b = ((part - x.mean(0)) / x.std(0, correction=0) for part in (x, unseen))
    a, b = a.double(), b.double()
    found = torch.linalg.lstsq(  # penalty as 6 further rows
        torch.cat([a, (0.1 * 50) ** 0.5 * torch.eye(6, dtype=torch.double)]),
        torch.cat([(y - y.mean(0)).double(), torch.zeros(6, 2, dtype=torch.double)]),
    ).solution
    left = (truth - y.mean(0) - b @ found).square().sum()
    expected = 1 - left / (truth - y.mean(0)).square().sum()
    assert ridge_r2(x, y, unseen, truth, penalty=0.1) == pytest.approx(float(expected), rel=1e-5)
    assert ridge_r2(torch.zeros_like(x), y, torch.zeros_like(unseen), truth) <= 0  # it knows the mean alone
    assert ridge_r2(x, torch.ones(50, 2), unseen, torch.ones(30, 2)) == 0


def test_both_networks_see_the_same_samples_of_a_shuffling_loader():
    torch.manual_seed(0)
    data, net = fashion_loaders(batch_size=64, limit=200), SmallCNN(width=2)
    where = places(net, Inputs((torch.zeros(2, 1, 28, 28),)))
    mine, theirs, labels = look((net, where), (net, where), data.train, 150)
    assert len(labels) == len(mine.logits) == 150
    assert torch.equal(mine.logits, theirs.logits)
    torch.testing.assert_close(mine.logits, net.eval().linear(mine.features["linear:input"]))
    assert mine.features["stage1"].shape == (150, 2)


def test_nothing_is_touched():
    torch.manual_seed(0)
    student, teacher = (
        MLP(6, [3], 3).train(),
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train(),
    )
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in (student, teacher)]
    generator = torch.Generator().manual_seed(4)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*samples(64)), batch_size=16, shuffle=True, generator=generator
    )
    states, own, draws = random_state(), generator.get_state(), (random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    first = capacity_gap(student, teacher, data, batches(), epochs=1, temperatures=[1.0])
    assert torch.equal(random_state()["torch"], states["torch"])
    assert random.getstate() == draws[0]
    assert (np.random.get_state()[1] == draws[1]).all()  # noqa: NPY002
    assert torch.equal(generator.get_state(), own)
    for net, state in zip((student, teacher), before, strict=True):
        assert net.training
        assert all(p.requires_grad for p in net.parameters())
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert capacity_gap(student, teacher, data, batches(), epochs=1, temperatures=[1.0]) == first


def test_a_wider_student_reaches_more_of_the_teacher():
    data = fashion_loaders(batch_size=64, limit=1000)
    torch.manual_seed(0)
    teacher = SmallCNN(width=8)
    usual = {"optimizer": "adamw", "lr": 0.01, "scheduler": "onecycle", "cpu": True, "progress": False}
    distill(teacher, None, data.train, epochs=4, **usual)
    for seed in range(3):
        torch.manual_seed(seed)
        narrow, wide = (
            capacity_gap(SmallCNN(width=w), teacher, data.train, data.validation, temperatures=[1.0], epochs=2,
                         seed=seed, samples=400)
            for w in (2, 8)
        )  # fmt: skip
        assert wide.best.agreement > narrow.best.agreement + 0.1
        assert wide.best.kl < narrow.best.kl
        assert wide.embedding_r2 > narrow.embedding_r2
        assert narrow.student_size.parameters < wide.student_size.parameters == wide.teacher_size.parameters
        last = {gap is wide: [p for p in gap.probes if p.network == "student"][-1] for gap in (narrow, wide)}
        assert last[True].choices > last[False].choices
        assert narrow.rule == "larger student"


def gap(**changes) -> Gap:
    small, reached = Size(100, 1000), Reached("answers alone, T=1", 0.8, 0.85, 0.1, 1.0)
    base = Gap(1000, Reached("teacher", 0.9), Reached("labels alone", 0.8), [reached], 0.95, 0.8, 0.1, [], 0.5,
               small, small)  # fmt: skip
    return recommend(dataclasses.replace(base, **changes))


def test_the_rules():
    cool = Reached("", 0.8, 0.85, 0.1, 1.0)
    assert gap().rule == "more"
    assert gap(majority=0.95).rule == "weights"
    assert gap(taught=[dataclasses.replace(cool, accuracy=0.89)]).rule == "plain KD"
    assert gap(fit=0.5).rule == "larger student"
    assert gap(alone=Reached("", 0.85)).rule == "labels"
    hot = gap(taught=[cool, dataclasses.replace(cool, agreement=0.9, temperature=4.0)])
    assert hot.rule == "temperature"
    assert "temperature 4" in hot.recommendation
    large = gap(teacher_size=Size(10_000, 1))
    assert large.rule == "assistant"
    assert "1,000 parameters" in large.recommendation  # √(100 · 10,000)
    assert gap(confidence=0.99).rule == "softer teacher"
    assert any("10.0 points are missing" in reason for reason in large.reasons)


def test_a_mistake_is_named():
    student, teacher, data = MLP(6, [3], 3), MLP(6, [8], 3), batches()
    for arguments, expected in (
        ({"temperatures": []}, "temperatures"),
        ({"temperatures": [0.0]}, "temperatures"),
        ({"samples": 1}, "samples=1"),
    ):
        with pytest.raises(ValueError, match=expected):
            capacity_gap(student, teacher, data, data, **arguments)
    with pytest.raises(ValueError, match="3 classes and the teacher 4"):
        capacity_gap(student, MLP(6, [8], 4), data, data, epochs=1)
    with pytest.raises(TypeError, match="epoch"):
        capacity_gap(student, teacher, data, data, epoch=1)
