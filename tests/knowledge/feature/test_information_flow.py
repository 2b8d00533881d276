from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tutelage import Distillation, InformationFlow, Ramp, teacher_assistant
from tutelage.building import RecipeError
from tutelage.knowledge.feature.information_flow import (
    CriticalPeriod,
    class_information,
    information_flow,
    match_layers,
)
from tutelage.models import SmallCNN
from tutelage.recipe import load


def rebuilt(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float().double()


@pytest.mark.parametrize(
    ("mine", "theirs", "value", "norm"),
    [
        ((8, 5), (8, 12), 0.029028142206866444, 0.021798252966156766),
        ((8, 4, 3, 3), (8, 6, 3, 3), 0.0077319149335843395, 0.0029001849851830164),
    ],
)
def test_value_and_gradient_of_the_authors_code(mine, theirs, value, norm):
    student = rebuilt(10, *mine).requires_grad_()
    found = information_flow(student, rebuilt(11, *theirs))
    (gradient,) = torch.autograd.grad(found, student)
    assert found.item() == pytest.approx(value, rel=2e-4)  # the authors add 1e-6 to squared distances and norms
    assert gradient.norm().item() == pytest.approx(norm, rel=2e-4)


def test_is_the_loop_over_pairs_of_samples():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

    def probabilities(x, kernel):
        near = [[kernel(a, b) for b in x] for a in x]
        return [[v / sum(row) for v in row] for row in near]

    def cosine(a, b):
        return ((a @ b) / (a.norm() * b.norm()) + 1).item() / 2

    def student_t(a, b):
        return 1 / (1 + (a - b).norm().item())

    total = 0.0
    for kernel in (cosine, student_t):
        for ps, qs in zip(probabilities(teacher, kernel), probabilities(student, kernel), strict=True):
            total += sum((p - q) * math.log(p / q) for p, q in zip(ps, qs, strict=True)) / 16
    assert information_flow(student, teacher).item() == pytest.approx(total, rel=1e-5)


def test_forgets_rotations_and_not_lengths_and_is_symmetric():
    torch.manual_seed(0)
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert information_flow(x @ rotation, x) < 1e-12
    torch.testing.assert_close(information_flow(x @ rotation, y), information_flow(x, y))
    torch.testing.assert_close(information_flow(x, y), information_flow(y, x))
    assert information_flow(3 * x, x) > 1e-3


def test_opposite_samples_are_finite_and_have_sane_gradients():
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    value = information_flow(student, torch.ones(3, 2))
    value.backward()
    assert value.isfinite()
    assert student.grad.abs().max() < 10


def test_the_critical_period_falls_as_published_whatever_the_length():
    period = CriticalPeriod()
    for epoch in range(50):
        assert period(epoch / 50) == pytest.approx(100 * 0.7**epoch)
    assert CriticalPeriod(8.0, 0.5, epochs=4)(0.5) == 2.0
    for wrong in ({"decay": 0.0}, {"epochs": -1.0}):
        with pytest.raises(ValueError, match="expected a positive number"):
            CriticalPeriod(**wrong)


def deep(*widths: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = zip((6, *widths), widths, strict=False)
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in sizes), nn.Linear(widths[-1], 3))


X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("early", [CriticalPeriod(), Ramp(2.0, 0.0), 5.0])
def test_the_term_is_the_last_pair_and_the_weighted_sum_of_the_others(early):
    student, teacher = deep(5, 4, 7), deep(9, 8, 10, seed=1)
    d = Distillation(student, teacher, losses=[InformationFlow("0", "1", "2", early=early)]).bind(X)
    for d.progress in (0.0, 0.3, 0.9):
        with torch.no_grad():
            layers = [information_flow(student[:n](X), teacher[:n](X)) for n in (1, 2, 3)]
        factor = early(d.progress) if callable(early) else early
        torch.testing.assert_close(d(X)["InformationFlow"], layers[2] + factor * (layers[0] + layers[1]))
    alone = Distillation(student, teacher, losses=[InformationFlow("2", early=early)]).bind(X)
    torch.testing.assert_close(alone(X)["InformationFlow"], layers[2])


