from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation, TaskLoss
from tutelage.connectors import match_size
from tutelage.knowledge.feature.sem_ckd import LayerAttention, SemCKD, bottleneck, calibrated_hint, similarity_rows
from tutelage.models import SmallCNN


def filled(parameters, offset):
    """Weights that anyone can rebuild: 0.3·sin(0.37·i + number of the tensor + offset)."""
    for number, parameter in enumerate(parameters):
        with torch.no_grad():
            values = torch.arange(parameter.numel(), dtype=torch.float64) * 0.37 + number + offset
            parameter.copy_(values.sin().view_as(parameter) * 0.3)


def five_layers():
    """Two layers of a student and three of a teacher, four samples, and the random numbers that follow."""
    random = np.random.RandomState(0)
    student = [torch.from_numpy(random.randn(4, c, n, n)) for c, n in ((3, 6), (5, 3))]
    teacher = [torch.from_numpy(random.randn(4, c, n, n)) for c, n in ((4, 6), (2, 3), (3, 2))]
    return student, teacher, random


def test_the_hint_has_the_value_of_the_authors_code():
    student, teacher, random = five_layers()
    attention = torch.from_numpy(random.randn(4, 2, 3)).softmax(2)
    projected, targets = [], []
    for i, s in enumerate(student):
        row = [match_size(s, t) for t in teacher]
        projections = [bottleneck(s.shape[1], t.shape[1]).double() for t in teacher]
        for j, projection in enumerate(projections):
            filled([projection[n].weight for n in (0, 3, 6)], i + 10 * j)
        projected.append([project(x) for project, (x, _) in zip(projections, row, strict=True)])
        targets.append([t for _, t in row])
    assert calibrated_hint(projected, targets, attention).item() == pytest.approx(1.0960090595678171, rel=1e-12)


def test_the_hint_is_the_loop_over_samples_and_layers():
    torch.manual_seed(0)
    student = [[torch.randn(3, 2, 2, 2).double(), torch.randn(3, 4).double()] for _ in range(2)]
    teacher = [[torch.randn(3, 2, 2, 2).double(), torch.randn(3, 4).double()] for _ in range(2)]
    attention = torch.randn(3, 2, 2).double().softmax(2)
    total = 0.0
    for b in range(3):
        for i in range(2):
            for j in range(2):
                pairs = zip(student[i][j][b].flatten().tolist(), teacher[i][j][b].flatten().tolist(), strict=True)
                squares = [(s - t) ** 2 for s, t in pairs]
                total += attention[b, i, j].item() * sum(squares) / len(squares)
    assert calibrated_hint(student, teacher, attention).item() == pytest.approx(total / (3 * 2))


def test_a_layer_without_attention_costs_nothing():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    for chosen, cost in ((0, 4.0), (1, 1.0)):
        attention = F.one_hot(torch.full((2, 1), chosen), 2).float()
        assert calibrated_hint([[2 * one, one]], [[zero, zero]], attention).item() == pytest.approx(cost)


def test_attention_is_the_loop_over_the_entries_of_each_samples_row():
    """With the authors' perceptron of B inputs whose weights are tied between the places."""
    student, teacher, _ = five_layers()
    attend = LayerAttention(2, 3, width=3).double()

    def embedding(perceptron, features, sample):
        flat = features.flatten(1)
        row = [(flat[sample] @ other).item() for other in flat]
        scale = (sum(x * x for x in row) / len(row)) ** 0.5
        first, second = perceptron[0], perceptron[2]
        numbers = []
        for entry in row:
            hidden = (first.weight[:, 0] * (entry / scale) + first.bias).clamp(min=0)
            numbers.append(second.weight @ hidden + second.bias)
        vector = torch.cat(numbers)
        return vector / vector.norm()

    found = attend(student, teacher)
    for b in range(4):
        for i in range(2):
            query = embedding(attend.query[i], student[i], b)
            energies = [query @ embedding(attend.key[j], teacher[j], b) for j in range(3)]
            torch.testing.assert_close(found[b, i], torch.stack(energies).softmax(0))


def test_attention_depends_neither_on_the_order_nor_on_the_size_of_the_batch():
    student, teacher, _ = five_layers()
    attend = LayerAttention(2, 3).double()
    alone = attend(student, teacher)
    torch.testing.assert_close(alone.sum(2), torch.ones(4, 2).double())
    assert (alone[0] - alone[1]).abs().max() > 1e-6  # each sample has its own
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(attend([s[order] for s in student], [t[order] for t in teacher]), alone[order])
    twice = attend([torch.cat([s, s]) for s in student], [torch.cat([t, t]) for t in teacher])
    torch.testing.assert_close(twice, torch.cat([alone, alone]))


def test_rows_of_similarities_forget_scale_and_have_mean_square_one():
    student, _, _ = five_layers()
    rows = similarity_rows(student[0])
    torch.testing.assert_close(rows.square().mean(1), torch.ones(4).double())
    torch.testing.assert_close(similarity_rows(7 * student[0]), rows)


def test_every_smaller_batch_after_a_larger_one_is_calculated(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 3, 5, 5), torch.randn(6, 4, 5, 5)
    call = bound(SemCKD(), student, teacher)
    for size in (6, 4, 1):
        assert call(student[:size], teacher[:size]).isfinite()


