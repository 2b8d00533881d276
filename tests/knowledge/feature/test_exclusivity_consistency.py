from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation, TaskLoss
from tutelage.knowledge.feature.exclusivity_consistency import (
    ExclusivityConsistency,
    feature_consistency,
    position_exclusivity,
)
from tutelage.models import MLP, SmallCNN


def images(count=4):
    torch.manual_seed(0)
    return torch.randn(count, 1, 16, 16)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_exclusivity_is_the_loop_over_pairs_of_filters(unit, groups):
    torch.manual_seed(0)
    filters = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    rows = F.normalize(filters.flatten(1), dim=1) if unit else filters.flatten(1)
    values = []
    for group in rows.split(6 // groups):
        pairs = [(a, b) for i, a in enumerate(group) for j, b in enumerate(group) if i != j]
        values.append(sum((a * b).abs().sum().item() for a, b in pairs) / len(pairs))
    assert position_exclusivity(filters, groups, unit).item() == pytest.approx(sum(values) / groups)


def test_filters_of_disjoint_positions_are_exclusive_and_orthogonal_ones_need_not_be():
    apart = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, -1.0]])
    assert position_exclusivity(apart) == 0
    orthogonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert position_exclusivity(orthogonal).item() == pytest.approx(1)
    torch.testing.assert_close(position_exclusivity(orthogonal.abs()), position_exclusivity(orthogonal))


def test_exclusivity_of_unit_filters_forgets_their_length_and_never_exceeds_one():
    torch.manual_seed(0)
    filters = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    lengths = torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(position_exclusivity(lengths * filters), position_exclusivity(filters))
    torch.testing.assert_close(
        position_exclusivity(3 * filters, unit=False), 9 * position_exclusivity(filters, 1, False)
    )
    assert position_exclusivity(filters[:1].repeat(5, 1, 1, 1)).item() == pytest.approx(1)
    assert position_exclusivity(filters) < 1


def test_exclusivitys_gradient_is_that_of_finite_differences_and_sane_for_a_dead_filter():
    torch.manual_seed(0)
    filters = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    for unit in (False, True):
        assert torch.autograd.gradcheck(lambda f, unit=unit: position_exclusivity(f, 2, unit), filters)
    dead = torch.randn(4, 9)
    dead[1] = 0
    position_exclusivity(dead.requires_grad_()).backward()
    assert dead.grad.isfinite().all()
    assert dead.grad.abs().max() < 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_filters_are_compared_in_float32(dtype):
    filters = torch.randn(4, 9).to(dtype)
    assert position_exclusivity(filters).dtype == torch.float32
    torch.testing.assert_close(position_exclusivity(filters), position_exclusivity(filters.float()))


@pytest.mark.parametrize("hardness", [0.0, 1.0, 2.0])
def test_consistency_is_the_loop_over_samples(hardness):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    distances = [2 - 2 * ((a @ b) / (a.norm() * b.norm())).item() for a, b in zip(student, teacher, strict=True)]
    mean = sum(distances) / 5
    expected = sum((d / mean) ** hardness * d for d in distances) / 5
    assert feature_consistency(student, teacher, hardness).item() == pytest.approx(expected)


def test_hard_samples_get_more_of_the_gradient_and_none_is_driven_away():
    torch.manual_seed(0)
    teacher = F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    student = (teacher + torch.linspace(0.05, 2, 6, dtype=torch.float64)[:, None] * torch.randn_like(teacher)).detach()
    student.requires_grad_()
    plain, hard = (
        torch.autograd.grad(feature_consistency(student, teacher, hardness), student)[0] for hardness in (0.0, 1.0)
    )
    distance = 2 - 2 * F.cosine_similarity(student, teacher)
    ratio = hard.norm(dim=1) / plain.norm(dim=1)
    torch.testing.assert_close(ratio, (distance / distance.mean()).detach())
    # every sample is pulled where plain consistency pulls it
    assert (F.cosine_similarity(plain, hard) > 1 - 1e-9).all()


