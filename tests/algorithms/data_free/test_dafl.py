"""DAFL: the three terms of the generator's loss, and that a step lowers it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tutelage.algorithms.data_free.dafl import DAFL, dafl_generator_loss
from tutelage.algorithms.data_free.generator import Generator
from tutelage.taps import UnknownTap


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))


def data(**arguments) -> DAFL:
    return DAFL(Generator((1, 8, 8), latent=6, width=4, tanh=True), **{"steps": 3, "batch_size": 16, **arguments})


def test_each_term_is_its_formula():
    torch.manual_seed(0)
    logits, features = 3 * torch.randn(6, 4), torch.randn(6, 3, 2)
    torch.testing.assert_close(
        dafl_generator_loss(logits, features, 1, 0, 0), F.cross_entropy(logits, logits.argmax(1))
    )
    torch.testing.assert_close(dafl_generator_loss(logits, features, 0, 1, 0), -features.abs().mean())
    mean = logits.softmax(1).mean(0)
    torch.testing.assert_close(dafl_generator_loss(logits, features, 0, 0, 1), (mean * mean.log10()).sum())
    parts = [dafl_generator_loss(logits, features, *w) for w in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    torch.testing.assert_close(dafl_generator_loss(logits, features), parts[0] + 0.1 * parts[1] + 5 * parts[2])


def test_sure_and_balanced_answers_are_the_minimum_and_one_class_for_all_is_not():
    balanced, one = 100 * torch.eye(4), 100 * torch.eye(4)[[0, 0, 0, 0]]
    features = torch.zeros(4, 2)
    assert dafl_generator_loss(balanced, features).item() == pytest.approx(-5 * math.log10(4), abs=1e-5)
    assert dafl_generator_loss(one, features).item() == pytest.approx(0, abs=1e-5)
    undecided = dafl_generator_loss(torch.zeros(4, 4), features).item()
    assert undecided == pytest.approx(math.log(4) - 5 * math.log10(4), abs=1e-5)


def test_it_does_not_depend_on_the_order_of_the_batch():
    torch.manual_seed(0)
    logits, features, order = torch.randn(9, 4), torch.randn(9, 3), torch.randperm(9)
    torch.testing.assert_close(
        dafl_generator_loss(logits[order], features[order]), dafl_generator_loss(logits, features)
    )


@pytest.mark.parametrize("logits", [torch.tensor([[500.0, -500.0, 0.0]]), torch.zeros(1, 3), torch.full((3, 3), 500.0)])
def test_extreme_logits_have_finite_values_and_gradients(logits):
    logits = logits.clone().requires_grad_()
    features = torch.zeros(len(logits), 4, requires_grad=True)
    value = dafl_generator_loss(logits, features)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(features.grad).all()


def test_half_precision_is_calculated_in_float32_and_double_stays():
    for given, result in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert dafl_generator_loss(torch.randn(3, 4).to(given), torch.randn(3, 2).to(given)).dtype == result
    with pytest.raises(ValueError, match="classes"):
        dafl_generator_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3))


def test_steps_of_the_generator_lower_its_loss_on_the_same_noise():
    torch.manual_seed(0)
    role = data(lr=1e-2)
    role.attach(network(), network())
    z = torch.randn(16, 6)
    role.noise = lambda: z
    with torch.no_grad():
        before = role.loss(role.learner(z))
        list(role)
        after = role.loss(role.learner(z))
    assert after < before


def test_the_features_are_what_the_last_linear_layer_reads_unless_an_address_is_given():
    torch.manual_seed(0)
    teacher = network()
    images = torch.randn(4, 1, 8, 8)
    role = data(one_hot=0, activation=1, entropy=0)
    role.attach(network(), teacher)
    torch.testing.assert_close(role.loss(images), -teacher[:3](images).abs().mean())
    role = data(one_hot=0, activation=1, entropy=0, features="1")
    role.attach(network(), teacher)
    torch.testing.assert_close(role.loss(images), -teacher[:2](images).abs().mean())
    with pytest.raises(UnknownTap, match="'7'"):
        data(features="7").attach(network(), teacher)


def test_the_student_is_given_the_images_from_before_the_step():
    torch.manual_seed(0)
    role = data(steps=1, lr=0.1)
    role.attach(network(), network())
    z = torch.randn(16, 6)
    role.noise = lambda: z
    with torch.no_grad():
        old = role.learner(z)
    (given,) = role
    torch.testing.assert_close(given, old)


def test_attaching_draws_no_random_numbers():
    torch.manual_seed(0)
    role, student, teacher = data(), network(), network()
    before = torch.get_rng_state()
    role.attach(student, teacher)
    assert torch.equal(before, torch.get_rng_state())