@pytest.mark.parametrize("shape", [(1, 3, 5, 5), (1, 3, 1, 1), (4, 3, 5, 5)])
@pytest.mark.parametrize("value", [0.0, 500.0])
def test_equal_features_have_sane_gradients(bound, shape, value):
    torch.manual_seed(0)
    student = torch.full(shape, value, requires_grad=True)
    teacher = torch.randn(shape)
    loss = bound(SemCKD(), student, teacher)(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.abs().max() < 1e4


def test_the_gradient_reaches_the_student_and_what_is_learned_but_not_the_teacher():
    student, teacher = SmallCNN(4), SmallCNN(8)
    loss = SemCKD("stage1", "stage2")
    d = Distillation(student, teacher, losses=[loss]).bind(torch.randn(4, 1, 12, 12))
    d(torch.randn(4, 1, 12, 12)).total.backward()
    assert student.stage1[0].weight.grad.abs().sum() > 0
    assert student.stage2[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in loss.parameters())
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in d.parameters()}
    assert len(student.state_dict()) == len(SmallCNN(4).state_dict())


def test_by_default_every_stage_of_both_is_read_however_many_each_has():
    def plain(stages, width):
        parts = [nn.Conv2d(1, width, 3, padding=1)]
        for _ in range(stages - 1):
            parts.append(nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, width, 3, padding=1)))
        return nn.Sequential(*parts)

    loss = SemCKD()
    d = Distillation(plain(2, 4), plain(3, 6), losses=[loss]).bind(torch.randn(4, 1, 16, 16))
    assert loss.layers == (["0", "1"], ["0", "1", "2"])
    assert loss.pairs == [("0", "0"), ("1", "1"), ("1", "2")]
    assert len(loss.projections) == 6
    assert d(torch.randn(3, 1, 16, 16)).total.isfinite()
    assert loss.weight == 400


def test_which_layers_stand_beside_each_other_means_nothing():
    torch.manual_seed(0)
    student, teacher, images = SmallCNN(4), SmallCNN(8), torch.randn(4, 1, 12, 12)
    values = []
    for pairs in ([("stage1", "stage2"), ("stage2", "stage1")], [("stage1", "stage2"), ("stage2", "stage1")][::-1]):
        loss = SemCKD(*pairs)
        d = Distillation(student, teacher, losses=[loss]).bind(images)
        mine, theirs = loss.layers
        for i, s in enumerate(mine):  # the same weights for the same layers
            filled(loss.attend.query[i].parameters(), int(s[-1]))
            for j, t in enumerate(theirs):
                filled(loss.attend.key[j].parameters(), 5 * int(t[-1]))
                filled([loss.projections[2 * i + j][n].weight for n in (0, 3, 6)], 10 * int(s[-1]) + int(t[-1]))
        values.append(d(images)["SemCKD"])
    torch.testing.assert_close(*values)


def test_what_cannot_be_compared_is_refused(bound):
    one = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"attention of shape \(2, 2\).*\(2, 1, 1\)"):
        calibrated_hint([[one]], [[one]], torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"hints differ.*\(2, 3\).*\(2, 4\)"):
        calibrated_hint([[one]], [[torch.ones(2, 4)]], torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match=r"teacher 't' is of shape \(2, 5\)"):
        bound(SemCKD(), torch.ones(2, 3, 4, 4), torch.ones(2, 5))
    with pytest.raises(ValueError, match="width=0"):
        SemCKD(width=0)


def test_float64_stays_and_half_precision_is_calculated_in_float32(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 5, 5), torch.randn(4, 6, 3, 3)
    assert bound(SemCKD(), student.double(), teacher.double())(student.double(), teacher.double()).dtype == (
        torch.float64
    )
    call = bound(SemCKD(), student, teacher)
    value = call(student.half(), teacher.half())
    torch.testing.assert_close(value, call(student.half().float(), teacher.half().float()))


def test_attention_is_learned_towards_the_layer_that_can_be_learned():
    torch.manual_seed(0)
    student = torch.randn(16, 4, 4, 4)
    teacher = [student @ torch.randn(4, 4), 3 * torch.randn(16, 4, 4, 4)]  # the second is noise, new at every step
    attend, projections = LayerAttention(1, 2), nn.ModuleList(bottleneck(4, 4) for _ in teacher)
    optimizer = torch.optim.Adam([*attend.parameters(), *projections.parameters()], lr=0.02)
    before = attend([student], teacher)[:, 0, 0].mean()
    for _ in range(60):
        teacher[1] = 3 * torch.randn(16, 4, 4, 4)
        optimizer.zero_grad()
        projected = [[project(student) for project in projections]]
        calibrated_hint(projected, [teacher], attend([student], teacher)).backward()
        optimizer.step()
    after = attend([student], teacher)[:, 0, 0].mean()
    assert after > 0.7
    assert after > before + 0.1


def test_training_brings_unseen_layers_closer_to_the_teachers(lessons):
    def calibration():
        return SemCKD("stage2", "stage3", weight=50.0)

    alone, taught = lessons.student(), lessons.student(calibration())
    assert lessons.distance(taught, calibration()) < 0.9 * lessons.distance(alone, calibration())


def test_beside_the_task_it_is_saved_and_loaded():
    torch.manual_seed(0)
    student, teacher = SmallCNN(4), SmallCNN(8)
    batch = torch.randn(4, 1, 12, 12), torch.tensor([0, 1, 2, 3])
    one, other = (Distillation(student, teacher, losses=[TaskLoss(), SemCKD("stage2")]).bind(batch) for _ in range(2))
    optimizer = torch.optim.SGD(one.losses.parameters(), lr=0.1)
    one(batch).total.backward()
    optimizer.step()
    assert one.eval()(batch)["SemCKD"] != other.eval()(batch)["SemCKD"]
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(batch)["SemCKD"], one(batch)["SemCKD"])
