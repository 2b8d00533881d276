"""A network's fingerprint is of its weights, structure and name, and of nothing else."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tutelage.fingerprint import fingerprint


def test_modes_and_memory_formats_do_not_count():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    other = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
    assert not other[0].weight.is_contiguous()
    assert fingerprint(network) == fingerprint(other)


def test_a_weight_a_buffer_and_a_precision_count():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    for name in ("0.weight", "1.running_mean"):
        other = copy.deepcopy(network)
        other.state_dict()[name].view(-1)[0] += 2**-10
        assert fingerprint(network) != fingerprint(other), name
    assert fingerprint(network) != fingerprint(copy.deepcopy(network).half())


def test_the_structure_and_the_name_count():
    class Other(nn.Linear):
        pass

    narrow, wide = (nn.Conv2d(2, 2, 3, stride=stride) for stride in (1, 2))
    wide.load_state_dict(narrow.state_dict())
    assert fingerprint(narrow) != fingerprint(wide)
    mine, theirs = nn.Linear(3, 2), Other(3, 2)
    theirs.load_state_dict(mine.state_dict())
    assert fingerprint(mine) != fingerprint(theirs)
