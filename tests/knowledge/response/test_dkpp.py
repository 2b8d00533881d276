"""Soft targets of which all but the first choice's are given to random classes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tutelage import DKPP, Record
from tutelage.functional import kd_divergence, permuted_kd, permuted_prediction
from tutelage.views import UNLABELLED, read_batch


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_first_choice_stays_and_the_others_are_all_there():
    rows = logits(200, 7)
    permuted = permuted_prediction(rows)
    assert torch.equal(permuted.argmax(1), rows.argmax(1))
    assert torch.equal(permuted.amax(1), rows.amax(1))
    assert torch.equal(permuted.sort(1).values, rows.sort(1).values)
    assert (permuted != rows).any(1).float().mean() > 0.9


def test_every_order_of_the_others_is_as_likely():
    torch.manual_seed(0)
    permuted = permuted_prediction(torch.tensor([[1.0, 9.0, 2.0, 3.0]]).expand(6000, 4))
    orders, counts = permuted.unique(dim=0, return_counts=True)
    assert len(orders) == 6
    # the counts are about 1000 ± 29
    assert bool(((counts - 1000).abs() < 150).all())


def test_equal_logits_and_two_classes():
    equal = torch.zeros(3, 4)
    assert torch.equal(permuted_prediction(equal), equal)
    two = logits(5, 2)
    assert torch.equal(permuted_prediction(two), two)  # the other class has no other place
    assert torch.equal(permuted_prediction(logits(3, 1)), logits(3, 1))


def test_the_mean_target_keeps_the_first_choice_and_evens_the_others_out():
    # over many draws the expected gradient is q − (max p at the first choice, (1 − max p) / (C − 1) elsewhere)
    torch.manual_seed(1)
    student, teacher = logits(1, 5).requires_grad_(), logits(1, 5, seed=1)
    many = 20000
    permuted_kd(student.expand(many, 5), teacher.expand(many, 5)).backward()
    p, q = F.softmax(teacher, 1), F.softmax(student.detach(), 1)
    expected = torch.full_like(p, float(1 - p.max()) / 4).scatter(1, p.argmax(1, keepdim=True), float(p.max()))
    torch.testing.assert_close(student.grad, q - expected, atol=3e-3, rtol=0)


def test_a_seed_fixes_the_permutations_and_the_term_is_soft_targets_of_them():
    batch = read_batch((torch.zeros(6, 1), torch.arange(6) % 5))
    student, teacher = Record(logits(6, 5)), Record(logits(6, 5, seed=1))
    term = DKPP(temperature=2.0)
    term.pairs = [("@logits", "@logits")]
    torch.manual_seed(3)
    value, another = term(student, teacher, batch), term(student, teacher, batch)
    torch.manual_seed(3)
    target = permuted_prediction(teacher.logits)
    torch.testing.assert_close(value, kd_divergence(student.logits, target, 2.0))
    assert value != another
    with pytest.raises(ValueError, match="DKPP: temperature=0"):
        DKPP(temperature=0)


def test_padding_does_not_count():
    labels = torch.tensor([[1, 2, UNLABELLED]])
    student, teacher = logits(1, 3, 4), torch.zeros(1, 3, 4)
    teacher[:, :2, 1] = 5  # equal others: no permutation changes it
    batch, term = read_batch((torch.zeros(1, 3), labels)), DKPP()
    term.pairs = [("@logits", "@logits")]
    value = term(Record(student), Record(teacher), batch)
    torch.testing.assert_close(value, kd_divergence(student[:, :2], teacher[:, :2], 1.0))
