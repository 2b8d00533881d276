from __future__ import annotations

import math

import pytest
import torch

from tutelage import SkewKL
from tutelage.functional import kd_divergence, skew_kl


def pair(*shape):
    torch.manual_seed(0)
    return 2 * torch.randn(shape, dtype=torch.float64), 2 * torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.1, 1.0), (0.5, 2.0)])
def test_it_is_the_kl_to_the_mixture_written_out(alpha, temperature, reverse):
    student, teacher = pair(4, 5)
    total = 0.0
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        e_s, e_t = ([math.exp(z / temperature) for z in row] for row in (z_s, z_t))
        for a, b in zip(e_s, e_t, strict=True):
            q, p = a / sum(e_s), b / sum(e_t)
            first, second = (q, p) if reverse else (p, q)
            total += first * math.log(first / (alpha * first + (1 - alpha) * second))
    value = skew_kl(student, teacher, None, alpha, reverse, temperature)
    assert value.item() == pytest.approx(total / 4)


def test_without_skew_it_is_the_kl_divergence_either_way():
    student, teacher = pair(6, 9)
    torch.testing.assert_close(skew_kl(student, teacher, alpha=0.0), kd_divergence(student, teacher, 1.0))
    torch.testing.assert_close(skew_kl(student, teacher, alpha=0.0, reverse=True), kd_divergence(teacher, student, 1.0))


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_bounded_by_the_log_of_one_over_alpha_with_a_bounded_gradient(reverse):
    far = torch.tensor([[500.0, -500.0, 0.0]]).requires_grad_()
    value = skew_kl(far, -far.detach(), alpha=0.1, reverse=reverse)
    assert value.item() == pytest.approx(math.log(10))
    value.backward()
    assert far.grad.abs().max() <= 1


@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradient_is_the_students_and_that_of_finite_differences(reverse):
    student, teacher = pair(3, 4)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: skew_kl(s, teacher, reverse=reverse), student.requires_grad_())
    skew_kl(student, teacher, reverse=reverse).backward()
    assert teacher.grad is None


def test_masked_tokens_do_not_count():
    student, teacher = pair(2, 3, 5)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]) > 0
    torch.testing.assert_close(skew_kl(student, teacher, mask), skew_kl(student[mask], teacher[mask]))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"alpha=1.0: expected 0 <= alpha < 1"):
        skew_kl(torch.ones(1, 2), torch.ones(1, 2), alpha=1.0)
    with pytest.raises(ValueError, match="SkewKL: temperature=0"):
        SkewKL(temperature=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_comes_nearer_to_the_teacher_than_alone(school, reverse):
    def gap(logits):
        return skew_kl(logits, school.taught(), reverse=reverse).item()

    assert gap(school.learnt(SkewKL(reverse=reverse))) < 0.7 * gap(school.alone())
