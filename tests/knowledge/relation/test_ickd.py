from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tutelage import Distillation
from tutelage.knowledge.relation.ickd import ICKD, inter_channel_correlation
from tutelage.models import SmallCNN


def rebuilt(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float().double()


def test_value_and_gradient_of_the_authors_code():
    student = rebuilt(10, 4, 8, 5, 5).requires_grad_()
    value = inter_channel_correlation(student, rebuilt(11, 4, 8, 3, 3))
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(0.6092963804731676, rel=1e-9)
    assert gradient.norm().item() == pytest.approx(0.08872012490097973, rel=1e-9)


def test_is_the_loop_over_samples_and_pairs_of_channels():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 2, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def rows(sample):
        gram = [[(a * b).sum().item() for b in sample] for a in sample]
        return [[g / sum(v * v for v in row) ** 0.5 for g in row] for row in gram]

    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += sum((rows(s)[i][j] - rows(t)[i][j]) ** 2 for i in range(3) for j in range(3))
    assert inter_channel_correlation(student, teacher).item() == pytest.approx(total / (3 * 2))


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_a_grid_is_the_loop_over_patches_summed(grid):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(2, 3, 8, 4, dtype=torch.float64)
    edges = {  # where patches begin and end; where they do not divide the length, the first are longer by one
        1: {6: [0, 6], 7: [0, 7], 8: [0, 8], 4: [0, 4]},
        2: {6: [0, 3, 6], 7: [0, 4, 7], 8: [0, 4, 8], 4: [0, 2, 4]},
        3: {6: [0, 2, 4, 6], 7: [0, 3, 5, 7], 8: [0, 3, 6, 8], 4: [0, 2, 3, 4]},
    }[grid]

    def patch(x, i, j):
        rows, columns = edges[x.shape[2]], edges[x.shape[3]]
        return x[:, :, rows[i] : rows[i + 1], columns[j] : columns[j + 1]]

    total = sum(
        inter_channel_correlation(patch(student, i, j), patch(teacher, i, j)) for i in range(grid) for j in range(grid)
    )
    torch.testing.assert_close(inter_channel_correlation(student, teacher, grid=grid), total)


def test_a_grid_sees_where_channels_fire_and_the_whole_map_does_not():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    turned = x.flip(2)
    assert inter_channel_correlation(turned, x) < 1e-20
    assert inter_channel_correlation(turned, x, grid=2) > 0.01
    within = torch.cat([part.flip(2) for part in x.split(3, dim=2)], dim=2)
    assert inter_channel_correlation(within, x, grid=2) < 1e-20


def test_a_grid_in_the_loss_and_what_is_refused():
    torch.manual_seed(0)
    inputs = torch.randn(4, 1, 16, 16)
    student, teacher = SmallCNN(4), SmallCNN(6)
    values = {}
    for grid in (1, 4):
        torch.manual_seed(1)
        d = Distillation(student, teacher, losses=[ICKD(grid=grid)]).bind(inputs)
        losses = d(inputs)
        losses.total.backward()
        values[grid] = losses["ICKD"].item()
    assert 0 < values[1] < values[4]
    assert student.stage1[0].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"grid=5: expected .* sizes \(4, 4\) and \(4, 4\)"):
        Distillation(student, teacher, losses=[ICKD(grid=5)]).bind(inputs)
    for grid in (0, -1):
        with pytest.raises(ValueError, match="grid="):
            inter_channel_correlation(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), grid=grid)
    with pytest.raises(ValueError, match=r"sizes \(7, 1\)"):
        inter_channel_correlation(torch.ones(2, 7, 3), torch.ones(2, 7, 3), grid=2)
    for grid in (0, 2.0):
        with pytest.raises(ValueError, match="whole number"):
            ICKD(grid=grid)


def test_neither_positions_nor_a_factor_count_and_channels_do():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    factors = torch.tensor([2.0, 0.1]).reshape(2, 1, 1, 1)
    assert inter_channel_correlation(factors * x.flip(2), x) < 1e-20
    assert inter_channel_correlation(x.flip(1), x) > 0.01


def test_a_silent_channel_is_compared_and_has_a_sane_gradient():
    torch.manual_seed(0)
    student = torch.randn(2, 4, 3, 3)
    student[:, 1] = 0
    student.requires_grad_()
    inter_channel_correlation(student, torch.randn(2, 4, 3, 3)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10


def test_sequences_and_rows():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 4), torch.randn(2, 5, 4)
    expected = inter_channel_correlation(student.mT.unsqueeze(3), teacher.mT.unsqueeze(3))
    torch.testing.assert_close(inter_channel_correlation(student, teacher), expected)
    assert inter_channel_correlation(student[:, 0], 3 * student[:, 0]) < 1e-12


def test_refusals():
    with pytest.raises(ValueError, match="3 channels and the teacher 5"):
        inter_channel_correlation(torch.ones(2, 3, 4, 4), torch.ones(2, 5, 4, 4))
    with pytest.raises(ValueError, match="2 of the student, 3 of the teacher"):
        inter_channel_correlation(torch.ones(2, 3, 4, 4), torch.ones(3, 3, 4, 4))


def test_the_projector_is_there_where_channels_differ_and_stays_out_of_the_student():
    torch.manual_seed(0)
    inputs = torch.randn(4, 1, 16, 16)
    equal, unequal = ICKD(name="equal"), ICKD(name="unequal")
    Distillation(SmallCNN(6), SmallCNN(6), losses=[equal]).bind(inputs)
    assert not list(equal.parameters())
    student = SmallCNN(4)
    keys = set(student.state_dict())
    d = Distillation(student, SmallCNN(6), losses=[unequal]).bind(inputs)
    d(inputs).total.backward()
    assert unequal.pairs == [("stage3", "stage3")]
    assert [type(m) for m in unequal.projectors[0]] == [nn.Conv2d, nn.BatchNorm2d]
    assert unequal.projectors[0][0].weight.grad.abs().sum() > 0
    assert set(student.state_dict()) == keys
    other = Distillation(SmallCNN(4), SmallCNN(6), losses=[ICKD(name="unequal")]).bind(inputs)
    other.load_state_dict(d.state_dict())
    torch.testing.assert_close(other.losses["unequal"].projectors[0][0].weight, unequal.projectors[0][0].weight)


def test_training_makes_the_same_channels_fire_together_on_fresh_samples():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()) for _ in range(2))
    inputs, fresh = torch.randn(24, 1, 10, 10), torch.randn(24, 1, 10, 10)

    def between():
        with torch.no_grad():
            return inter_channel_correlation(student(fresh), teacher(fresh))

    before = between()
    d = Distillation(student, teacher, losses=[ICKD("1")]).bind(inputs)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    assert between() < 0.3 * before
