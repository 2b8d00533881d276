from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import SRRL, Distillation, TaskLoss
from tutelage.knowledge.feature.srrl import softmax_regression
from tutelage.models import MLP, SmallCNN


def images(count=6, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def bound(loss, student=None, teacher=None, inputs=None):
    torch.manual_seed(0)
    student = student if student is not None else SmallCNN(4)
    teacher = teacher if teacher is not None else SmallCNN(8)
    return Distillation(student, teacher, losses=[loss]).bind(images() if inputs is None else inputs)


def test_is_the_loop_over_features_and_over_what_the_classifier_with_its_bias_says_of_them():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    classifier = nn.Linear(4, 5).double()
    features = [(a - b) ** 2 for s, t in zip(student, teacher, strict=True) for a, b in zip(s, t, strict=True)]
    logits = [
        (a - b) ** 2
        for s, t in zip(student, teacher, strict=True)
        for a, b in zip(classifier(s), classifier(t), strict=True)
    ]
    expected = 0.7 * sum(features) / 12 + 0.3 * sum(logits) / 15
    value = softmax_regression(student, teacher, classifier.weight, matching=0.7, regression=0.3)
    torch.testing.assert_close(value, expected)
    assert value.requires_grad is False


def test_what_the_classifier_does_not_see_costs_only_as_a_feature():
    torch.manual_seed(0)
    teacher, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    unseen = torch.linalg.svd(weight).Vh[-1]
    value = softmax_regression(teacher + 2 * unseen, teacher, weight, matching=0)
    assert value < 1e-20
    assert softmax_regression(teacher + 2 * unseen, teacher, weight).item() == pytest.approx(1.0)  # 2² over 4 features


def test_the_value_is_that_of_the_connected_map_before_its_mean():
    loss = SRRL("stage3", matching=0.5, regression=2.0)
    d = bound(loss)
    student, teacher = d.student, d.teacher.module
    value = d(images())["SRRL"]
    with torch.no_grad():
        mine, theirs = (m.stage3(m.pool(m.stage2(m.pool(m.stage1(images()))))) for m in (student, teacher))
        h = loss.connector(mine).mean((2, 3))
        z = teacher.linear(h) - teacher(images())
        expected = 0.5 * (h - theirs.mean((2, 3))).square().mean() + 2 * z.square().mean()
    torch.testing.assert_close(value, expected)


def test_the_gradient_reaches_encoder_and_connector_and_no_classifier():
    loss = SRRL()
    d = bound(loss)
    d(images()).total.backward()
    assert d.student.stage1[0].weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in loss.connector.parameters())
    assert d.student.linear.weight.grad is None
    assert loss.classifier.grad is None
    assert not loss.classifier.requires_grad
    assert all(p.grad is None for p in d.teacher.module.parameters())
    assert loss.pairs == [("stage3", "stage3")]


def test_the_classifier_is_a_copy_that_optimisers_leave_alone_and_checkpoints_hold():
    loss = SRRL()
    d = bound(loss)
    teacher = d.teacher.module
    assert torch.equal(loss.classifier, teacher.linear.weight)
    assert loss.classifier.data_ptr() != teacher.linear.weight.data_ptr()
    optimizer = torch.optim.AdamW(d.parameters(), lr=0.1, weight_decay=0.5)
    d(images()).total.backward()
    optimizer.step()
    assert torch.equal(loss.classifier, teacher.linear.weight)
    other = SRRL()
    fresh = bound(other, copy.deepcopy(d.student), SmallCNN(8))
    assert not torch.equal(other.classifier, loss.classifier)
    fresh.load_state_dict(d.state_dict())
    assert torch.equal(other.classifier, loss.classifier)
    assert "classifier" not in "".join(d.student.state_dict())


def test_bound_to_another_teacher_it_takes_that_ones_classifier():
    loss, teacher = SRRL(), SmallCNN(2, num_classes=10)
    bound(loss)
    bound(loss, SmallCNN(4), teacher)
    assert torch.equal(loss.classifier, teacher.linear.weight)
    assert loss.connector[0].out_channels == 8


def test_vectors_have_a_connector_too_and_a_batch_of_one_is_finite():
    teacher, student = MLP(8, (12,), 3), MLP(8, (5,), 3)
    loss = SRRL("linear:input")
    d = bound(loss, student, teacher, torch.randn(6, 8))
    value = d(torch.randn(1, 8)).total
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in d.parameters() if p.grad is not None)


def test_float64_stays_float64():
    d = bound(SRRL(), SmallCNN(4).double(), SmallCNN(8).double(), images().double())
    assert d(images().double()).total.dtype == torch.float64


def test_what_is_not_judged_by_one_linear_layer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"SRRL: the classifier 'linear' reads 32 features, and 'stage2' has 16"):
        bound(SRRL("stage2"))
    capped = nn.Sequential(SmallCNN(8), nn.Hardtanh(-0.01, 0.01))
    with pytest.raises(ValueError, match=r"the logits are not what the last linear layer '0\.linear' says"):
        bound(SRRL(("stage3", "0.stage3")), teacher=capped)
    convolutional = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="has no linear layer"):
        bound(SRRL(("stage3", "0")), teacher=convolutional)
    tokens = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"the student's features are \(4, 2, 4\)"):
        bound(SRRL(("0", "linear:input")), tokens, MLP(8, (12,), 3), torch.randn(4, 8))
    with pytest.raises(ValueError, match="expected one, what the classifiers read"):
        SRRL("stage2", "stage3")
    with pytest.raises(ValueError, match="regression=-1"):
        SRRL(regression=-1)
    with pytest.raises(ValueError, match=r"expected \(B, C\), \(B, C\) and \(K, C\)"):
        softmax_regression(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 2))
    student = SmallCNN(4)
    with pytest.raises(ValueError, match="needs a finished teacher"):
        SRRL().resolve(student, student, None)


def test_the_teachers_classifier_reads_the_student_better_than_one_trained_alone(lessons):
    def judged(*losses):
        """How far the best connected features of a finished student are from the teacher's, on unseen images."""
        torch.manual_seed(0)
        student = copy.deepcopy(lessons.beginner)
        train(Distillation(student, lessons.teacher, losses=[TaskLoss(), *losses]))
        student.requires_grad_(False).eval()
        loss = SRRL("stage3")
        torch.manual_seed(1)
        d = Distillation(student, lessons.teacher, losses=[loss])
        train(d)
        with torch.no_grad():
            return d.eval()(lessons.unseen)["SRRL"].item()

    def train(d):
        d.bind((lessons.images, lessons.labels))
        optimizer = torch.optim.Adam([p for p in d.parameters() if p.requires_grad], lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            d((lessons.images, lessons.labels)).total.backward()
            optimizer.step()

    assert judged(SRRL("stage3")) < 0.9 * judged()
