"""Keys of a cache: one place for a view of a sample, one augmentation for a key, one fingerprint for a network."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from tutelage import KD, Cached, Distillation
from tutelage.cache_files import Rows
from tutelage.data import ArrayLoader, CropFlip, replayed
from tutelage.data.keyed import drawing, keys_of, uniform
from tutelage.data.replayed import Replayed
from tutelage.fingerprint import fingerprint
from tutelage.views import read_batch

often = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
seldom = settings(often, max_examples=15)
ids = st.integers(0, 2**40)
seeds = st.integers(0, 2**32 - 1)


# Places and keys


@often
@given(st.sets(st.tuples(ids, st.integers(0, 99)), min_size=2, max_size=60), st.integers(100, 200), seeds)
def test_different_views_of_samples_have_different_keys_and_places(pairs, views, seed):
    numbers, view = (np.array(part) for part in zip(*sorted(pairs), strict=True))
    places = numbers * views + view  # where a cache keeps them
    assert len(set(places.tolist())) == len(pairs)
    keys = keys_of(seed, numbers, view)
    assert len(set(keys.tolist())) == len(pairs)
    order = np.random.default_rng(0).permutation(len(pairs))
    assert np.array_equal(keys_of(seed, numbers[order], view[order]), keys[order])


def test_a_million_neighbouring_keys_are_all_different():
    """The numbers that occur: samples counted from 0, few views. Of 2⁶⁴ random keys, 10⁶ collide once in 37 million."""
    numbers, view = (part.reshape(-1) for part in np.meshgrid(np.arange(125_000), np.arange(8)))
    assert len(np.unique(keys_of(0, numbers, view))) == 10**6
    draws = uniform(keys_of(0, numbers, view), 0)
    assert abs(draws.mean() - 0.5) < 5 / math.sqrt(12 * 10**6)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5e-3


@often
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True), st.integers(1, 7), st.data())
def test_rows_are_found_by_their_key_in_whatever_order_they_were_written(tmp_path_factory, keys, per_shard, data):
    folder = tmp_path_factory.mktemp("rows")
    rows = Rows(folder, "a", [("x", "<i8", ())], salt=3, per_shard=per_shard)
    order = data.draw(st.permutations(keys))
    cut = data.draw(st.integers(0, len(keys)))
    for part in (order[:cut], order[cut:], order[: cut // 2]):  # the last is there already
        records = rows.empty(len(part))
        records["x"] = [7 * key + 1 for key in part]
        rows.write(np.array(part, np.int64), records)
    asked = np.array(data.draw(st.permutations([*keys, 10**6 + 1])), np.int64)
    found, there = Rows(folder, "a", [("x", "<i8", ())], salt=3, per_shard=per_shard).read(asked)
    assert there.tolist() == [key in keys for key in asked.tolist()]
    assert found["x"][there].tolist() == [7 * key + 1 for key in asked.tolist() if key in keys]


# Augmentation


@often
@given(st.integers(0, 2**64 - 1))
def test_what_is_drawn_is_a_function_of_the_key_and_leaves_the_generators(key):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    drawn = []
    for _ in range(2):
        with drawing(key):
            drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    with drawing(key ^ 1):
        other = torch.rand(3).tolist(), np.random.rand(3).tolist()  # noqa: NPY002
    assert drawn[0][0] != other[0]
    assert drawn[0][1] != other[1]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


class Noisy(Dataset):
    """Draws from torch's and NumPy's generators, as users' transforms do."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(2) + index + np.random.rand(), index % 3  # noqa: NPY002


@seldom
@given(st.integers(3, 20), st.integers(1, 4), seeds, st.data())
def test_an_array_of_images_is_augmented_the_same_in_every_order_batch_and_epoch(count, views, seed, data):
    images = np.random.default_rng(count).integers(0, 255, (count, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(count) % 3
    chosen = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True)))

    def shown(batch_size: int, epoch: int, indices: np.ndarray | None = None) -> dict[tuple[int, int], Tensor]:
        torch.manual_seed(batch_size + 17 * epoch)
        loader = ArrayLoader(images, labels, batch_size=batch_size, augment=CropFlip(2), shuffle=True, indices=indices)
        again = replayed(loader, views=views, seed=seed)
        again.set_epoch(epoch)
        found = {}
        for batch in again:
            for x, n, view in zip(batch.student.args[0], batch.ids, batch.replay.view, strict=True):
                found[int(n), int(view)] = x.clone()
        return found

    first = shown(data.draw(st.integers(1, count)), 0)
    later = shown(data.draw(st.integers(1, count)), views * data.draw(st.integers(1, 3)), chosen)
    assert set(later) == {(int(n), 0) for n in chosen}
    assert all(torch.equal(first[key], later[key]) for key in later)


