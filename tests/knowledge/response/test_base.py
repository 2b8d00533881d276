from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage import KD, Distillation
from tutelage.knowledge.base import Loss, class_axis, classes_last, labelled
from tutelage.knowledge.response.logit_regression import LogitRegression
from tutelage.models import SmallCNN


@pytest.mark.parametrize(("shape", "axis"), [((4, 7), -1), ((4, 5, 7), -1), ((4, 7, 3, 2), 1), ((4, 7, 3, 2, 6), 1)])
def test_classes_last_makes_every_position_a_row(shape, axis):
    logits = torch.randn(shape)
    assert class_axis(logits) == axis
    rows = classes_last(logits)
    assert rows.shape == (logits.numel() // 7, 7)
    torch.testing.assert_close(rows.sum(1), logits.sum(axis).reshape(-1))


def test_labelled_counts_what_is_not_masked():
    assert labelled(torch.tensor([[3, -100], [0, -100]])) == 2


def linear(classes):
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, classes))


def test_different_classes_are_refused_with_both_counts():
    with pytest.raises(ValueError, match="student has 3 classes and the teacher 4"):
        Distillation(linear(3), linear(4), losses=[KD()]).bind(torch.randn(2, 6))


def test_equal_classes_of_different_shapes_are_refused_with_the_shapes():
    teacher = nn.Sequential(linear(3), nn.Unflatten(0, (1, 2)))
    with pytest.raises(ValueError, match=r"\(2, 3\) and the teacher's \(1, 2, 3\)"):
        Distillation(linear(3), teacher, losses=[KD()]).bind(torch.randn(2, 6))


def test_several_pairs_of_logits_are_averaged():
    batch = torch.randn(4, 6)
    student, teacher = linear(5), linear(5)
    pairs = [("@logits", "@logits"), ("0", "0")]
    d = Distillation(
        student,
        teacher,
        losses=[
            LogitRegression(*pairs, name="both"),
            LogitRegression(pairs[0], name="one"),
            LogitRegression(pairs[1], name="other"),
        ],
    ).bind(batch)
    losses = d(batch)
    torch.testing.assert_close(losses["both"], (losses["one"] + losses["other"]) / 2)


def test_what_is_no_tap_or_no_weight_is_refused():
    with pytest.raises(TypeError, match="a tap is an address"):
        Loss(("a", "b", "c"))
    with pytest.raises(TypeError, match="weight='much'"):
        KD(weight="much")


class Nothing(Loss):
    def forward(self, student, teacher, batch):
        return student.logits.sum() * 0


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ("stages", ["stage1", "stage2", "stage3"]),
        ("middle stage", ["stage2"]),
        ("last stage", ["stage3"]),
        ("embedding", ["linear:input"]),
        ("logits", ["@logits"]),
        ("nothing", []),
    ],
)
def test_where_a_loss_reads_by_itself(reads, expected):
    loss = Nothing()
    loss.default_reads = reads
    Distillation(SmallCNN(4), SmallCNN(8), losses=[loss]).bind(torch.randn(2, 1, 16, 16))
    assert loss.pairs == [(address, address) for address in expected]
