"""Shards are disjoint, together the whole, and loaders of the same settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from tutelage.data import ArrayLoader, CropFlip, Indexed, Loaders, shard, sharded

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 6, 6), dtype=np.uint8)
DATA = TensorDataset(torch.arange(23.0).reshape(23, 1), torch.arange(23) % 3)


def ids_of(loader):
    return [int(i) for batch in loader for i in batch[-1]]


@pytest.mark.parametrize("peers", [1, 2, 3, 23])
def test_parts_are_disjoint_and_together_the_whole(peers):
    loader = DataLoader(Indexed(DATA), batch_size=4, shuffle=True)
    arrays = ArrayLoader(IMAGES, np.arange(23) % 3, batch_size=4, shuffle=True, augment=CropFlip(1), mean=0.3, std=0.4)
    for source in (loader, arrays):
        parts = [ids_of(shard(source, peer, peers)) for peer in range(peers)]
        assert sorted(i for part in parts for i in part) == list(range(23))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        again = [sorted(ids_of(shard(source, peer, peers))) for peer in range(peers)]
        assert again == [sorted(part) for part in parts]
    batches = [torch.tensor([n]) for n in range(23)]
    lists = [shard(batches, peer, peers) for peer in range(peers)]
    assert sorted(int(b) for part in lists for b in part) == list(range(23))


def test_the_division_is_random_and_follows_its_seed():
    first, other = (sorted(ids_of(shard(DataLoader(Indexed(DATA)), 0, 2, seed=seed))) for seed in (0, 1))
    assert first != other
    assert first not in (list(range(12)), list(range(0, 23, 2)))


def test_a_part_keeps_the_settings_and_leaves_the_whole_alone():
    whole = ArrayLoader(IMAGES, np.arange(23) % 3, batch_size=5, mean=0.3, std=0.4, drop_last=True)
    part = shard(whole, 1, 2)
    x, y, ids = next(iter(part))
    torch.testing.assert_close(x, torch.stack([whole.dataset[int(i)][0] for i in ids]))
    assert torch.equal(y, ids % 3)
    assert (len(part), part.drop_last, part.batch_size, len(whole.dataset)) == (2, True, 5, 23)
    loader = DataLoader(DATA, batch_size=5, shuffle=True, drop_last=True, collate_fn=list)
    mine = shard(loader, 0, 2)
    assert isinstance(next(iter(mine)), list)
    assert isinstance(mine.dataset, Subset)
    assert (len(mine), mine.batch_size) == (2, 5)
    assert isinstance(mine.sampler, type(loader.sampler))


def test_only_training_batches_are_divided():
    whole = Loaders(DataLoader(DATA), DataLoader(DATA), None)
    part = sharded(whole, peer=1, peers=2)
    assert len(part.train.dataset) == 11
    assert part.validation is whole.validation
    assert part.test is None


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match="peer=2, peers=2"):
        shard(DATA, 2, 2)
    with pytest.raises(ValueError, match="peers=24: there are only 23"):
        shard(DATA, 0, 24)
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        shard(DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 23, 23)), 0, 2)
    with pytest.raises(TypeError, match="generator"):
        shard((x for x in DATA), 0, 2)
