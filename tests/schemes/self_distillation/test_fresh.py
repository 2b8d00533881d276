"""A network once more, with first weights of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage.models import SmallCNN
from tutelage.schemes.self_distillation.fresh import fresh_network


def test_every_weight_is_drawn_anew_and_everything_else_is_as_in_a_new_network():
    network = SmallCNN(width=4)
    with torch.no_grad():
        network(torch.randn(8, 1, 28, 28))
        for p in network.parameters():
            p.add_(3)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    new = fresh_network(network, seed=1)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    reference = SmallCNN(width=4).state_dict()
    for name, value in new.state_dict().items():
        if value.is_floating_point() and value.unique().numel() > 1:  # drawn; batch-norm begins with ones and zeros
            assert not (value == before[name]).any()
            assert float(value.std()) == pytest.approx(float(reference[name].std()), rel=0.5)
        else:
            assert torch.equal(value, reference[name])


def test_the_seed_alone_decides_and_the_global_numbers_stay():
    network, state = SmallCNN(width=2), torch.get_rng_state()
    first, same, other = (fresh_network(network, seed) for seed in (5, 5, 6))
    made = fresh_network(network, 5, lambda: SmallCNN(width=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.linear.weight, same.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    again = fresh_network(network, 5, lambda: SmallCNN(width=2))
    assert torch.equal(made.linear.weight, again.linear.weight)


def test_an_outer_part_has_the_last_word():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.reset_parameters()

        def reset_parameters(self):
            nn.init.eye_(self.inner.weight)

    assert torch.equal(fresh_network(Scaled(), 0).inner.weight, torch.eye(3))


def test_attention_has_a_private_reset_and_other_parameters_are_refused():
    attention = nn.MultiheadAttention(8, 2)
    assert not (fresh_network(attention, 0).in_proj_weight == attention.in_proj_weight).any()

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.linear = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3)

    with pytest.raises(ValueError, match=r"student: '1' owns token and has no reset_parameters.*give fresh"):
        fresh_network(nn.Sequential(nn.Identity(), Prompted()), 0)
    assert isinstance(fresh_network(Prompted(), 0, Prompted), Prompted)


def test_a_function_that_gives_no_new_network_is_refused():
    network = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="fresh: expected a new network"):
        fresh_network(network, 0, lambda: network)
    with pytest.raises(TypeError, match="fresh: expected a function that makes a network, got int"):
        fresh_network(network, 0, lambda: 3)
