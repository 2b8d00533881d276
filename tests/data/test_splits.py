"""Splits are disjoint, stratified and the same everywhere; unlabelling keeps what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset

from tutelage.data import ArrayDataset, Indexed, from_numpy, split, unlabel

BALANCED = np.arange(500) % 10


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=12, max_size=200),
    fractions=st.sampled_from([(0.5, 0.5), (0.8, 0.1, 0.1), (0.25, 0.25), (0.7, 0.3), (0.2,)]),
    seed=st.integers(0, 1000),
)
def test_parts_are_disjoint_of_the_right_size_and_in_proportion(labels, fractions, seed) -> None:
    parts = split(labels, fractions, seed=seed)
    together = np.concatenate(parts)
    n = len(labels)
    assert len(np.unique(together)) == len(together)
    assert abs(len(together) - sum(fractions) * n) <= 0.5 + 1e-6
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * n) <= 1
        assert np.array_equal(part, np.sort(part))
        for label in set(labels):
            wanted = labels.count(label) * len(part) / n
            assert abs(np.sum(np.asarray(labels)[part] == label) - wanted) <= 2


def test_balanced_classes_are_split_exactly() -> None:
    for part, each in zip(split(BALANCED, (0.8, 0.1, 0.1), seed=3), (40, 5, 5), strict=True):
        assert np.bincount(BALANCED[part]).tolist() == [each] * 10
    train, held = split(BALANCED, (300, 100), seed=3)
    assert np.bincount(BALANCED[train]).tolist() == [30] * 10
    assert np.bincount(BALANCED[held]).tolist() == [10] * 10


@pytest.mark.parametrize("stratify", [True, False])
def test_same_seed_same_parts(stratify: bool) -> None:
    def parts(seed: int):
        return np.concatenate(split(BALANCED, (0.6, 0.4), seed=seed, stratify=stratify)).tolist()

    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert parts(1) == parts(1)
    assert parts(1) != parts(2)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_unstratified_split_is_a_permutation_of_the_frozen_generator() -> None:
    order = np.random.RandomState(7).permutation(10)
    first, second = split(list(range(10)), (6, 4), seed=7, stratify=False)
    assert first.tolist() == sorted(order[:6])
    assert second.tolist() == sorted(order[6:])


def test_every_member_of_a_small_class_can_be_held_out() -> None:
    labels = np.array([0] * 98 + [1, 1])
    held = {i for seed in range(60) for i in split(labels, (0.8, 0.2), seed=seed)[1].tolist() if i >= 98}
    assert held == {98, 99}


def test_datasets_come_back_as_subsets() -> None:
    images = np.zeros((20, 4, 4), np.uint8)
    labels = np.arange(20) % 2
    dataset = ArrayDataset(images, labels)
    for source in (dataset, Indexed(dataset), Subset(dataset, range(20)), from_numpy(labels[:, None] * 1.0, labels)):
        train, held = split(source, (0.5, 0.5), seed=0)
        assert isinstance(train, Subset)
        assert sorted([*train.indices, *held.indices]) == list(range(20))
        assert sum(int(item[1]) for item in train) == 5
    again, _ = split(labels, (0.5, 0.5), seed=0)
    assert train.indices == again.tolist()


def test_a_subset_of_a_subset_reads_the_right_labels() -> None:
    dataset = ArrayDataset(np.zeros((30, 4, 4), np.uint8), np.arange(30) % 3)
    part = Subset(dataset, [i for i in range(30) if i % 3 < 2])
    train, _ = split(part, (0.5, 0.5), seed=4)
    assert sorted(int(y) for _, y in train) == [0] * 5 + [1] * 5


def test_labels_may_be_given_or_left_out() -> None:
    dataset = [(torch.zeros(1), 0)] * 8
    with pytest.raises(ValueError, match="labels must be one for each of 8 items"):
        split(dataset, (0.5, 0.5), labels=[0, 1])

    class Bare:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(TypeError, match=r"Bare has no 'targets'.*labels=.*stratify=False"):
        split(Bare(), (0.5, 0.5))
    assert len(split(Bare(), (0.5, 0.5), stratify=False)[0]) == 4
    train, _ = split(Bare(), (0.5, 0.5), labels=[0, 1] * 4)
    assert sum(i % 2 for i in train) == 2


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((0.8, 0.4), "sum of at most 1"),
        ((0.5, 3), "all be fractions"),
        ((), "positive"),
        ((0.5, -0.1), "positive"),
        ((400, 200), "ask for 600 items, but there are 500"),
        ((0.999, 0.001), "leave a part empty"),
    ],
)
def test_impossible_parts(parts, message) -> None:
    with pytest.raises(ValueError, match=message):
        split(BALANCED, parts)


def test_unlabel_keeps_so_many_of_each_class_and_nests() -> None:
    few, more = unlabel(BALANCED, 3, seed=1), unlabel(BALANCED, 10, seed=1)
    for kept, count in ((few, 3), (more, 10)):
        assert np.bincount(kept[kept != -100]).tolist() == [count] * 10
        assert np.array_equal(kept[kept != -100], BALANCED[kept != -100])
    assert np.all(more[few != -100] != -100)
    assert not np.array_equal(few, unlabel(BALANCED, 3, seed=2))
    assert np.all(unlabel(BALANCED, 0) == -100)
    assert np.array_equal(BALANCED, np.arange(500) % 10)


def test_unlabel_keeps_the_kind_and_what_is_unlabelled_already() -> None:
    out = unlabel(torch.tensor([0, -100, 1, 0], dtype=torch.int32), 1)
    assert out.dtype == torch.int32
    assert out[1] == -100
    assert (out >= 0).sum() == 2
    with pytest.raises(ValueError, match="keep_per_class is 2, but class 1 has 1 items"):
        unlabel([0, 0, 1], 2)
    with pytest.raises(ValueError, match="one-dimensional"):
        unlabel([[0], [1]], 1)
    with pytest.raises(ValueError, match="must not be negative"):
        unlabel([0, 1], -1)