def test_consistency_forgets_lengths_and_the_order_of_the_batch():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    value = feature_consistency(student, teacher)
    torch.testing.assert_close(feature_consistency(3 * student, 0.1 * teacher), value)
    torch.testing.assert_close(feature_consistency(student.flip(0), teacher.flip(0)), value)
    assert feature_consistency(7 * teacher, teacher) < 1e-15


@pytest.mark.parametrize("hardness", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spoil", ["zero row", "all zero", "equal", "extreme", "one"])
def test_degenerate_features_have_sane_gradients(spoil, hardness):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6)
    if spoil == "zero row":
        student[0] = 0
    elif spoil == "all zero":
        student.zero_(), teacher.zero_()
    elif spoil == "equal":
        student[:] = teacher
    elif spoil == "extreme":
        student.copy_(student.sign() * 500)
    else:
        student, teacher = student[:1].clone(), teacher[:1]
    value = feature_consistency(student.requires_grad_(), teacher, hardness)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 100


def test_the_value_is_consistency_and_the_mean_exclusivity_of_the_layers():
    torch.manual_seed(0)
    student, teacher = SmallCNN(4), SmallCNN(4)
    loss = ExclusivityConsistency(exclusivity=0.3, hardness=2.0)
    value = Distillation(student, teacher, losses=[loss]).bind(images())(images())["ExclusivityConsistency"]
    teacher.eval()
    features = [
        m.avgpool(m.stage3(m.pool(m.stage2(m.pool(m.stage1(images())))))).flatten(1) for m in (student, teacher)
    ]
    layers = [position_exclusivity(layer[0].weight) for layer in (student.stage1, student.stage2, student.stage3)]
    expected = feature_consistency(*features, hardness=2.0) + 0.3 * sum(layers) / 3
    torch.testing.assert_close(value, expected.detach())


def test_grouped_filters_are_paired_within_groups_and_depthwise_ones_not_at_all():
    class Mobile(nn.Module):
        def __init__(self, wide=6):
            super().__init__()
            self.stem = nn.Conv2d(1, wide, 3)
            self.depthwise = nn.Conv2d(wide, wide, 3, groups=wide)
            self.grouped = nn.Conv2d(wide, wide, 1, groups=2)
            self.linear = nn.Linear(wide, 3)

        def forward(self, x):
            return self.linear(self.grouped(self.depthwise(self.stem(x))).mean((2, 3)))

    torch.manual_seed(0)
    student, loss = Mobile(), ExclusivityConsistency()
    Distillation(student, Mobile(), losses=[loss]).bind(images())
    assert [
        (weight is layer.weight, groups)
        for (weight, groups), layer in zip(loss.filters(), (student.stem, student.grouped), strict=True)
    ] == [(True, 1), (True, 2)]


def test_the_filters_are_the_students_own_and_nothing_of_the_student_is_in_the_loss():
    torch.manual_seed(0)
    student, teacher, loss = SmallCNN(4), SmallCNN(8), ExclusivityConsistency()
    keys = set(student.state_dict())
    d = Distillation(student, teacher, losses=[loss]).bind(images())
    assert {n for n, _ in loss.named_parameters()} == {"projectors.0.weight", "projectors.0.bias"}
    assert set(student.state_dict()) == keys
    assert len(list(d.parameters())) == len(list(student.parameters())) + 2
    assert all(
        weight is layer[0].weight
        for (weight, _), layer in zip(loss.filters(), (student.stage1, student.stage2, student.stage3), strict=True)
    )
    before = d(images())["ExclusivityConsistency"]
    with torch.no_grad():  # what an optimiser changes is seen at the next step
        for layer in (student.stage1, student.stage2, student.stage3):
            layer[0].weight[1:] = layer[0].weight[:1]
    features = d(images())["ExclusivityConsistency"]
    loss.exclusivity = 0.0
    assert (features - d(images())["ExclusivityConsistency"]).item() == pytest.approx(0.01)
    assert before != features


