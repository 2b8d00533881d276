"""Replayed augmentation is a function of sample, view and seed alone, whoever reads it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from tutelage.data import ArrayLoader, CropFlip, Indexed, Loaders, Replayed, replayed, replayed_loaders
from tutelage.data.keyed import drawing, keys_of, uniform
from tutelage.data.shards import shard
from tutelage.run import seed_epoch

IMAGES = np.random.default_rng(0).integers(1, 256, (30, 6, 6, 1), dtype=np.uint8)
LABELS = np.arange(30) % 3


class Drawn(Dataset):
    """Items that say what each global generator gave while they were read."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002
        return torch.tensor([float(index), *drawn], dtype=torch.float64), index % 3


def seen(loader, epoch):
    """What each sample showed in an epoch, by id."""
    seed_epoch(11, epoch, loader)
    found = {}
    for batch in loader:
        assert (batch.replay.view == epoch % batch.replay.views).all()
        for number, row, label in zip(batch.ids.tolist(), batch.student.args[0], batch.labels.tolist(), strict=True):
            assert number not in found
            found[number] = (row, label)
    return found


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[n][0], second[n][0]) and first[n][1] == second[n][1] for n in first
    )


def loader(workers=0, shuffle=True, size=6, seed=3, views=2, data=None):
    plain = DataLoader(data or Drawn(), batch_size=size, shuffle=shuffle, num_workers=workers)
    return replayed(plain, views, seed)


def test_every_worker_order_and_batch_size_shows_the_same():
    whole = [seen(loader(), epoch) for epoch in range(3)]
    assert sorted(whole[0]) == list(range(20))
    assert same(whole[0], whole[2])
    assert not any(torch.equal(whole[0][n][0], whole[1][n][0]) for n in whole[0])
    for other in (loader(workers=2), loader(shuffle=False), loader(size=7)):
        for epoch in (0, 1):
            assert same(seen(other, epoch), whole[epoch])
    assert not same(seen(loader(seed=4), 0), whole[0])


def test_workers_that_stay_show_the_view_of_each_epoch():
    plain = DataLoader(Drawn(), batch_size=6, num_workers=2, persistent_workers=True)
    kept = replayed(plain, 3, 3)
    for epoch in (0, 1, 2, 3):
        assert same(seen(kept, epoch), seen(loader(views=3), epoch))


def test_the_order_is_the_loaders_own_and_its_generators_are_left_alone():
    plain = DataLoader(Drawn(), batch_size=6, shuffle=True)
    seed_epoch(5, 0, plain)
    order = [label for _, labels in plain for label in labels.tolist()]
    again = loader()
    seed_epoch(5, 0, again)
    assert [label for batch in again for label in batch.labels.tolist()] == order
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    Replayed(Drawn())[3, 1]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_sample_has_one_number_in_every_part():
    part = Subset(Subset(Indexed(Drawn()), range(4, 16)), [0, 3, 7])
    found, whole = seen(loader(data=part, size=2), 1), seen(loader(), 1)
    assert sorted(found) == [4, 7, 11]
    assert all(torch.equal(found[n][0], whole[n][0]) for n in found)
    with pytest.raises(ValueError, match=r"ids: the items bring \[.*Subset of Indexed"):
        seen(loader(data=Strange(), size=20), 0)


class Strange(Drawn):
    def __getitem__(self, index):
        return (*super().__getitem__(index), 100 + index)


def test_a_samplers_own_generator_is_seeded_by_the_epoch():
    data = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20))

    def order(generator):
        sampler = RandomSampler(data, generator=generator)
        made = replayed(DataLoader(data, batch_size=5, sampler=sampler), 1)
        seed_epoch(2, 1, made)
        return [i for batch in made for i in batch.ids.tolist()]

    assert order(torch.Generator().manual_seed(1)) == order(torch.Generator().manual_seed(9))


