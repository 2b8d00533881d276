"""Depthwise-separable students: the nearest ones to the teacher's convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage import Separable
from tutelage.architecture.separable import separable_factors
from tutelage.models import SmallCNN, resnet8


def test_the_fit_is_the_best_one():
    """No gradient is left at it, and a naive alternating least squares ends there from anywhere."""
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3)
    depthwise, pointwise = separable_factors(weight)
    error = (pointwise * depthwise.transpose(0, 1) - weight).square().sum()
    d, p = torch.randn(4, 9), torch.randn(6, 4)
    rows = weight.flatten(2)
    for _ in range(500):
        p = torch.einsum("oik,ik->oi", rows, d) / d.square().sum(1)
        d = torch.einsum("oik,oi->ik", rows, p) / p.square().sum(0)[:, None]
    naive = (torch.einsum("oi,ik->oik", p, d) - rows).square().sum()
    torch.testing.assert_close(error, naive, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "old",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2), padding_mode="circular"),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        nn.Conv1d(4, 6, 5, stride=2, padding=2),
        nn.Conv3d(4, 6, 3, padding=1),
    ],
    ids=lambda layer: str(layer)[:12],
)
def test_a_convolution_that_is_separable_already_is_reproduced(old):
    torch.manual_seed(0)
    with torch.no_grad():
        depthwise, pointwise = torch.randn(1, *old.weight.shape[1:]), torch.randn(*old.weight.shape[:2])
        old.weight.copy_(pointwise.reshape(*pointwise.shape, *(1 for _ in old.kernel_size)) * depthwise)
    network = nn.Sequential(type(old)(4, 4, 1), old).eval()
    x = torch.randn(2, 4, *(10 for _ in old.kernel_size))
    student, structure = Separable().derive(network, x)
    assert structure["layers"]["1"] == pytest.approx(0, abs=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(x), network(x), rtol=1e-4, atol=1e-5)


def test_what_is_replaced_and_what_stays():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.full, self.small = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1)
            self.grouped, self.one = nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 1, 3)
            self.unused = nn.Conv2d(16, 16, 3)

        def forward(self, x):
            return self.one(self.grouped(self.small(self.full(self.stem(x))))).flatten(1)

    student, structure = Separable().derive(Mixed(), torch.randn(2, 3, 16, 16))
    assert list(structure["layers"]) == ["full"]  # of one channel out, two would be larger
    assert [type(part) for _, part in student.named_children()] == [nn.Conv2d, nn.Sequential, *4 * [nn.Conv2d]]
    assert 0 < structure["layers"]["full"] < 1


def test_kept_ones_stay_and_fresh_ones_know_nothing():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    teacher = resnet8()
    _, structure = Separable(keep=("layer1", "*.conv2")).derive(teacher, x)
    assert list(structure["layers"]) == ["layer2.0.conv1", "layer3.0.conv1"]
    fitted, fresh = Separable()(teacher, x), Separable("fresh")(teacher, x)
    assert fitted.state_dict().keys() == fresh.state_dict().keys()
    assert not torch.equal(fitted.layer1[0].conv1.pointwise.weight, fresh.layer1[0].conv1.pointwise.weight)
    assert torch.equal(fitted.linear.weight, fresh.linear.weight)
    with torch.no_grad():
        x, whole = torch.randn(8, 16, 9, 9), teacher.layer1[0].conv1
        wanted = whole(x)
        errors = [(s.layer1[0].conv1(x) - wanted).square().mean() for s in (fitted, fresh)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("builder", "said"),
    [
        (Separable("svg"), "init='svg': expected svd or fresh"),
        (Separable(keep=("stage*",)), "SmallCNN has no convolution to replace: expected one with a kernel above 1×1"),
    ],
)
def test_mistakes_are_named(builder, said):
    with pytest.raises(ValueError, match=said):
        builder(SmallCNN(width=8), torch.zeros(1, 1, 28, 28))