def test_it_reads_the_stages_and_the_last_layer_and_owns_nothing():
    inputs = torch.randn(4, 1, 16, 16)
    student = SmallCNN(4)
    loss = InformationFlow()
    d = Distillation(student, SmallCNN(8), losses=[loss]).bind(inputs)
    assert loss.pairs == [(name, name) for name in ("stage1", "stage2", "stage3", "linear:input")]
    assert loss.weight == 1
    assert not list(loss.parameters())
    d(inputs).total.backward()
    assert student.stage1[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in d.teacher.module.parameters())
    with pytest.raises(ValueError, match="at least 2 in a batch"):
        Distillation(student, SmallCNN(8), losses=[InformationFlow()]).bind(inputs[:1])
    with pytest.raises(TypeError, match="early='now'"):
        InformationFlow(early="now")
    with pytest.raises(ValueError, match="3 of the student, 4 of the teacher"):
        information_flow(torch.ones(3, 2), torch.ones(4, 2))


# which layer follows which


def test_class_information_is_the_quadratic_mutual_information_of_the_kernel():
    torch.manual_seed(0)
    x, labels = torch.randn(12, 5, dtype=torch.float64), torch.tensor([0, 2, 2, 7, 0, 0, 7, 2, 2, 0, 7, 2])
    unit = x / x.norm(dim=1, keepdim=True)
    kernel = (unit @ unit.T + 1) / 2
    inside = everything = between = 0.0
    for c in (0, 2, 7):
        mine = labels == c
        share = mine.double().mean().item()
        inside += kernel[mine][:, mine].sum().item()
        everything += share**2 * kernel.sum().item()
        between += share * kernel[mine].sum().item()
    expected = (inside + everything - 2 * between) / 12**2
    assert class_information(x, labels).item() == pytest.approx(expected)
    assert class_information(x.reshape(12, 5, 1), labels).item() == pytest.approx(expected)
    assert class_information(torch.ones(12, 5), labels) < 1e-12
    assert class_information(x, torch.zeros(12).long()) < 1e-12
    with pytest.raises(ValueError, match="one for each"):
        class_information(x, labels[:3])


def test_a_layer_follows_the_one_that_knows_as_much_and_the_last_the_last():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    signal = torch.eye(3)[labels]

    def layer(strength):
        return strength * signal + 0.3 * torch.randn(60, 3)

    teacher = [layer(strength) for strength in (0.0, 0.3, 0.6, 2.0, 5.0)]
    flow = [class_information(x, labels).item() for x in teacher]
    assert flow == sorted(flow)
    student = [layer(strength) for strength in (0.62, 0.0, 0.1)]
    assert match_layers(student, teacher, labels) == [2, 0, 4]
    assert match_layers(teacher, teacher, labels) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="0 layers of the student"):
        match_layers([], teacher, labels)


# the chain


def test_the_auxiliary_teacher_learns_by_losses_of_its_own_and_then_teaches():
    data = [(x, torch.arange(8) % 3) for x in X.split(8)]
    student, auxiliary, teacher = deep(4, 4), deep(8, 8), deep(16, 12, 16, seed=1)
    last = InformationFlow(("1", "2"))
    layers = InformationFlow("0", "1")
    first, second = teacher_assistant(
        student, [auxiliary], teacher, data, data, losses=[layers], assistant_losses=[last], epochs=2, progress=False
    )
    assert (first.teacher, second.teacher) == (teacher, auxiliary)
    assert not last.pairs
    assert [set(line["losses"]) for line in (first.history[0], second.history[0])] == [{"loss", "InformationFlow"}] * 2
    bound = InformationFlow("1")
    bound.pairs = [("1", "1")]
    with pytest.raises(ValueError, match="InformationFlow was bound"):
        teacher_assistant(deep(4), [deep(8)], teacher, data, losses=[layers], assistant_losses=[bound])


def test_the_recipes_chain_and_its_refusal():
    built = load("information_flow", ["teacher_training=null"]).keywords
    own = built["procedure"].keywords
    (auxiliary,) = own["assistants"]
    assert type(auxiliary) is type(built["student"])
    assert [loss.taps for loss in own["assistant_losses"][1:]] == [("linear:input",)]
    with pytest.raises(RecipeError, match="procedure: assistants: expected one network or more"):
        load("information_flow", ["procedure.init_args.assistants=[]"])


def test_training_brings_the_flow_of_fresh_samples_to_the_teachers():
    student, teacher = deep(8, 8, seed=3), deep(16, 16, seed=1)
    inputs, fresh = torch.randn(64, 6), torch.randn(64, 6)

    def between():
        with torch.no_grad():
            return torch.stack([information_flow(student[:n](fresh), teacher[:n](fresh)) for n in (1, 2)])

    before = between()
    d = Distillation(student, teacher, losses=[InformationFlow("0", "1")]).bind(inputs)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    for step in range(60):
        d.progress = step / 60
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    assert (between() < 0.6 * before).all()
