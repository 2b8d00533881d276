"""Sample ids beside the items of any dataset."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from tutelage.data import Indexed
from tutelage.views import read_batch


def test_tuples_mappings_and_bare_items() -> None:
    x = torch.tensor([1.0])
    assert Indexed([(x, 3)])[0] == (x, 3, 0)
    assert Indexed([(x, 3, "more")])[0] == (x, 3, "more", 0)
    assert Indexed([{"a": 1}, {"a": 2}])[1] == {"a": 2, "ids": 1}
    assert Indexed([UserDict(a=1)])[0] == {"a": 1, "ids": 0}
    assert Indexed([x])[0] == (x, -100, 0)
    assert Indexed(TensorDataset(torch.arange(3.0)))[2] == (torch.tensor(2.0), -100, 2)


def test_numbers_survive_subsets_shuffling_and_negative_indices() -> None:
    data = Indexed(TensorDataset(torch.arange(10.0), torch.arange(10)))
    for x, y, ids in DataLoader(Subset(data, [7, 2, 9, 4]), batch_size=3, shuffle=True):
        assert torch.equal(x.long(), ids)
        assert torch.equal(y, ids)
    assert data[-1][2] == 9
    assert len(data) == 10
    assert len(list(data)) == 10
    with pytest.raises(IndexError, match="index 10 is outside a dataset of 10"):
        data[10]


def test_the_step_reads_the_ids() -> None:
    tuples = read_batch(next(iter(DataLoader(Indexed(TensorDataset(torch.randn(4, 2), torch.arange(4))), 4))))
    named = read_batch(next(iter(DataLoader(Indexed([{"x": torch.ones(2), "label": 1}] * 4), 4))))
    bare = read_batch(next(iter(DataLoader(Indexed(torch.randn(4, 2)), 4))))
    for batch in (tuples, named, bare):
        assert batch.ids.tolist() == [0, 1, 2, 3]
    assert bare.labels.tolist() == [-100] * 4


def test_what_cannot_be_indexed_is_refused() -> None:
    with pytest.raises(TypeError, match="map style"):
        Indexed(iter([1, 2]))
    with pytest.raises(ValueError, match="already have a field 'ids'"):
        Indexed([{"ids": 3}])[0]
