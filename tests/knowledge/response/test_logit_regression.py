from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage import Distillation
from tutelage.catalogue import methods
from tutelage.functional import kd_divergence
from tutelage.knowledge.response.logit_regression import LogitRegression, logit_regression


def test_is_the_mean_over_samples_positions_and_classes():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 2, 4, dtype=torch.float64)
    terms = [(a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert logit_regression(student, teacher).item() == pytest.approx(sum(terms) / (3 * 5 * 2 * 4))


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5), (6, 5, 2, 2)])
def test_centring_forgets_one_constant_per_position(shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    axis = 1 if len(shape) == 4 else -1
    shift = torch.randn_like(teacher).sum(axis, keepdim=True)
    centred = logit_regression(student, teacher, centre=True)
    torch.testing.assert_close(logit_regression(student + shift, teacher, centre=True), centred)
    assert (logit_regression(student + shift, teacher) - logit_regression(student, teacher)).abs() > 0.1
    # and it is the part of the plain loss that is not the constant
    constant = (student - teacher).mean(axis).square().mean()
    torch.testing.assert_close(centred, logit_regression(student, teacher) - constant)


def test_centred_it_is_twice_kd_at_high_temperature():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 10, dtype=torch.float64)
    torch.testing.assert_close(
        logit_regression(student, teacher, centre=True),
        2 * kd_divergence(student, teacher, temperature=1e4),
        rtol=1e-3,
        atol=0,
    )


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"student \(2, 3\), teacher \(2, 4\)"):
        logit_regression(torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_student_without_labels_reaches_the_teachers_logits():
    torch.manual_seed(0)
    teacher, student = nn.Linear(6, 4), nn.Linear(6, 4)
    inputs = torch.randn(64, 6)
    d = Distillation(student, teacher, losses=[LogitRegression()]).bind(inputs)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    torch.testing.assert_close(student(inputs), teacher(inputs), atol=0.1, rtol=0)


def test_is_in_the_catalogue():
    (entry,) = [m for m in methods() if m.name == "LogitRegression"]
    assert (entry.section, entry.year, entry.defaults["weight"]) == ("2.1", 2014, 1.0)
