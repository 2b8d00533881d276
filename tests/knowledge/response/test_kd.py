from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tutelage import KD, Distillation
from tutelage.functional import kd_divergence
from tutelage.record import Record
from tutelage.views import read_batch


def test_reference_value(agrees):
    agrees("kd_T4", lambda s, t: kd_divergence(s, t, temperature=4.0))


def test_is_the_sum_written_out():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    temperature, total = 3.0, 0.0
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        e_s, e_t = ([math.exp(z / temperature) for z in row] for row in (z_s, z_t))
        for a, b in zip(e_s, e_t, strict=True):
            q, p = a / sum(e_s), b / sum(e_t)
            total += p * math.log(p / q)
    assert kd_divergence(student, teacher, temperature).item() == pytest.approx(temperature**2 * total / 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_is_zero_for_equal_and_positive_for_different_logits(temperature):
    torch.manual_seed(0)
    logits = torch.randn(5, 10, dtype=torch.float64)
    assert kd_divergence(logits, logits.clone(), temperature).item() == pytest.approx(0, abs=1e-14)
    assert kd_divergence(logits + 3, logits, temperature).item() == pytest.approx(0, abs=1e-13)
    assert kd_divergence(logits, logits.flip(0), temperature) > 1e-3


def test_the_gradient_is_nearly_independent_of_a_large_temperature():
    torch.manual_seed(0)
    student = torch.randn(32, 10, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(32, 10, dtype=torch.float64)
    norms = []
    for temperature in (20.0, 40.0, 80.0):
        (gradient,) = torch.autograd.grad(kd_divergence(student, teacher, temperature), student)
        norms.append(gradient.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert norms[2] == pytest.approx(norms[1], rel=0.05)


def test_tends_to_half_the_centred_squared_difference_at_high_temperature():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 10, dtype=torch.float64)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = difference.square().sum(1).mean() / (2 * 10)
    torch.testing.assert_close(kd_divergence(student, teacher, 1e4), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_opposite_logits_of_500_are_finite(dtype):
    student = torch.tensor([[500.0, -500.0, 0.0]], dtype=dtype, requires_grad=True)
    value = kd_divergence(student, -student.detach(), temperature=1.0)
    value.backward()
    assert value.item() == pytest.approx(1000.0)
    assert student.grad.isfinite().all()


def test_dense_and_sequence_logits_are_the_mean_over_their_positions():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 3, 4)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    torch.testing.assert_close(kd_divergence(student, teacher), kd_divergence(*rows))
    student, teacher = torch.randn(2, 3, 7, 5)
    one_by_one = torch.stack([kd_divergence(student[:, i], teacher[:, i]) for i in range(7)])
    torch.testing.assert_close(kd_divergence(student, teacher), one_by_one.mean())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        kd_divergence(torch.ones(1, 2), torch.ones(1, 2), temperature=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        KD(temperature=-1)
    with pytest.raises(ValueError, match=r"student \(1, 2\), teacher \(1, 3\)"):
        kd_divergence(torch.ones(1, 2), torch.ones(1, 3))


def test_a_student_trained_on_soft_targets_agrees_with_its_teacher():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    student = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5))
    inputs = torch.randn(256, 8)
    before = copy.deepcopy(teacher.state_dict())
    d = Distillation(student, teacher, losses=[KD(temperature=4, weight=1.0)]).bind(inputs)
    agreement = (student(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean()
    first = d(inputs)["KD"]
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    assert d(inputs)["KD"] < 0.1 * first
    assert (student(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean() > max(0.85, agreement)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_padded_tokens_of_a_sequence_change_neither_loss_nor_gradient():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7)
    labels = torch.randint(7, (3, 5))
    labels[0, 3:] = labels[2, :] = -100
    batch = read_batch((torch.zeros(3, 5), labels))
    kd = KD(temperature=2.0)
    kd.pairs = [("@logits", "@logits")]
    value = kd(Record(student), Record(teacher), batch)
    valid = labels != -100
    expected = kd_divergence(student[valid], teacher[valid], temperature=2.0)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient[~valid].abs().max() == 0
    assert gradient[valid].abs().min() > 0
    assert int(kd.units(batch)) == 8


def test_a_batch_of_padding_alone_costs_nothing_and_has_a_gradient():
    student = torch.randn(2, 4, 3, requires_grad=True)
    value = kd_divergence(student, torch.randn(2, 4, 3), mask=torch.zeros(2, 4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value, student)
    assert value == 0
    assert gradient.abs().max() == 0


def test_unlabelled_samples_are_taught_all_the_same():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    kd = KD()
    kd.pairs = [("@logits", "@logits")]
    batch = read_batch((torch.zeros(4, 2), torch.tensor([0, -100, -100, 2])))
    torch.testing.assert_close(kd(Record(student), Record(teacher), batch), kd_divergence(student, teacher))
    assert kd.units(batch) == 4
