from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage import Constant, Cosine, Ramp, Stage, StopAt, TaskLoss, WarmUp
from tutelage.schedule import weight_at

part = st.floats(0.0, 1.0)
weight = st.floats(-1e4, 1e4)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(3.0), [3.0, 3.0, 3.0, 3.0, 3.0]),
        (WarmUp(2.0, until=0.5), [0.0, 1.0, 2.0, 2.0, 2.0]),
        (WarmUp(2.0, until=0.0), [2.0, 2.0, 2.0, 2.0, 2.0]),
        (WarmUp(4.0, until=1.0), [0.0, 1.0, 2.0, 3.0, 4.0]),
        (Ramp(1.0, 0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (Cosine(2.0, 0.0), [2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0]),
        (StopAt(1.5, at=0.75), [1.5, 1.5, 1.5, 0.0, 0.0]),
        (StopAt(1.5, at=0.0), [0.0, 0.0, 0.0, 0.0, 0.0]),
        (lambda p: 10 * p, [0.0, 2.5, 5.0, 7.5, 10.0]),
        (0.9, [0.9, 0.9, 0.9, 0.9, 0.9]),
        (3, [3.0, 3.0, 3.0, 3.0, 3.0]),
    ],
)
def test_values_along_the_training(schedule, values):
    assert [weight_at(schedule, p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(values)
    assert all(type(weight_at(schedule, p)) is float for p in (0.0, 1.0))


@given(start=weight, end=weight, p=st.floats(-1.0, 2.0))
def test_ramps_and_cosines_stay_between_their_ends(start, end, p):
    low, high = min(start, end), max(start, end)
    for schedule in (Ramp(start, end), Cosine(start, end)):
        slack = 1e-9 * max(abs(start), abs(end))
        assert low - slack <= schedule(p) <= high + slack
        assert schedule(0.0) == pytest.approx(start)
        assert schedule(1.0) == pytest.approx(end, abs=1e-9 * (1 + abs(start)))


@given(w=st.floats(0.0, 1e4), until=part, p=part, q=part)
def test_a_warm_up_never_falls_and_a_stop_never_rises(w, until, p, q):
    p, q = min(p, q), max(p, q)
    assert 0.0 <= WarmUp(w, until)(p) <= WarmUp(w, until)(q) <= w
    assert w >= StopAt(w, until)(p) >= StopAt(w, until)(q) >= 0.0


@pytest.mark.parametrize("wrong", [-0.1, 1.1, 20, float("nan")])
def test_a_part_of_the_training_lies_between_0_and_1(wrong):
    with pytest.raises(ValueError, match=r"until=.*between 0 and 1"):
        WarmUp(1.0, until=wrong)
    with pytest.raises(ValueError, match=r"at=.*between 0 and 1"):
        StopAt(1.0, at=wrong)


def test_a_loss_follows_its_schedule():
    assert [TaskLoss(weight=Ramp(0.0, 2.0)).weight_at(p) for p in (0.0, 0.5, 1.0)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("wrong", ["1", None, float("nan"), [1.0]])
def test_what_is_no_weight_is_refused(wrong):
    with pytest.raises(TypeError, match=r"weight=.*expected a number or a schedule"):
        TaskLoss(weight=wrong)


def test_a_stage_says_how_long_and_how_fast():
    stage = Stage([TaskLoss()], epochs=3, lr=0.1, name="hint")
    assert (stage.epochs, stage.lr, stage.name) == (3, 0.1, "hint")
    assert Stage([TaskLoss()], epochs=1).lr is None
