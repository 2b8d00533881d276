from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation, TaskLoss
from tutelage.knowledge.feature.review_kd import AttentionFusion, ReviewKD, hierarchical_context
from tutelage.models import MLP, SmallCNN
from tutelage.schedule import WarmUp


def images(count=4):
    torch.manual_seed(0)
    return torch.randn(count, 1, 16, 16)


def filled(parameters, offset):
    """Weights that anyone can rebuild: 0.3·sin(0.37·i + number of the tensor + offset)."""
    for number, parameter in enumerate(parameters):
        with torch.no_grad():
            values = torch.arange(parameter.numel(), dtype=torch.float64) * 0.37 + number + offset
            parameter.copy_(values.sin().view_as(parameter) * 0.3)


def test_context_has_the_values_of_the_authors_code():
    random = np.random.RandomState(0)
    for shape, known in (
        ((2, 3, 8, 8), 1.3151153887769604),
        ((2, 3, 4, 4), 1.4539180822701314),
        ((2, 3, 1, 1), 0.3021114924819045),
        ((2, 3, 3, 3), 0.8145357270552411),
        ((2, 3, 5, 5), 1.262886932868413),
    ):
        student, teacher = (torch.from_numpy(random.randn(*shape)) for _ in range(2))
        assert hierarchical_context(student, teacher).item() == pytest.approx(known, rel=1e-12)


def test_fusions_have_the_value_of_the_authors_code():
    """Three stages whose sizes differ between the networks: (8, 5, 1) of the student, (6, 5, 1) of the teacher."""
    random = np.random.RandomState(1)
    student = [torch.from_numpy(random.randn(4, c, n, n)) for c, n in ((3, 8), (4, 5), (5, 1))]
    teacher = [torch.from_numpy(random.randn(4, c, n, n)) for c, n in ((4, 6), (6, 5), (7, 1))]
    fusions = [
        AttentionFusion(s.shape[1], 5, t.shape[1], fuse=i < 2).double()
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    ]
    for offset, fusion in enumerate(fusions):
        attend = [] if fusion.attend is None else [fusion.attend[0].weight, fusion.attend[0].bias]
        filled([fusion.reduce[0].weight, fusion.answer[0].weight, *attend], offset)
    carried, values = None, []
    for fusion, s, t in zip(fusions[::-1], student[::-1], teacher[::-1], strict=True):
        answer, carried = fusion(s, carried, t.shape[2:])
        values.insert(0, hierarchical_context(answer, t).item())
    assert values == pytest.approx([1.4489553011373368, 1.5460002169914822, 1.1859473092058859], rel=1e-12)


def test_context_is_the_weighted_mean_of_the_pooled_maps_losses():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    levels = [(1, 1.0), (2, 1 / 2), (4, 1 / 4), (8, 1 / 8)]  # the side of the squares that are averaged
    total = 0.0
    for side, weight in levels:
        squares = [
            (student[b, c, y : y + side, x : x + side].mean() - teacher[b, c, y : y + side, x : x + side].mean()).item()
            ** 2
            for b in range(2)
            for c in range(3)
            for y in range(0, 8, side)
            for x in range(0, 8, side)
        ]
        total += weight * sum(squares) / len(squares)
    assert hierarchical_context(student, teacher).item() == pytest.approx(total / 1.875)


def test_a_shift_costs_its_square_at_every_level():
    torch.manual_seed(0)
    teacher = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    assert hierarchical_context(teacher + 3, teacher).item() == pytest.approx(9)


def test_what_averages_out_costs_less_than_what_does_not():
    teacher = torch.zeros(1, 1, 8, 8)
    checks = torch.ones(8, 8)
    checks[::2, 1::2] = checks[1::2, ::2] = -1
    assert hierarchical_context(checks.expand(1, 1, 8, 8), teacher).item() == pytest.approx(1 / 1.875)
    assert hierarchical_context(torch.ones(1, 1, 8, 8), teacher).item() == pytest.approx(1)


def test_an_axis_that_is_shorter_than_a_level_keeps_its_length():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 8, 3, dtype=torch.float64)
    parts = [F.mse_loss(*(F.adaptive_avg_pool2d(x, size) for x in (student, teacher))) for size in ((4, 3), (2, 2), 1)]
    expected = (F.mse_loss(student, teacher) + parts[0] / 2 + parts[1] / 4 + parts[2] / 8) / 1.875
    torch.testing.assert_close(hierarchical_context(student, teacher), expected)


def test_what_cannot_be_compared_is_refused(bound):
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(2, 5, 4, 4\)"):
        hierarchical_context(torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 4))
    with pytest.raises(ValueError, match="expected two equal shapes"):
        hierarchical_context(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"'s' is \(2, 7, 4\).*expected maps"):
        bound(ReviewKD(), torch.ones(2, 7, 4), torch.ones(2, 7, 4))
    with pytest.raises(ValueError, match="channels=0"):
        ReviewKD(channels=0)


