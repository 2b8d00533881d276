from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tutelage.connectors import match_size, projector

side = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(a=st.tuples(side, side), b=st.tuples(side, side))
def test_both_maps_come_to_the_smaller_size_of_each_axis(a, b):
    student, teacher = torch.randn(2, 3, *a), torch.randn(2, 5, *b)
    s, t = match_size(student, teacher)
    assert s.shape == (2, 3, min(a[0], b[0]), min(a[1], b[1]))
    assert t.shape == (2, 5, *s.shape[2:])
    # an average stays within what it averages, and equal sizes are not touched
    assert s.max() <= student.max() + 1e-6
    assert t.min() >= teacher.min() - 1e-6
    if a == b:
        assert s is student
        assert t is teacher


def test_pooling_is_the_mean_over_windows():
    x = torch.arange(32.0).reshape(1, 1, 4, 8)
    pooled, _ = match_size(x, torch.zeros(1, 1, 2, 4))
    assert torch.equal(pooled, x.reshape(1, 1, 2, 2, 4, 2).mean((3, 5)))
    assert pooled.mean() == x.mean()


@pytest.mark.parametrize(
    ("mine", "theirs", "kind"),
    [
        ((2, 4, 8, 8), (2, 6, 4, 4), nn.Conv2d),
        ((2, 7, 4), (2, 7, 6), nn.Linear),
        ((2, 4), (2, 6), nn.Linear),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_projector_maps_channels_at_every_position_alike(mine, theirs, kind, bias):
    layer = projector(mine, theirs, bias=bias)
    assert type(layer) is kind
    assert (layer.bias is not None) == bias
    x = torch.randn(mine)
    y = layer(x)
    axis = 1 if len(mine) == 4 else -1
    assert y.shape[axis] == theirs[axis]
    # the same linear map of the channel vector everywhere
    rows = x.movedim(axis, -1).reshape(-1, 4)
    expected = nn.functional.linear(rows, layer.weight.reshape(6, 4), layer.bias)
    torch.testing.assert_close(y.movedim(axis, -1).reshape(-1, 6), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mine", "theirs"), [((2, 4), (2, 4, 1, 1)), ((4,), (4,)), ((2, 4, 8), (2, 4))])
def test_shapes_that_cannot_be_projected_are_named(mine, theirs):
    with pytest.raises(ValueError, match="same number of axes") as error:
        projector(mine, theirs)
    assert str(mine) in str(error.value)
    assert str(theirs) in str(error.value)


def test_volumes_are_refused_rather_than_projected_along_their_width():
    with pytest.raises(ValueError, match="axes"):
        projector((2, 4, 3, 5, 5), (2, 6, 3, 5, 5))