def test_a_copied_distillation_reads_the_copied_student():
    d = Distillation(SmallCNN(4), SmallCNN(8), losses=[ExclusivityConsistency()]).bind(images())
    other = copy.deepcopy(d)
    assert other.losses["ExclusivityConsistency"].filters()[0][0] is other.student.stage1[0].weight
    assert other.student.stage1[0].weight is not d.student.stage1[0].weight


def test_gradients_reach_filters_and_projector_and_not_the_teacher():
    torch.manual_seed(0)
    student, teacher = SmallCNN(4), SmallCNN(8)
    loss = ExclusivityConsistency()
    Distillation(student, teacher, losses=[loss]).bind(images())(images()).total.backward()
    assert student.stage1[0].weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_projector_is_saved_and_absent_where_widths_are_equal():
    equal = ExclusivityConsistency()
    Distillation(SmallCNN(4), SmallCNN(4), losses=[equal]).bind(images())
    assert not list(equal.parameters())
    torch.manual_seed(1)
    one, other = (
        Distillation(SmallCNN(4), SmallCNN(8), losses=[ExclusivityConsistency()]).bind(images()) for _ in range(2)
    )
    other.load_state_dict(one.state_dict())
    weights = [d.losses["ExclusivityConsistency"].projectors[0].weight for d in (one, other)]
    torch.testing.assert_close(*weights)
    loss = one.losses["ExclusivityConsistency"]
    assert (loss.weight, loss.exclusivity, loss.hardness) == (5, 0.01, 1)


def test_refusals():
    with pytest.raises(ValueError, match="1 filters in 1 groups"):
        position_exclusivity(torch.ones(1, 3))
    with pytest.raises(ValueError, match="5 filters in 2 groups: expected at least 2 in each, equally many"):
        position_exclusivity(torch.ones(5, 3), groups=2)
    with pytest.raises(ValueError, match=r"student \(2, 3\), teacher \(2, 4\)"):
        feature_consistency(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="hardness=-1"):
        feature_consistency(torch.ones(2, 3), torch.ones(2, 3), hardness=-1)
    with pytest.raises(ValueError, match="ExclusivityConsistency: exclusivity=-1"):
        ExclusivityConsistency(exclusivity=-1)
    flat = torch.randn(4, 256)
    with pytest.raises(ValueError, match="MLP has no convolution with two filters"):
        Distillation(MLP(256), MLP(256), losses=[ExclusivityConsistency()]).bind(flat)
    consistent = ExclusivityConsistency(exclusivity=0)
    assert Distillation(MLP(256), MLP(256), losses=[consistent]).bind(flat)(flat).total > 0


def test_training_makes_filters_exclusive_and_unseen_embeddings_consistent(lessons):
    def exclusivity(student):
        layers = [m.weight for m in student.modules() if isinstance(m, nn.Conv2d)]
        return sum(position_exclusivity(weight).item() for weight in layers) / len(layers)

    alone = lessons.student()
    consistent, both = (lessons.student(ExclusivityConsistency(exclusivity=e)) for e in (0.0, 0.2))
    measure = ExclusivityConsistency(exclusivity=0)
    assert lessons.distance(consistent, measure) < 0.9 * lessons.distance(alone, measure)
    assert exclusivity(both) < 0.8 * exclusivity(consistent)
    assert exclusivity(both) < 0.8 * exclusivity(alone)


def test_beside_the_task_both_train_in_one_step():
    batch = images(), torch.arange(4)
    d = Distillation(SmallCNN(4), SmallCNN(8), losses=[TaskLoss(), ExclusivityConsistency()]).bind(batch)
    d(batch).total.backward()
    assert d.student.linear.weight.grad.abs().sum() > 0