@seldom
@given(st.integers(4, 24), st.integers(1, 4), seeds, st.data())
def test_items_of_a_data_set_are_the_same_in_every_part_batch_and_epoch(count, views, seed, data):
    direct = Replayed(Noisy(count), views, seed)
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=2, unique=True))
    epoch, batch_size = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 7))
    part = Subset(Noisy(count), chosen)
    loader = replayed(DataLoader(part, batch_size=batch_size, shuffle=True), views=views, seed=seed)
    loader.sampler.set_epoch(epoch)
    seen = {}
    for batch in loader:
        for x, number in zip(batch.student.args[0], batch.ids.tolist(), strict=True):
            seen[number] = x
    assert sorted(seen) == sorted(chosen)
    for number, x in seen.items():
        (expected, _), numbered, view = direct[number, epoch % views]
        assert (numbered, view) == (number, epoch % views)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_show_the_same_as_no_worker(workers):
    def shown(num_workers: int) -> dict[int, Tensor]:
        data = DataLoader(Noisy(11), batch_size=3, shuffle=True, num_workers=num_workers)
        loader = replayed(data, views=3, seed=5)
        loader.sampler.set_epoch(4)
        torch.manual_seed(num_workers)
        return {
            n: x for batch in loader for n, x in zip(batch.ids.tolist(), batch.student.args[0].clone(), strict=True)
        }

    alone, shared = shown(0), shown(workers)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[n], shared[n]) for n in alone)


# Whose outputs


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))


@often
@given(st.integers(0, 99), st.data())
def test_a_single_bit_of_the_state_changes_the_fingerprint(seed, data):
    model = network(seed)
    before = fingerprint(model)
    tensor = data.draw(st.sampled_from(list(model.state_dict().values())))
    raw = tensor.view(-1).view(torch.uint8)  # the state's own memory
    place, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 7))
    raw[place] ^= 1 << bit
    assert fingerprint(model) != before
    raw[place] ^= 1 << bit
    assert fingerprint(model) == before


@often
@given(st.integers(0, 99), st.data())
def test_mode_layout_gradients_and_copies_do_not_change_the_fingerprint(seed, data):
    model = network(seed)
    before = fingerprint(model)
    other = copy.deepcopy(model)
    for module in other.modules():
        module.training = data.draw(st.booleans())
    if data.draw(st.booleans()):
        other = other.to(memory_format=torch.channels_last)
    if data.draw(st.booleans()):
        other.requires_grad_(False)
    with torch.no_grad():
        weight = other[4].weight
        other[4].weight = nn.Parameter(weight.t().contiguous().t() if data.draw(st.booleans()) else weight.clone())
    assert fingerprint(other) == before


@often
@given(st.permutations(["weight", "bias", "scale", "table"]), st.permutations(["weight", "bias", "scale", "table"]))
def test_the_order_of_the_state_does_not_change_the_fingerprint(one, two):
    class Loose(nn.Module):
        def __init__(self, order):
            super().__init__()
            for name in order:
                value = torch.full((3,), float(len(name) + ord(name[0])))
                if name == "table":
                    self.register_buffer(name, value)
                else:
                    self.register_parameter(name, nn.Parameter(value))

    assert fingerprint(Loose(one)) == fingerprint(Loose(two))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.double(),
        lambda m: nn.Sequential(OrderedDict((f"n{i}", part) for i, part in enumerate(m))),
        lambda m: m.__setitem__(2, nn.Dropout(0.4)) or m,
        lambda m: m.append(nn.Identity()),
        lambda m: m.__setitem__(1, nn.BatchNorm2d(4, eps=1e-3)) or m,
    ],
    ids=["dtype", "names", "rate", "layer", "epsilon"],
)
def test_another_structure_has_another_fingerprint(change):
    assert fingerprint(change(network(0))) != fingerprint(network(0))


def inputs(shift: float = 0.0) -> Tensor:
    return torch.arange(4 * 2 * 6 * 6).reshape(4, 2, 6, 6).float() / 100 + shift


def cached(folder, teacher: nn.Module, codec: str = "float32", shift: float = 0.0, **options) -> Tensor:
    role = Cached(teacher, str(folder), codec=codec, **options)
    batch = read_batch((inputs(shift), torch.arange(4) % 3, torch.arange(4)))
    d = Distillation(network(9), role, [KD(temperature=options.get("temperature", 4.0))]).bind(batch)
    return d(batch)["KD"]


def test_another_teacher_codec_or_preprocessing_is_refused(tmp_path):
    cached(tmp_path, network(0))
    cached(tmp_path, network(0))
    changed = network(0)
    with torch.no_grad():
        changed[0].weight.view(-1)[0] += 1e-6
    with pytest.raises(ValueError, match="is of teacher"):
        cached(tmp_path, changed)
    with pytest.raises(ValueError, match="is of codec float32"):
        cached(tmp_path, network(0), "float16")
    with pytest.raises(ValueError, match="was made of other inputs"):
        cached(tmp_path, network(0), shift=2**-10)
    cached(tmp_path / "k", network(0), "top_k", k=2, temperature=4.0)
    with pytest.raises(ValueError, match="is of codec top_k"):
        cached(tmp_path / "k", network(0), "top_k", k=3, temperature=4.0)
