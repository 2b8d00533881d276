from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage.knowledge.feature.batch_norm import BatchNorm


def test_one_value_of_a_channel_is_normalised_by_the_running_averages_which_stay():
    norm = BatchNorm(2)
    norm.running_mean.copy_(torch.tensor([1.0, -1.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    value = norm(torch.tensor([5.0, 5.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(value.flatten(), torch.tensor([2.0, 2.0]), rtol=1e-5, atol=1e-5)
    assert norm.running_mean.tolist() == [1, -1]
    assert norm.num_batches_tracked == 0
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(2)(torch.ones(1, 2, 1, 1))


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 4, 5)])
def test_otherwise_it_is_batch_norm(shape):
    torch.manual_seed(0)
    ours, plain = BatchNorm(3), nn.BatchNorm2d(3)
    for training in (True, False):
        ours.train(training), plain.train(training)
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
