from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation, TaskLoss
from tutelage.functional import task_cross_entropy
from tutelage.views import read_batch


def test_is_minus_the_mean_log_probability_of_the_label():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2, 0])
    expected = -torch.stack([row.softmax(0)[label].log() for row, label in zip(logits, labels, strict=True)]).mean()
    torch.testing.assert_close(task_cross_entropy(logits, labels), expected)


def test_masked_rows_change_neither_loss_nor_gradient():
    torch.manual_seed(0)
    logits = torch.randn(6, 4, requires_grad=True)
    labels = torch.tensor([0, -100, 1, -100, 2, 3])
    kept = labels != -100
    (with_rows,) = torch.autograd.grad(task_cross_entropy(logits, labels), logits)
    (without,) = torch.autograd.grad(task_cross_entropy(logits[kept], labels[kept]), logits)
    torch.testing.assert_close(task_cross_entropy(logits, labels), task_cross_entropy(logits[kept], labels[kept]))
    torch.testing.assert_close(with_rows, without)
    assert with_rows[~kept].abs().max() == 0


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 4, 2, 2)])
def test_nothing_labelled_costs_zero_with_a_gradient(shape):
    logits = torch.randn(shape, requires_grad=True)
    positions = (3,) if len(shape) == 2 else (3, 5) if len(shape) == 3 else (3, 2, 2)
    value = task_cross_entropy(logits, torch.full(positions, -100))
    value.backward()
    assert value == 0
    assert torch.equal(logits.grad, torch.zeros(shape))


def test_sequences_and_dense_outputs_are_the_mean_over_labelled_positions():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, :3] = -100
    expected = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(task_cross_entropy(logits, labels), expected)
    dense, marks = torch.randn(2, 7, 3, 4), torch.randint(7, (2, 3, 4))
    marks[1, 0] = -100
    torch.testing.assert_close(task_cross_entropy(dense, marks), F.cross_entropy(dense, marks))


def test_class_probabilities_as_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 1])
    torch.testing.assert_close(
        task_cross_entropy(logits, F.one_hot(labels, 4).float()), task_cross_entropy(logits, labels)
    )


def test_label_smoothing_mixes_in_the_uniform_distribution():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 1])
    uniform = -logits.log_softmax(1).mean()
    expected = 0.9 * task_cross_entropy(logits, labels) + 0.1 * uniform
    torch.testing.assert_close(task_cross_entropy(logits, labels, label_smoothing=0.1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_calculated_in_float32(dtype):
    logits = torch.tensor([[500.0, -500.0]], dtype=dtype, requires_grad=True)
    value = task_cross_entropy(logits, torch.tensor([1]))
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1000)
    assert logits.grad.isfinite().all()


def test_labels_that_do_not_fit_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(3,\) do not fit logits of shape \(2, 4\)"):
        task_cross_entropy(torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))


def test_a_class_the_student_has_not_is_refused_when_binding():
    batch = torch.randn(3, 6), torch.tensor([0, 1, 4])
    with pytest.raises(ValueError, match="class 4 appears, and the student has 4 classes"):
        Distillation(nn.Linear(6, 4), losses=[TaskLoss()]).bind(batch)


def test_missing_labels_are_refused_when_binding():
    with pytest.raises(ValueError, match="TaskLoss needs labels"):
        Distillation(nn.Linear(6, 4), losses=[TaskLoss()]).bind(torch.randn(3, 6))


def test_units_are_the_labelled_positions():
    tokens = read_batch((torch.zeros(2, 3), torch.tensor([[1, -100, 2], [-100, -100, 0]])))
    assert TaskLoss().units(tokens) == 3
    assert TaskLoss().units(read_batch((torch.zeros(2, 3), torch.rand(2, 4)))) == 2


def test_a_criterion_of_ones_own_takes_the_place_of_cross_entropy():
    inputs, targets = torch.randn(4, 3), torch.randn(4, 2)
    student = nn.Linear(3, 2)
    d = Distillation(student, losses=[TaskLoss(F.mse_loss)]).bind((inputs, targets))
    torch.testing.assert_close(d((inputs, targets)).total, F.mse_loss(student(inputs), targets))


def test_training_on_it_fits_the_labels():
    torch.manual_seed(0)
    inputs = torch.randn(128, 6)
    labels = (inputs @ torch.randn(6, 3)).argmax(1)
    student = nn.Linear(6, 3)
    d = Distillation(student, losses=[TaskLoss()]).bind((inputs, labels))
    optimizer = torch.optim.Adam(d.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        d((inputs, labels)).total.backward()
        optimizer.step()
    assert (student(inputs).argmax(1) == labels).float().mean() > 0.95