def arrays(augment=None, shuffle=True, views=2, seed=3, **options):
    plain = ArrayLoader(IMAGES, LABELS, batch_size=8, shuffle=shuffle, augment=augment or CropFlip(2), **options)
    return replayed(plain, views, seed)


def test_arrays_show_the_same_in_every_order_rank_and_part():
    whole = [seen(arrays(), epoch) for epoch in range(3)]
    assert same(whole[0], whole[2])
    differ = sum(not torch.equal(whole[0][n][0], whole[1][n][0]) for n in whole[0])
    assert differ > 25
    assert same(seen(arrays(shuffle=False), 1), whole[1])
    ranks = {**seen(arrays(rank=0, world_size=2), 1), **seen(arrays(rank=1, world_size=2), 1)}
    assert same(ranks, whole[1])
    part = seen(shard(arrays(), 0, 3), 1)
    assert len(part) == 10
    assert all(torch.equal(part[n][0], whole[1][n][0]) for n in part)


def test_a_crop_of_a_key_is_a_crop_and_all_of_them_are_equally_likely():
    images = torch.from_numpy(IMAGES[:1]).permute(0, 3, 1, 2).expand(4000, 1, 6, 6)
    keys = keys_of(0, np.arange(4000), np.zeros(4000, int))
    found = CropFlip(1).replay(images, keys)
    padded = torch.nn.functional.pad(images[:1], (1, 1, 1, 1))
    options = [padded[0, :, r : r + 6, c : c + 6] for r in range(3) for c in range(3)]
    options += [option.flip(2) for option in options]
    counts = [int((found == option).flatten(1).all(1).sum()) for option in options]
    assert sum(counts) == 4000
    expected = 4000 / 18
    assert sum((n - expected) ** 2 / expected for n in counts) < 40.8  # χ² of 17 degrees of freedom, 0.1 %
    assert torch.equal(CropFlip(0, flip=False).replay(images, keys), images)


def test_any_other_augmentation_is_replayed_one_image_at_a_time():
    def noisy(images):
        return (images.float() * torch.rand(len(images), 1, 1, 1)).to(torch.uint8)

    first, again = (seen(arrays(noisy, shuffle=shuffle), 1) for shuffle in (True, False))
    assert same(first, again)
    assert not same(first, seen(arrays(noisy), 0))


def test_draws_are_uniform_and_independent():
    keys = keys_of(1, np.repeat(np.arange(500), 20), np.tile(np.arange(20), 500))
    assert len(np.unique(keys)) == 10_000
    draws = np.stack([uniform(keys, n) for n in range(3)])
    assert draws.min() >= 0
    assert draws.max() < 1
    for row in draws:
        counts = np.histogram(row, 20, (0, 1))[0]
        assert ((counts - 500) ** 2 / 500).sum() < 43.8  # χ² of 19 degrees of freedom, 0.1 %
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.04
    assert abs(np.corrcoef(draws[0, :-1], draws[0, 1:])[0, 1]) < 0.04


def test_drawing_ends_also_with_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), drawing(2**64 - 1):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_replayed_is_refused():
    plain = DataLoader(Drawn(), batch_size=4)
    for bad, match in (({"views": 0}, "views=0: expected 1"), ({"seed": -1}, "seed=-1: expected a whole")):
        with pytest.raises(ValueError, match=match):
            replayed(plain, **bad)
        with pytest.raises(ValueError, match=match):
            replayed(ArrayLoader(IMAGES, batch_size=4), **bad)
    with pytest.raises(ValueError, match="ids=False"):
        replayed(ArrayLoader(IMAGES, batch_size=4, ids=False))
    with pytest.raises(ValueError, match="batch sampler"):
        replayed(DataLoader(Drawn(), batch_sampler=[[0, 1], [2]]))
    with pytest.raises(TypeError, match="got list"):
        replayed_loaders(Loaders([1]))
    with pytest.raises(TypeError, match="got int"):
        Replayed(3)
