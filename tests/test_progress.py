from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tutelage.distillation import Losses
from tutelage.progress import Meter, NonFiniteLoss

X = torch.ones(4, 3)
IDS = torch.arange(10, 14)


def losses(weights=None, total=0.0, **values):
    weights = dict.fromkeys(values, 1.0) | (weights or {})
    return Losses(torch.tensor(total), {n: torch.tensor(v) for n, v in values.items()}, weights)


def meter(**options):
    return Meter(100, visible=False, **options)


def test_means_of_what_was_added():
    m = meter()
    for a, b in ((1.0, 10.0), (2.0, 20.0), (6.0, 30.0)):
        m.add(losses({"a": 2.0, "b": 0.5}, a=a, b=b), X, True)
    assert m.look() == pytest.approx({"loss": 16.0, "a": 3.0, "b": 20.0})
    assert m.look() == {}
    m.add(losses({"a": 2.0, "b": 0.5}, a=7.0, b=0.0), X, True)
    assert m.look() == pytest.approx({"loss": 14.0, "a": 7.0, "b": 0.0})
    assert m.averages() == pytest.approx({"loss": 15.5, "a": 4.0, "b": 15.0})
    assert m.averages() == {}


def test_when_one_looks_does_not_change_the_averages():
    values = torch.rand(50).tolist()

    def averages(looks):
        m = meter()
        for i, value in enumerate(values):
            m.add(losses(a=value), X, True)
            if i in looks:
                m.look()
        return m.averages()

    assert averages({}) == averages({3, 4, 17}) == averages(set(range(50)))


def test_an_epochs_sums_can_be_carried_on():
    whole = meter()
    sums = {}
    first = meter(sums=sums)
    for value in (0.1, 0.2):
        for m in (whole, first):
            m.add(losses(a=value), X, True)
    first.look()
    assert sums == {"loss": [pytest.approx(0.3), 2], "a": [pytest.approx(0.3), 2]}
    second = meter(done=2, sums={n: list(s) for n, s in sums.items()})
    for m in (whole, second):
        m.add(losses(a=0.7), X, True)
    assert second.averages() == whole.averages()
    assert second.sums == {}


def test_a_term_counts_where_it_had_a_weight():
    m = meter()
    m.add(losses(a=1.0, b=4.0), X, True)
    m.add(losses(a=3.0), X, True)
    m.add(losses(), X, True)
    assert m.averages() == pytest.approx({"loss": 8 / 3, "a": 2.0, "b": 4.0})


def test_the_loss_is_of_the_batch_and_not_its_share_of_a_step():
    m = meter()
    for _ in range(8):
        m.add(losses({"a": 3.0}, total=0.25, a=2.0), X, False)
    assert m.averages()["loss"] == pytest.approx(6.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_is_named_with_its_batch(value):
    m = meter()
    m.add(losses(kd=1.0, task=2.0), (X, None, torch.arange(4)), True)
    m.add(losses(kd=value, task=2.0), (X, None, IDS), True)
    m.add(losses(kd=value, task=value), (X * value, None, torch.arange(4)), True)
    with pytest.raises(NonFiniteLoss) as caught:
        m.look()
    text = str(caught.value)
    assert text.startswith("loss term kd is not finite")
    assert "[10, 11, 12, 13]" in text
    assert "its inputs are finite" in text


def test_what_is_to_blame():
    def message(cost, batch):
        m = meter()
        m.add(cost, batch, True)
        with pytest.raises(NonFiniteLoss) as caught:
            m.averages()
        return str(caught.value)

    nan = float("nan")
    bad = X.clone()
    bad[2, 1] = nan
    assert "inputs contain NaN or infinite values" in message(losses(a=nan), {"x": bad, "ids": IDS})
    assert "inputs are finite" in message(losses(a=nan), {"x": X, "tokens": torch.ones(4, dtype=torch.long)})
    assert "loss term total (a weight)" in message(losses({"a": nan}, a=1.0), X)
    assert "Indexed" in message(losses(a=nan), X)
    assert "inputs" not in message(losses(a=nan), torch.ones(4, dtype=torch.long))
    many = message(losses(a=nan), (torch.ones(40, 1), None, torch.arange(40)))
    assert "15] and 24 more" in many
    assert "inputs are finite" in message(losses(a=nan), X.half() * 6e4)  # a sum in half precision would overflow


def test_batches_that_only_the_views_can_read_do_no_harm():
    m = meter()
    m.add(losses(a=1.0), [X, X, X, X, "text"], True)
    assert m.averages() == {"loss": 1.0, "a": 1.0}


def test_batches_and_graphs_are_not_kept():
    m = meter()
    batch = torch.rand(1000, 10)
    weight = torch.rand(10, requires_grad=True)
    total = (batch @ weight).sum()
    m.add(Losses(total, {"a": total.detach()}, {"a": 1.0}), batch, True)
    held = weakref.ref(batch), weakref.ref(total)
    del batch, total
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_lines_are_for_those_who_want_them(capsys):
    meter().line("quiet")
    Meter(3, visible=True).line("epoch 1")
    assert capsys.readouterr().err == "epoch 1\n"


def test_the_bar_counts_steps():
    m = meter(done=5)
    with m:
        for last in (False, True, False, True):
            m.add(losses(a=1.0), X, last)
        assert m.bar.tasks[0].completed == 7
        assert m.bar.tasks[0].total == 100
