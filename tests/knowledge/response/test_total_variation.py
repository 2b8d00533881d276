from __future__ import annotations

import pytest
import torch

from tutelage import TotalVariation
from tutelage.functional import kd_divergence, total_variation


def test_it_is_the_largest_difference_that_any_set_of_classes_has():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    p, q = teacher.softmax(1)[0], student.softmax(1)[0]
    sets = ([c for c in range(6) if number >> c & 1] for number in range(2**6))
    torch.testing.assert_close(total_variation(student, teacher), max(p[s].sum() - q[s].sum() for s in sets))


def test_it_is_a_metric_between_0_and_1_below_pinskers_bound():
    torch.manual_seed(0)
    a, b, c = (torch.randn(1, 9) * 3 for _ in range(3))
    assert total_variation(a, a) == 0
    torch.testing.assert_close(total_variation(a, b), total_variation(b, a))
    assert total_variation(a, c) <= total_variation(a, b) + total_variation(b, c)
    assert total_variation(a, b) <= (kd_divergence(a, b, 1.0) / 2).sqrt()
    far = torch.tensor([[500.0, -500.0]])
    assert total_variation(far, -far) == 1


def test_the_gradient_is_the_students_alone_and_masked_tokens_have_none():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]) > 0
    value = total_variation(student, teacher, mask)
    torch.testing.assert_close(value, total_variation(student[mask], teacher[mask]))
    value.backward()
    assert teacher.grad is None
    assert student.grad[mask].abs().sum() > 0
    assert student.grad[~mask].abs().max() == 0


def test_a_temperature_of_nothing_is_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        total_variation(torch.ones(1, 2), torch.ones(1, 2), temperature=0)
    with pytest.raises(ValueError, match="TotalVariation: temperature=-1"):
        TotalVariation(temperature=-1)


def test_a_student_comes_nearer_to_the_teacher_than_alone(school):
    def gap(logits):
        return total_variation(logits, school.taught()).item()

    assert gap(school.learnt(TotalVariation())) < 0.8 * gap(school.alone())