def test_by_default_it_reviews_the_embedding_first_and_then_the_stages():
    student, teacher = SmallCNN(4), SmallCNN(8)
    review = ReviewKD()
    batch = images(), torch.zeros(4, dtype=torch.long)
    d = Distillation(student, teacher, losses=[TaskLoss(), review]).bind(batch)
    assert review.pairs == [(tap, tap) for tap in ("stage1", "stage2", "stage3", "linear:input")]
    assert [fusion.answer[0].out_channels for fusion in review.fusions] == [8, 16, 32, 32]
    assert [fusion.reduce[0].in_channels for fusion in review.fusions] == [4, 8, 16, 16]
    assert [fusion.attend is None for fusion in review.fusions] == [False, False, False, True]
    assert review.weight == WarmUp(1.0, until=1 / 12)
    assert {id(p) for p in review.parameters()} <= {id(p) for p in d.parameters()}
    assert not any("fusion" in name for name in student.state_dict())


def test_a_network_without_a_linear_layer_has_its_stages_alone():
    student, teacher = (nn.Sequential(nn.Conv2d(1, n, 3), nn.MaxPool2d(2), nn.Conv2d(n, n, 3)) for n in (4, 6))
    review = ReviewKD(weight=1.0)
    Distillation(student, teacher, losses=[review]).bind(images())
    assert review.pairs == [("0", "0"), ("1", "1"), ("2", "2")]


def test_the_shallow_answer_depends_on_the_deep_stage_and_the_deep_one_not_on_the_shallow():
    torch.manual_seed(0)
    fusions = [AttentionFusion(4, 8, 6, fuse=True), AttentionFusion(8, 8, 6, fuse=False)]
    shallow, deep = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 8, 4, 4, requires_grad=True)
    deep_answer, carried = fusions[1](deep, None, (4, 4))
    shallow_answer, _ = fusions[0](shallow, carried, (8, 8))
    shallow_gradient, deep_gradient = torch.autograd.grad(
        shallow_answer.square().sum(), [shallow, deep], retain_graph=True
    )
    assert min(shallow_gradient.abs().sum(), deep_gradient.abs().sum()) > 0
    assert torch.autograd.grad(deep_answer.square().sum(), shallow, allow_unused=True) == (None,)


def test_the_gradient_reaches_the_student_and_the_fusions_but_not_the_teacher(bound):
    torch.manual_seed(0)
    student = torch.randn(3, 4, 5, 5, requires_grad=True)
    teacher = torch.randn(3, 6, 5, 5, requires_grad=True)
    review = ReviewKD()
    bound(review, student, teacher)(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert all(p.grad is not None for p in review.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1), (1, 4, 5, 5), (3, 4)])
def test_a_batch_of_one_vector_is_finite_and_the_precision_stays(bound, shape, dtype):
    torch.manual_seed(0)
    student, teacher = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)
    value = bound(ReviewKD(), student, teacher)(student, teacher)
    value.backward()
    assert value.dtype == dtype
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 500.0])
def test_equal_samples_have_sane_gradients(bound, value):
    torch.manual_seed(0)
    student = torch.full((4, 3, 4, 4), value, requires_grad=True)
    loss = bound(ReviewKD(), student, torch.randn(4, 5, 4, 4))(student, torch.randn(4, 5, 4, 4))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.abs().max() < 1e4


def test_half_precision_features_are_reviewed_in_float32(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    call = bound(ReviewKD(), student, teacher)
    value = call(student.half(), teacher.half())
    torch.testing.assert_close(value, call(student.half().float(), teacher.half().float()))
    assert value.dtype == torch.float32


def test_the_order_of_the_batch_does_not_matter(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, 6, 6).double(), torch.randn(5, 3, 6, 6).double()
    call = bound(ReviewKD(), student, teacher)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(call(student[order], teacher[order]), call(student, teacher))


def test_what_it_learnt_is_saved_and_a_second_binding_starts_anew(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    review, other = ReviewKD(), ReviewKD()
    call, other_call = bound(review, student, teacher), bound(other, student, teacher)
    call(student, teacher)  # the running averages move
    other.load_state_dict(review.state_dict())
    review.eval(), other.eval()
    torch.testing.assert_close(call(student, teacher), other_call(student, teacher))
    bound(review, student, teacher)
    assert len(review.fusions) == 1


def test_the_weight_warms_up_over_a_twelfth_of_the_training():
    d = Distillation(SmallCNN(4), SmallCNN(8), losses=[TaskLoss(), ReviewKD(weight=WarmUp(6.0, until=20 / 240))])
    batch = images(), torch.zeros(4, dtype=torch.long)
    d.bind(batch)
    seen = []
    for epoch in (0, 10, 20, 240):
        d.progress = epoch / 240
        losses = d(batch)
        seen.append(losses.weights["ReviewKD"])
        assert ("ReviewKD" in losses.values) == (epoch > 0)
    assert seen == pytest.approx([0, 3, 6, 6])


def test_a_perceptron_has_no_stages_to_review():
    with pytest.raises(ValueError, match="stages"):
        Distillation(MLP(256), MLP(256), losses=[ReviewKD()]).bind(images())


def test_training_brings_unseen_stages_closer_to_the_teachers(lessons):
    def review():
        return ReviewKD("stage2", "stage3", "linear:input", weight=5.0)

    alone, taught = lessons.student(), lessons.student(review())
    assert lessons.distance(taught, review()) < 0.93 * lessons.distance(alone, review())
