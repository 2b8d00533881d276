"""Cross-entropy in which a sample counts by the teacher's confidence."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tutelage import CWTM, Record
from tutelage.functional import confidence_weighted
from tutelage.views import UNLABELLED, read_batch


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_gradient_is_the_papers_equation_10():
    student, teacher, target = logits(5, 4).requires_grad_(), logits(5, 4, seed=1), torch.tensor([0, 1, 2, 3, 1])
    confidence_weighted(student, teacher, target).backward()
    weights = [max(F.softmax(t, 0).tolist()) for t in teacher]
    for s, row in enumerate(student.detach()):
        q = F.softmax(row, 0)
        for i in range(4):
            expected = weights[s] / sum(weights) * (float(q[i]) - float(i == target[s]))
            assert float(student.grad[s, i]) == pytest.approx(expected, abs=1e-6)


def test_only_the_size_of_the_teachers_first_choice_counts():
    student, teacher, target = logits(6, 5), logits(6, 5, seed=1), torch.arange(6) % 5
    value = confidence_weighted(student, teacher, target)
    torch.testing.assert_close(confidence_weighted(student, teacher.roll(2, 1), target), value)
    even = torch.zeros_like(teacher)
    torch.testing.assert_close(confidence_weighted(student, even, target), F.cross_entropy(student, target))
    sure = torch.where(torch.arange(6)[:, None] == 2, teacher, even)
    assert confidence_weighted(student, sure, target) != value


def test_positions_without_a_label_neither_count_nor_weigh():
    student, teacher, target = logits(6, 5).requires_grad_(), logits(6, 5, seed=1), torch.arange(6) % 5
    some = target.masked_fill(torch.arange(6) > 3, UNLABELLED)
    torch.testing.assert_close(
        confidence_weighted(student, teacher, some), confidence_weighted(student[:4], teacher[:4], target[:4])
    )
    nothing = confidence_weighted(student, teacher, torch.full_like(target, UNLABELLED))
    nothing.backward()
    assert nothing == 0
    assert not student.grad.any()


def test_the_term_reads_the_logits_and_refuses_what_does_not_fit():
    batch = read_batch((torch.zeros(6, 1), torch.arange(6) % 5))
    student, teacher = Record(logits(6, 5)), Record(logits(6, 5, seed=1))
    term = CWTM()
    term.pairs = [("@logits", "@logits")]
    torch.testing.assert_close(
        term(student, teacher, batch), confidence_weighted(student.logits, teacher.logits, batch.labels)
    )
    assert int(term.units(batch)) == 6
    with pytest.raises(ValueError, match="CWTM: the student has 5 classes and the teacher 4"):
        term.check(student, Record(logits(6, 4)), batch)
    with pytest.raises(ValueError, match="class 9 appears"):
        term.check(student, teacher, read_batch((torch.zeros(6, 1), torch.full((6,), 9))))
