from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage import KD, Distillation, TaskLoss
from tutelage.knowledge.feature.fitnets import FitNets, hint_loss
from tutelage.models import SmallCNN


def images(count=4):
    torch.manual_seed(0)
    return torch.randn(count, 1, 16, 16)


def counted(model, names):
    calls = dict.fromkeys(names, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(count(name))
    return calls


def test_is_the_mean_squared_difference_and_normalises_nothing():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, 2, dtype=torch.float64)
    terms = [(a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert hint_loss(student, teacher).item() == pytest.approx(sum(terms) / len(terms))
    torch.testing.assert_close(hint_loss(3 * student, 3 * teacher), 9 * hint_loss(student, teacher))


def test_the_regressor_fits_the_real_shapes_and_is_learned():
    student, teacher = SmallCNN(4), SmallCNN(8)
    hint = FitNets()
    d = Distillation(student, teacher, losses=[TaskLoss(), hint])
    d.bind((images(), torch.zeros(4, dtype=torch.long)))
    (regressor,) = hint.regressors
    assert isinstance(regressor, nn.Conv2d)
    assert (regressor.in_channels, regressor.out_channels, regressor.kernel_size) == (8, 16, (1, 1))
    assert {id(p) for p in regressor.parameters()} <= {id(p) for p in d.parameters()}
    assert hint.weight == 100


def test_the_value_is_that_of_the_regressed_hint():
    student, teacher = SmallCNN(4), SmallCNN(8)
    hint = FitNets("stage2")
    d = Distillation(student, teacher, losses=[hint]).bind(images())
    value = d(images())["FitNets"]
    with torch.no_grad():
        mine = student.stage2(student.pool(student.stage1(images())))
        theirs = teacher.stage2(teacher.pool(teacher.stage1(images())))
        expected = (hint.regressors[0](mine) - theirs).square().mean()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("mine", "theirs"), [((2, 3, 8, 6), (2, 5, 4, 6)), ((2, 3, 4, 4), (2, 5, 4, 8))])
def test_maps_of_different_sizes_meet_at_the_smaller(bound, mine, theirs):
    torch.manual_seed(0)
    student, teacher = torch.randn(mine), torch.randn(theirs)
    hint = FitNets()
    value = bound(hint, student, teacher)(student, teacher)
    size = [min(a, b) for a, b in zip(mine[2:], theirs[2:], strict=True)]
    # regress first, pool afterwards: the same, because both are linear
    regressed = nn.functional.adaptive_avg_pool2d(hint.regressors[0](student), size)
    torch.testing.assert_close(value, hint_loss(regressed, nn.functional.adaptive_avg_pool2d(teacher, size)))


@pytest.mark.parametrize("shape", [(4,), (7, 4)])
def test_vectors_and_sequences_have_a_linear_regressor(bound, shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, *shape), torch.randn(3, *shape[:-1], 6)
    hint = FitNets()
    value = bound(hint, student, teacher)(student, teacher)
    assert isinstance(hint.regressors[0], nn.Linear)
    torch.testing.assert_close(value, (hint.regressors[0](student) - teacher).square().mean())


def test_a_float64_hint_stays_float64(bound):
    student, teacher = torch.randn(3, 4).double(), torch.randn(3, 6).double()
    assert bound(FitNets(), student, teacher)(student, teacher).dtype == torch.float64


def test_what_cannot_be_compared_is_refused(bound):
    with pytest.raises(ValueError, match="student has 7 tokens and the teacher 9"):
        bound(FitNets(), torch.randn(2, 7, 4), torch.randn(2, 9, 4))
    with pytest.raises(ValueError, match="same number of axes"):
        bound(FitNets(), torch.randn(2, 4), torch.randn(2, 9, 4, 4))
    with pytest.raises(ValueError, match="hints differ in shape"):
        hint_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_alone_it_is_a_hint_stage_that_runs_nothing_after_the_hint():
    student, teacher = SmallCNN(4), SmallCNN(8)
    d = Distillation(student, teacher, losses=[FitNets()]).bind(images())
    calls = [counted(model, ["stage1", "stage2", "stage3", "linear"]) for model in (student, teacher)]
    d(images()).total.backward()
    for count in calls:
        assert count == {"stage1": 1, "stage2": 1, "stage3": 0, "linear": 0}
    assert student.stage1[0].weight.grad is not None
    assert student.linear.weight.grad is None
    assert d.skips_parameters


def test_beside_other_losses_everything_runs_once():
    student, teacher = SmallCNN(4), SmallCNN(8)
    batch = images(), torch.zeros(4, dtype=torch.long)
    d = Distillation(student, teacher, losses=[TaskLoss(), KD(), FitNets()]).bind(batch)
    calls = [counted(model, ["stage2", "stage3", "linear"]) for model in (student, teacher)]
    d(batch).total.backward()
    for count in calls:
        assert count == {"stage2": 1, "stage3": 1, "linear": 1}


def test_several_hints_are_summed():
    student, teacher = SmallCNN(4), SmallCNN(8)
    both, one, other = FitNets("stage1", "stage2"), FitNets("stage1", name="one"), FitNets("stage2", name="other")
    d = Distillation(student, teacher, losses=[both, one, other]).bind(images())
    one.regressors[0].load_state_dict(both.regressors[0].state_dict())
    other.regressors[0].load_state_dict(both.regressors[1].state_dict())
    losses = d(images())
    torch.testing.assert_close(losses["FitNets"], losses["one"] + losses["other"])


def test_a_hint_stage_makes_the_teachers_features_linearly_predictable():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    student = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))
    inputs = torch.randn(256, 8)

    def unexplained():
        """The part of the teacher's hint that the best linear map from the student's layer leaves."""
        with torch.no_grad():
            mine = torch.cat([student[:4](inputs), torch.ones(256, 1)], dim=1)
            theirs = teacher[:4](inputs)
            return (mine @ torch.linalg.lstsq(mine, theirs).solution - theirs).square().mean()

    before = unexplained()
    d = Distillation(student, teacher, losses=[FitNets("3")]).bind(inputs)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        d(inputs).total.backward()
        optimizer.step()
    assert unexplained() < 0.6 * before
