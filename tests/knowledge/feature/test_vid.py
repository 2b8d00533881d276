from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tutelage import Distillation
from tutelage.knowledge.feature.vid import FLOOR, VID, variational_information
from tutelage.models import SmallCNN


def rebuilt(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float().double()


def images(count=4):
    torch.manual_seed(0)
    return torch.randn(count, 1, 16, 16)


def test_value_and_gradients_of_the_crd_studys_code(bound):
    student, teacher = rebuilt(10, 4, 6, 8, 8).requires_grad_(), rebuilt(11, 4, 5, 4, 4)
    vid = VID()
    call = bound(vid, student.detach(), teacher)
    with torch.no_grad():
        for i, parameter in enumerate(vid.regressors.parameters()):
            parameter.copy_(rebuilt(20 + i, *parameter.shape) / 3)
        vid.raw_variances[0].copy_(rebuilt(30, 5))
    value = call(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0.684727517952615, rel=1e-9)
    assert student.grad.norm().item() == pytest.approx(0.009285205014001513, rel=1e-9)
    assert vid.raw_variances[0].grad.norm().item() == pytest.approx(0.2706507620856921, rel=1e-9)


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 5), 1), ((2, 7, 3), 2), ((6, 3), 1)])
def test_is_the_negative_log_density_of_a_gaussian_without_its_constant(shape, axis):
    torch.manual_seed(0)
    mean, teacher = torch.randn(2, *shape, dtype=torch.float64)
    variance = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    spread = variance.sqrt().reshape([3 if i == axis else 1 for i in range(len(shape))])
    density = torch.distributions.Normal(mean, spread.expand(shape)).log_prob(teacher)
    expected = -density.mean() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(variational_information(mean, teacher, variance), expected)


