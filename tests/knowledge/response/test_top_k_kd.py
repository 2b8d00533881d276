from __future__ import annotations

import itertools

import pytest
import torch

from tutelage import TopKKD
from tutelage.functional import kd_divergence, top_k_divergence, top_k_kd


def pair(*shape):
    torch.manual_seed(0)
    return 2 * torch.randn(shape, dtype=torch.float64), 2 * torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_the_kl_divergence_of_the_buckets(temperature):
    student, teacher = pair(4, 7)
    total = 0.0
    for z_s, z_t in zip(student, teacher, strict=True):
        q, p = (z_s / temperature).softmax(0), (z_t / temperature).softmax(0)
        top = p.argsort(descending=True)[:3].tolist()
        rest = [c for c in range(7) if c not in top]
        buckets = [(p[c], q[c]) for c in top] + [(p[rest].sum(), q[rest].sum())]
        total += sum(a * (a / b).log() for a, b in buckets)
    torch.testing.assert_close(top_k_kd(student, teacher, 3, temperature), total / 4 * temperature**2)


@pytest.mark.parametrize("k", [6, 7, 100])
def test_with_all_classes_it_is_kd(k):
    student, teacher = pair(5, 7)
    torch.testing.assert_close(top_k_kd(student, teacher, k, 2.0), kd_divergence(student, teacher, 2.0))


def test_more_classes_never_cost_less_and_never_more_than_the_whole():
    student, teacher = pair(5, 30)
    values = [top_k_kd(student, teacher, k).item() for k in range(1, 31)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[-1] == pytest.approx(kd_divergence(student, teacher, 1.0).item())


def test_mass_outside_of_the_teachers_choice_is_not_free():
    teacher = torch.tensor([[5.0, 4.0, -20.0, -20.0]])
    leaking = torch.tensor([[5.0, 4.0, 5.0, 5.0]]).requires_grad_()  # right among the first two, and half elsewhere
    value = top_k_kd(leaking, teacher, 2)
    assert value > 0.5
    value.backward()
    assert leaking.grad[0, 2:].min() > 0  # the others shall fall


def test_a_small_rest_keeps_its_digits():
    # 1 − Σ of the top k is rounding error here, the sum over the others is not
    student = torch.tensor([[40.0, 0.0, 1.0]], requires_grad=True)
    log_p, indices = torch.tensor([[0.9]]).log(), torch.tensor([[0]])
    expected = 0.9 * torch.tensor(0.9).log() + 0.1 * (torch.tensor(0.1).log() + 40 - 1.3132617)
    value = top_k_divergence(student, log_p, indices)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    value.backward()
    assert student.grad.isfinite().all()


def test_the_gradient_is_the_students_and_that_of_finite_differences():
    student, teacher = pair(3, 6)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: top_k_kd(s, teacher, 2), student.requires_grad_())
    top_k_kd(student, teacher, 2).backward()
    assert teacher.grad is None


def test_masked_tokens_do_not_count():
    student, teacher = pair(2, 3, 5)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]) > 0
    torch.testing.assert_close(top_k_kd(student, teacher, 2, mask=mask), top_k_kd(student[mask], teacher[mask], 2))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="k=0: expected 1 or more"):
        top_k_kd(torch.ones(1, 2), torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match="TopKKD: temperature=0"):
        TopKKD(temperature=0)
    with pytest.raises(ValueError, match="TopKKD: k=0"):
        TopKKD(k=0)


def test_a_student_comes_nearer_to_the_teacher_than_alone(school):
    def gap(logits):
        return kd_divergence(logits, school.taught(), 1.0).item()

    assert gap(school.learnt(TopKKD(k=2))) < 0.8 * gap(school.alone())
