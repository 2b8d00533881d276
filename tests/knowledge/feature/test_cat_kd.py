from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import CATKD, Distillation
from tutelage.knowledge.feature.cat_kd import class_activation_maps, class_attention
from tutelage.models import MLP, SmallCNN


def images(count=6, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def bound(loss, student=None, teacher=None, inputs=None):
    torch.manual_seed(0)
    student = student if student is not None else SmallCNN(4)
    teacher = teacher if teacher is not None else SmallCNN(8)
    return Distillation(student, teacher, losses=[loss]).bind(images() if inputs is None else inputs)


def last_map(model, x):
    return model.stage3(model.pool(model.stage2(model.pool(model.stage1(x)))))


def test_is_the_loop_over_classes_and_quarters():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))

    def unit(one):
        means = [one[i : i + 2, j : j + 2].mean().item() for i in (0, 2) for j in (0, 2)]
        norm = math.sqrt(sum(m * m for m in means))
        return [m / norm for m in means]

    terms = [
        (a - b) ** 2
        for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)
        for a, b in zip(unit(s), unit(t), strict=True)
    ]
    assert class_attention(student, teacher).item() == pytest.approx(sum(terms) / len(terms))


def test_normalised_maps_forget_each_ones_scale_and_opposites_cost_most():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    scales = torch.rand(2, 3, 1, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(class_attention(scales * student, teacher), class_attention(student, teacher))
    assert class_attention(-teacher, teacher).item() == pytest.approx(1.0)  # 4 / 2²
    plain = class_attention(3 * student, 3 * teacher, normalise=False)
    torch.testing.assert_close(plain, 9 * class_attention(student, teacher, normalise=False))


def test_binary_maps_are_what_exceeds_the_mean_activation():
    teacher = torch.tensor([[[[4.0, -1.0], [0.5, -0.5]]]])  # the mean of |A| is 1.5
    expected = F.normalize(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]).flatten(), dim=0)
    student = torch.tensor([[[[3.0, 0.0], [4.0, 0.0]]]])
    value = class_attention(student, teacher, binarise=True)
    torch.testing.assert_close(value, (student.flatten() / 5 - expected).square().mean())


def test_the_mean_of_class_activation_maps_is_the_logits_without_the_bias():
    model = SmallCNN(4).eval()
    maps = class_activation_maps(last_map(model, images()), model.linear.weight)
    assert maps.shape == (6, 10, 4, 4)
    torch.testing.assert_close(maps.mean((2, 3)) + model.linear.bias, model(images()))


@pytest.mark.parametrize("options", [{}, {"size": 4, "normalise": False}, {"binarise": True}])
def test_the_value_is_that_of_the_whole_maps(options):
    loss = CATKD("stage3", **options)
    d = bound(loss)
    student, teacher = d.student, d.teacher.module
    value = d(images())["CATKD"]
    with torch.no_grad():
        maps = [class_activation_maps(last_map(m, images()), m.linear.weight) for m in (student, teacher)]
        expected = class_attention(*maps, **options)
    torch.testing.assert_close(value, expected)
    assert value > 0


def test_the_gradient_reaches_the_students_features_and_its_classifier_as_it_is_now():
    loss = CATKD()
    d = bound(loss)
    d(images()).total.backward()
    assert d.student.stage1[0].weight.grad.abs().sum() > 0
    assert d.student.linear.weight.grad.abs().sum() > 0
    assert d.student.linear.bias.grad is None
    assert all(p.grad is None for p in d.teacher.module.parameters())
    before = d(images())["CATKD"]
    with torch.no_grad():
        d.student.linear.weight.neg_()
    assert abs(d(images())["CATKD"] - before) > 1e-3


