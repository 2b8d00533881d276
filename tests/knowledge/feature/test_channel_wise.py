from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation
from tutelage.knowledge.feature.channel_wise import ChannelWise, channel_wise
from tutelage.models import SmallCNN


def rebuilt(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float().double()


def test_value_and_gradient_of_the_authors_code():
    student, teacher = (2 * rebuilt(10, 4, 6, 8, 5)).requires_grad_(), 3 * rebuilt(11, 4, 6, 8, 5)
    value = channel_wise(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(5.923018270756411, rel=1e-9)
    assert student.grad.norm().item() == pytest.approx(0.12013376475392429, rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_is_the_loop_over_samples_channels_and_positions(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)

    def probabilities(channel):
        powers = [math.exp(v / temperature) for v in channel.flatten().tolist()]
        return [v / sum(powers) for v in powers]

    total = 0.0
    for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        total += sum(p * math.log(p / q) for p, q in zip(probabilities(t), probabilities(s), strict=True))
    assert channel_wise(student, teacher, temperature).item() == pytest.approx(temperature**2 * total / (2 * 3))


def test_a_constant_of_a_channel_does_not_count_and_its_scale_and_its_place_do():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert channel_wise(x + torch.randn(2, 3, 1, 1, dtype=torch.float64), x).abs() < 1e-14
    assert channel_wise(2 * x, x) > 0.01
    assert channel_wise(x.flip(1), x) > 0.01


def test_positions_in_another_order_and_four_copies_of_a_map_cost_the_same():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    value = channel_wise(student, teacher)
    torch.testing.assert_close(channel_wise(student.flip(2), teacher.flip(2)), value)
    torch.testing.assert_close(channel_wise(*(x.repeat(1, 1, 2, 2) for x in (student, teacher))), value)


def test_the_gradients_size_is_nearly_independent_of_a_high_temperature():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    norms = [
        torch.autograd.grad(channel_wise(student.requires_grad_(), teacher, t), student)[0].norm() for t in (20.0, 80.0)
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=0.1, atol=0)


@pytest.mark.parametrize(("mine", "theirs"), [((8, 6), (4, 6)), ((4, 4), (8, 2))])
def test_the_larger_map_is_pooled_before_its_distribution_is_taken(mine, theirs):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, *mine), torch.randn(2, 3, *theirs)
    size = [min(a, b) for a, b in zip(mine, theirs, strict=True)]
    pooled = [F.adaptive_avg_pool2d(x, size) for x in (student, teacher)]
    torch.testing.assert_close(channel_wise(student, teacher), channel_wise(*pooled))


def test_sequences_are_maps_with_their_channels_last():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    tokens = [x.flatten(2).mT for x in (student, teacher)]
    torch.testing.assert_close(channel_wise(*tokens), channel_wise(student, teacher))


def test_refusals(bound):
    maps = torch.ones(2, 3, 4, 4)
    with pytest.raises(ValueError, match="3 channels and the teacher 5"):
        channel_wise(maps, torch.ones(2, 5, 4, 4))
    with pytest.raises(ValueError, match="same tokens"):
        channel_wise(torch.ones(2, 5, 3), torch.ones(2, 6, 3))
    with pytest.raises(ValueError, match="cannot be compared"):
        channel_wise(maps, torch.ones(3, 3, 4, 4))
    with pytest.raises(ValueError, match=r"temperature=0: expected a positive number"):
        channel_wise(maps, maps, 0)
    with pytest.raises(ValueError, match="ChannelWise: temperature=-1"):
        ChannelWise(temperature=-1)
    with pytest.raises(ValueError, match=r"\(2, 10\) \(student\)"):
        Distillation(SmallCNN(4), SmallCNN(4), losses=[ChannelWise("@logits")]).bind(torch.randn(2, 1, 16, 16))


def test_the_projector_is_there_where_channels_differ_learns_and_stays_out_of_the_student():
    torch.manual_seed(0)
    inputs = torch.randn(4, 1, 16, 16)
    equal, unequal = ChannelWise(name="equal"), ChannelWise(name="unequal")
    Distillation(SmallCNN(6), SmallCNN(6), losses=[equal]).bind(inputs)
    assert not list(equal.parameters())
    student = SmallCNN(4)
    keys = set(student.state_dict())
    d = Distillation(student, SmallCNN(6), losses=[unequal]).bind(inputs)
    d(inputs).total.backward()
    assert unequal.pairs == [("stage3", "stage3")]
    (weight,) = unequal.parameters()
    assert weight.shape == (24, 16, 1, 1)
    assert weight.grad.abs().sum() > 0
    assert {id(weight)} <= {id(p) for p in d.parameters()}
    assert set(student.state_dict()) == keys
    other = Distillation(SmallCNN(4), SmallCNN(6), losses=[ChannelWise(name="unequal")]).bind(inputs)
    other.load_state_dict(d.state_dict())
    torch.testing.assert_close(other.losses["unequal"].projectors[0].weight, weight)
    assert (equal.weight, equal.temperature) == (50, 4)


def test_dense_logits_are_channels_of_classes_and_several_taps_are_summed(bound):
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(1, n, 3), nn.ReLU(), nn.Conv2d(n, 5, 1)) for n in (4, 6))
    inputs = torch.randn(3, 1, 8, 8)
    both = ChannelWise("1", "@logits")
    d = Distillation(student, teacher, losses=[both]).bind(inputs)
    logits = channel_wise(student(inputs), teacher(inputs))
    features = channel_wise(both.projectors[0](student[:2](inputs)), teacher[:2](inputs))
    torch.testing.assert_close(d(inputs)["ChannelWise"], logits + features)


def test_a_float64_map_stays_float64(bound):
    student, teacher = torch.randn(3, 4, 5, 5).double(), torch.randn(3, 6, 4, 4).double()
    assert bound(ChannelWise(), student, teacher)(student, teacher).dtype == torch.float64


def test_training_puts_unseen_images_activity_where_the_teachers_is(lessons):
    alone, taught = lessons.student(), lessons.student(ChannelWise("stage2", weight=10.0))
    measure = ChannelWise("stage2")
    assert lessons.distance(taught, measure) < 0.9 * lessons.distance(alone, measure)
