from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from torch import nn

from tutelage import Training


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({}, "epochs=None, steps=None: give one of them"),
        ({"epochs": 1, "steps": 1}, "epochs=1, steps=1: give one of them"),
        ({"epochs": 0}, "epochs=0: expected a whole number, 1 or more"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"epochs": "3"}, "epochs='3'"),
        ({"steps": -1}, "steps=-1"),
        ({"epochs": 1, "accumulate": 0}, "accumulate=0"),
        ({"epochs": 1, "patience": 0}, "patience=0"),
        ({"epochs": 1, "checkpoint_every": 0}, "checkpoint_every=0"),
        ({"epochs": 1, "evaluate_every": 0}, "evaluate_every=0"),
        ({"epochs": 1, "log_every": 0}, "log_every=0"),
        ({"epochs": 1, "lr": 0}, "lr=0: expected a positive number"),
        ({"epochs": 1, "lr": math.nan}, "lr=nan"),
        ({"epochs": 1, "clip": 0.0}, "clip=0.0: expected a positive number"),
        ({"epochs": 1, "timeout": 0}, "timeout=0: expected a positive number"),
        ({"epochs": 1, "optimizer": "adamW2"}, "optimizer='adamW2': expected one of sgd, adamw or a function.*'adamw'"),
        ({"epochs": 1, "scheduler": "cosin"}, "scheduler='cosin'.*'cosine'"),
        ({"epochs": 1, "precision": "bf-16"}, "precision='bf-16': expected one of no, bf16, fp16.*'bf16'"),
        ({"epochs": 1, "monitor": "acc"}, "monitor='acc'.*'accuracy'"),
    ],
)
def test_wrong_settings_are_named(wrong, match):
    with pytest.raises(ValueError, match=match):
        Training(**wrong)


def test_an_unknown_setting_gets_its_nearest_name():
    with pytest.raises(TypeError, match="no training setting is called 'epoch'; nearest: 'epochs'"):
        Training.of(epoch=3)
    assert Training.of(steps=3, lr=1.0) == Training(steps=3, lr=1.0)


@pytest.mark.parametrize("monitor", ["accuracy", "top5", "macro_f1", "agreement", "nll", "ece", "teacher_kl"])
def test_what_is_better(monitor):
    training = Training(epochs=1, monitor=monitor)
    higher = monitor not in ("nll", "ece", "teacher_kl")
    assert training.better(0.3, None)
    assert training.better(0.4, 0.3) is higher
    assert training.better(0.2, 0.3) is not higher
    assert not training.better(0.3, 0.3)
    assert not training.better(math.nan, 0.3)
    assert training.better(0.3, math.nan)


def test_how_many_steps():
    assert Training(steps=7).total_steps(None) == Training(steps=7).total_steps(3) == 7
    assert Training(epochs=3).total_steps(5) == 15
    assert Training(epochs=3, accumulate=2).total_steps(5) == 9
    with pytest.raises(ValueError, match="train has no length: give steps instead of epochs"):
        Training(epochs=3).total_steps(None)


def parameters():
    return nn.Linear(2, 2).parameters()


def test_named_optimisers():
    sgd = Training(epochs=1, lr=0.3, momentum=0.8, weight_decay=0.01).make_optimizer(parameters())
    assert type(sgd) is torch.optim.SGD
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.3, 0.8, 0.01, True)
    plain = Training(epochs=1, momentum=0.0).make_optimizer(parameters())
    assert not plain.param_groups[0]["nesterov"]
    adamw = Training(epochs=1, optimizer="adamw", lr=0.3, weight_decay=0.01).make_optimizer(parameters())
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (0.3, 0.01)
    made = Training(epochs=1, optimizer=functools.partial(torch.optim.RMSprop, lr=0.7)).make_optimizer(parameters())
    assert type(made) is torch.optim.RMSprop
    assert made.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize("name", ["cosine", "step", "onecycle", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_named_schedulers_last_exactly_as_long_as_the_training(name, steps):
    training = Training(steps=steps, scheduler=name, lr=0.1)
    optimizer = training.make_optimizer(parameters())
    scheduler = training.make_scheduler(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    end = optimizer.param_groups[0]["lr"]
    assert all(0 < rate <= 0.1 + 1e-9 for rate in rates)
    if name == "cosine":
        assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)])
        assert end == pytest.approx(0, abs=1e-9)
    elif name == "constant":
        assert {*rates, end} == {0.1}
    elif name == "step" and steps == 100:
        assert [rates.count(r) for r in sorted(set(rates), reverse=True)] == [62, 13, 13, 12]
    elif name == "onecycle":
        assert end < 1e-5


def test_the_description_is_plain():
    class Own:
        def __call__(self, optimizer):
            raise NotImplementedError

    training = Training(epochs=3, optimizer=functools.partial(torch.optim.SGD, lr=0.5), scheduler=Own())
    about = json.loads(json.dumps(training.description()))
    assert about["optimizer"] == "SGD(lr=0.5)"
    assert about["scheduler"] == "Own"
    assert about["epochs"] == 3
    assert about["patience"] is None