def test_the_best_variance_is_the_mean_squared_error_and_the_best_mean_the_teachers():
    torch.manual_seed(0)
    mean, teacher = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    error = (mean - teacher).square().mean((0, 2, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(variational_information(mean, teacher, error), error)
    assert gradient.abs().max() < 1e-15
    exact = variational_information(teacher, teacher, error.detach())
    torch.testing.assert_close(exact, 0.5 * error.detach().log().mean())
    assert exact < variational_information(mean, teacher, error.detach())


def test_regressors_are_those_that_were_published_and_variances_start_at_five():
    vid = VID()
    Distillation(SmallCNN(4), SmallCNN(6), losses=[vid]).bind(images())
    assert vid.pairs == [("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "stage3")]
    for regressor, (mine, theirs) in zip(vid.regressors, [(4, 6), (8, 12), (16, 24)], strict=True):
        assert [type(m) for m in regressor] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]
        assert [p.shape for p in regressor.parameters()] == [
            (theirs, mine, 1, 1),
            (theirs, theirs, 1, 1),
            (theirs, theirs, 1, 1),
        ]
    for channels, variance in zip((6, 12, 24), vid.variances(), strict=True):
        torch.testing.assert_close(variance, torch.full((channels,), 5.0))
    assert vid.weight == 1


@pytest.mark.parametrize("variance", [2 * FLOOR, 0.3, 1e4])
def test_the_variance_before_training_is_the_one_asked_for(bound, variance):
    vid = VID(variance=variance)
    bound(vid, torch.randn(3, 4).double(), torch.randn(3, 6).double())
    assert vid.variances()[0].dtype == torch.float64
    torch.testing.assert_close(vid.variances()[0], torch.full((6,), variance, dtype=torch.float64), rtol=1e-9, atol=0)


def test_variances_are_parameters_learn_are_saved_and_stay_out_of_the_student():
    torch.manual_seed(0)
    student = SmallCNN(4)
    keys = set(student.state_dict())
    vid = VID("stage2")
    d = Distillation(student, SmallCNN(6), losses=[vid]).bind(images())
    assert {id(p) for p in vid.raw_variances} <= {id(p) for p in d.parameters()}
    optimizer = torch.optim.Adam(d.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        d(images()).total.backward()
        optimizer.step()
    assert (vid.variances()[0] < 4.95).all()
    assert set(student.state_dict()) == keys
    again = VID("stage2")
    other = Distillation(SmallCNN(4), SmallCNN(6), losses=[again]).bind(images())
    other.load_state_dict(d.state_dict())
    torch.testing.assert_close(again.variances()[0], vid.variances()[0])


def test_a_channel_that_cannot_be_predicted_ends_with_a_larger_variance():
    torch.manual_seed(0)
    student, known = nn.Linear(4, 3), torch.randn(128, 4)
    teacher = nn.Linear(4, 2)
    with torch.no_grad():
        teacher.weight.zero_()
        teacher.weight[0, 0] = 1.0
    teacher.register_forward_hook(lambda _, __, out: torch.cat([out, 2 * torch.randn(len(out), 1)], dim=1))
    # a head after the tapped layer, as in every network
    models = nn.Sequential(student, nn.Linear(3, 2)), nn.Sequential(teacher, nn.Identity())
    vid = VID("0")
    d = Distillation(*models, losses=[vid]).bind(known)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        d(known).total.backward()
        optimizer.step()
    predicted, _, noise = vid.variances()[0].detach().tolist()
    assert predicted < 0.05
    assert noise == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize(("mine", "theirs"), [((2, 3, 8, 6), (2, 5, 4, 6)), ((2, 3, 4, 4), (2, 5, 4, 8))])
def test_maps_of_different_sizes_meet_at_the_smaller_before_the_regressor(bound, mine, theirs):
    torch.manual_seed(0)
    student, teacher = torch.randn(mine), torch.randn(theirs)
    vid = VID()
    value = bound(vid, student, teacher)(student, teacher)
    size = [min(a, b) for a, b in zip(mine[2:], theirs[2:], strict=True)]
    s, t = (nn.functional.adaptive_avg_pool2d(x, size) for x in (student, teacher))
    torch.testing.assert_close(value, variational_information(vid.regressors[0](s), t, vid.variances()[0]))


@pytest.mark.parametrize("shape", [(4,), (7, 4)])
def test_vectors_and_sequences_have_a_linear_regressor(bound, shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, *shape), torch.randn(3, *shape[:-1], 6)
    vid = VID()
    value = bound(vid, student, teacher)(student, teacher)
    assert isinstance(vid.regressors[0], nn.Linear)
    predicted = vid.regressors[0](student)
    torch.testing.assert_close(value, variational_information(predicted, teacher, vid.variances()[0]))


def test_the_last_features_may_predict_the_teachers_logits_beside_the_stages():
    vid = VID("stage3", ("linear:input", "@logits"))
    d = Distillation(SmallCNN(4, num_classes=3), SmallCNN(6, num_classes=5), losses=[vid]).bind(images())
    assert [len(v) for v in vid.variances()] == [24, 5]
    assert (vid.regressors[1].in_features, vid.regressors[1].out_features) == (16, 5)
    assert d(images()).total.isfinite()


def test_the_gradient_reaches_the_student_the_regressor_and_the_variance_and_not_the_teacher(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 5, 5, requires_grad=True), torch.randn(3, 6, 5, 5, requires_grad=True)
    vid = VID()
    bound(vid, student.detach(), teacher.detach())(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in vid.parameters())
    assert teacher.grad is None


def test_refusals(bound):
    with pytest.raises(ValueError, match=r"prediction is \(2, 3\) and the teacher's layer \(2, 4\)"):
        variational_information(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"variance of shape \(1,\): expected one for each of the 3 channels"):
        variational_information(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.ones(1))
    with pytest.raises(ValueError, match="7 tokens and the teacher 9"):
        bound(VID(), torch.randn(2, 7, 4), torch.randn(2, 9, 4))
    with pytest.raises(ValueError, match="same number of axes"):
        bound(VID(), torch.randn(2, 4), torch.randn(2, 9, 4, 4))
    with pytest.raises(ValueError, match=r"VID: variance=0: expected a number above 1e-05"):
        VID(variance=0)


def test_training_makes_the_teachers_stage_more_likely_on_unseen_images(lessons):
    def vid():
        return VID("stage2", variance=0.3, weight=3.0)

    alone, taught = lessons.student(), lessons.student(vid())
    assert lessons.distance(taught, vid()) < lessons.distance(alone, vid()) - 0.05