def test_the_student_is_not_in_the_loss_and_the_teachers_classifier_is_a_copy_that_does_not_learn():
    loss = CATKD()
    d = bound(loss)
    assert list(loss.state_dict()) == ["classifier"]
    assert list(loss.parameters()) == []
    teacher = d.teacher.module
    assert torch.equal(loss.classifier, teacher.linear.weight)
    assert loss.classifier.data_ptr() != teacher.linear.weight.data_ptr()
    assert len(list(d.parameters())) == len(list(d.student.parameters()))
    optimizer = torch.optim.AdamW(d.parameters(), lr=0.1, weight_decay=0.5)
    d(images()).total.backward()
    optimizer.step()
    assert torch.equal(loss.classifier, teacher.linear.weight)
    other = CATKD()
    fresh = bound(other, copy.deepcopy(d.student), SmallCNN(8))
    fresh.load_state_dict(d.state_dict())
    assert torch.equal(other.classifier, loss.classifier)


def test_a_copied_distillation_reads_its_own_student():
    d = bound(CATKD())
    twin = copy.deepcopy(d)
    twin(images()).total.backward()
    assert twin.student.linear.weight.grad is not None
    assert d.student.linear.weight.grad is None


def test_drop_out_before_the_students_classifier_does_not_matter_when_binding():
    class Dropped(SmallCNN):
        def forward(self, x):
            return self.linear(F.dropout(self.avgpool(last_map(self, x)).flatten(1), 0.5, self.training))

    student = Dropped(4)
    d = bound(CATKD(), student)
    assert student.training
    assert d(images()).total > 0


def test_float64_stays_float64_and_half_precision_is_calculated_in_float32():
    d = bound(CATKD(), SmallCNN(4).double(), SmallCNN(8).double(), images().double())
    assert d(images().double()).total.dtype == torch.float64
    half = bound(CATKD(), SmallCNN(4).bfloat16(), SmallCNN(8).bfloat16(), images().bfloat16())
    assert half(images().bfloat16()).total.dtype == torch.float32


def test_what_has_no_class_activation_maps_is_refused_by_name():
    with pytest.raises(ValueError, match=r"CATKD: student: the classifier 'linear' reads 16 features, and 'stage2'"):
        bound(CATKD(("stage2", "stage3")))
    with pytest.raises(ValueError, match="CATKD: teacher: the classifier 'linear' reads 32 features, and 'stage2'"):
        bound(CATKD(("stage3", "stage2")))
    with pytest.raises(ValueError, match="student has 10 classes and the teacher 5"):
        bound(CATKD(), teacher=SmallCNN(8, num_classes=5))
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\)"):
        bound(CATKD("linear:input"), MLP(8, (5,), 3), MLP(8, (6,), 3), torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"size=5: maps of \(4, 4\)"):
        bound(CATKD(size=5))
    with pytest.raises(ValueError, match="size=1: expected at least 2"):
        CATKD(size=1)
    with pytest.raises(ValueError, match="expected one, the last map"):
        CATKD("stage2", "stage3")
    with pytest.raises(ValueError, match="of the same classes"):
        class_attention(torch.ones(2, 3, 4, 4), torch.ones(2, 4, 4, 4))
    student = SmallCNN(4)
    with pytest.raises(ValueError, match="needs a finished teacher"):
        CATKD().resolve(student, student, None)
    squeezed = nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="CATKD: teacher: Sequential has no linear layer"):
        bound(CATKD(("stage3", "0")), teacher=squeezed)


def test_on_unseen_images_the_student_sees_classes_where_the_teacher_does(lessons):
    def apart(student):
        with torch.no_grad():
            maps = [
                class_activation_maps(last_map(m, lessons.unseen), m.linear.weight) for m in (student, lessons.teacher)
            ]
            return class_attention(*maps).item()

    assert apart(lessons.student(CATKD("stage3"))) < 0.8 * apart(lessons.student())


def test_without_any_label_the_maps_alone_teach_to_classify(lessons):
    """The paper's CAT: transferring class activation maps suffices to classify."""
    student = copy.deepcopy(lessons.beginner)
    d = Distillation(student, lessons.teacher, losses=[CATKD("stage3")]).bind(lessons.images)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        d(lessons.images).total.backward()
        optimizer.step()
    with torch.no_grad():
        right = student.eval()(lessons.unseen).argmax(1) == lessons.unseen_labels
    assert right.float().mean() > 0.4  # of five classes
