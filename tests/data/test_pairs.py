"""Batches of pairs: true partners of the same class, evenly drawn, repeatable, the same on every process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from tutelage.data import (
    ArrayLoader,
    ClassPairs,
    CropFlip,
    Indexed,
    PairedBatch,
    dataset_loaders,
    fashion_loaders,
    paired,
    paired_loaders,
)
from tutelage.run import seed_epoch

LABELS = torch.tensor([0, 1, 2, 0, 1, 0, -100, 1, 0, -100])  # 2 stands alone, two have none


def numbered(labels=LABELS) -> TensorDataset:
    return TensorDataset(torch.arange(len(labels)).float()[:, None], labels)


def partners(loader, epochs: int = 1, seed: int = 0) -> list[tuple[int, int]]:
    found = []
    for epoch in range(epochs):
        seed_epoch(seed, epoch, loader)
        for batch in loader:
            mine, theirs = batch.student.args[0].flatten().tolist(), batch.teacher.args[0].flatten().tolist()
            found += [(int(a), int(b)) for a, b in zip(mine, theirs, strict=True)]
    return found


def arrays(labels=LABELS, **options) -> ArrayLoader:
    """Images whose pixels are their number."""
    images = np.broadcast_to(np.arange(len(labels), dtype=np.uint8)[:, None, None], (len(labels), 4, 4)).copy()
    return ArrayLoader(images, labels, **{"batch_size": 4, "std": 1 / 255, "shuffle": True, **options})


def of_arrays(loader, epochs: int = 1, seed: int = 0) -> list[tuple[int, int]]:
    found = []
    for epoch in range(epochs):
        seed_epoch(seed, epoch, loader)
        for batch in loader:
            values = [x.args[0].amax((1, 2, 3)).round().tolist() for x in (batch.student, batch.teacher)]
            assert batch.ids.tolist() == values[0]
            found += [(int(a), int(b)) for a, b in zip(*values, strict=True)]
    return found


@pytest.mark.parametrize("kind", ["data set", "arrays"])
def test_partners_are_others_of_the_class_and_all_are_drawn_alike(kind):
    loader = DataLoader(numbered(), batch_size=4, shuffle=True) if kind == "data set" else arrays()
    look = partners if kind == "data set" else of_arrays
    found = look(paired(loader), epochs=400)
    assert len(found) == 4000
    counts = torch.zeros(10, 10)
    for a, b in found:
        counts[a, b] += 1
    same = (LABELS[:, None] == LABELS) & (LABELS >= 0)
    same.fill_diagonal_(False)
    alone = [2, 6, 9]  # no other of the class, or no label: their own partners
    same[alone, alone] = True
    assert (counts[~same] == 0).all()
    expected = (400 * same / same.sum(1, keepdim=True))[same]
    assert ((counts[same] - expected).abs() < 5 * expected.sqrt()).all()


def test_an_epoch_is_repeated_by_its_seed_and_differs_from_the_next():
    for loader, look in ((DataLoader(numbered(), batch_size=4, shuffle=True), partners), (arrays(), of_arrays)):
        pairs = paired(loader)
        first, again = look(pairs, seed=3), look(pairs, seed=3)
        assert first == again
        assert look(pairs, seed=4) != first
        assert look(pairs, 2, seed=3)[10:] != first


def test_skipped_array_batches_do_not_change_the_others():
    pairs = paired(arrays(augment=CropFlip(1)))
    seed_epoch(0, 0, pairs)
    whole = list(pairs)
    seed_epoch(0, 0, pairs)
    rest = iter(pairs)
    next(rest)
    torch.rand(100)  # what a model draws between two batches
    for batch, same in zip(rest, whole[1:], strict=True):
        assert torch.equal(batch.teacher.args[0], same.teacher.args[0])
        assert torch.equal(batch.student.args[0], same.student.args[0])


def test_processes_have_disjoint_shares_of_equal_length():
    labels = torch.arange(22) % 4
    ranks = [paired(arrays(labels, batch_size=3, rank=rank, world_size=2)) for rank in range(2)]
    shares = [of_arrays(loader) for loader in ranks]
    assert len(ranks[0]) == len(ranks[1]) == 4
    assert sorted(a for share in shares for a, _ in share) == list(range(22))
    assert all(a % 4 == b % 4 and a != b for share in shares for a, b in share)
    assert [b for _, b in shares[0]] != [b for _, b in shares[1]]
    # with a data set the sampler does it, as ever
    data = ClassPairs(numbered(labels))
    found = []
    for rank in range(2):
        sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=True)
        loader = DataLoader(data, batch_size=4, sampler=sampler, collate_fn=ClassPairs.collate())
        first, second = (partners(loader, seed=seed) for seed in (0, 0))
        assert first == second
        sampler.set_epoch(1)
        assert [a for a, _ in partners(loader)] == [a for a, _ in first]  # seed_epoch sets the epoch itself
        found.append(first)
    assert sorted(a for share in found for a, _ in share) == list(range(22))


def test_accelerates_completed_batches_keep_their_pairs():
    """accelerate fills the last batches of a batch sampler up with indices from the beginning."""
    from accelerate.data_loader import prepare_data_loader

    labels = torch.arange(11) % 3
    for rank in range(2):
        pairs = paired(DataLoader(numbered(labels), batch_size=4))
        shared = prepare_data_loader(pairs, num_processes=2, process_index=rank, put_on_device=False)
        batches = list(shared)
        assert [len(b) for b in batches] == [4, 4]
        assert all((b.student.args[0] % 3 == b.teacher.args[0] % 3).all() for b in batches)


def test_any_labelled_data_set():
    dicts = [{"text": torch.tensor([n]), "label": n % 2} for n in range(6)]
    loader = DataLoader(ClassPairs(dicts, labels=[d["label"] for d in dicts]), 3, collate_fn=ClassPairs.collate())
    batch = next(iter(loader))
    assert isinstance(batch, PairedBatch)
    assert (batch.student.kwargs["text"] % 2 == batch.teacher.kwargs["text"] % 2).all()
    assert batch.labels.tolist() == [0, 1, 0]
    part = ClassPairs(Subset(Indexed(numbered()), [0, 3, 1, 4]))
    mine, theirs = part[1]
    assert (mine[2], theirs[2]) == (3, 0)
    names = ClassPairs(list("abcd"), labels=["cat", "dog", "cat", "dog"])
    assert [names[i] for i in range(4)] == [("a", "c"), ("b", "d"), ("c", "a"), ("d", "b")]
    assert names[-1] == ("d", "b")
    made = paired_loaders(dataset_loaders(numbered(torch.arange(40) % 2), 0.25, batch_size=10, workers=2))
    assert all((b.student.args[0] % 2 == b.teacher.args[0] % 2).all() and len(b.ids) for b in made.train)
    assert isinstance(next(iter(made.validation)), list)


def test_partners_are_augmented_by_themselves():
    images = np.zeros((8, 9, 9), np.uint8)
    images[:, 4, 4] = 255
    pairs = paired(ArrayLoader(images, np.arange(8) % 2, batch_size=8, augment=CropFlip(3), std=1 / 255))
    torch.manual_seed(0)
    batch = next(iter(pairs))
    # one and the same picture, moved: only a few of the partners were moved alike
    assert (batch.student.args[0] != batch.teacher.args[0]).flatten(1).any(1).sum() > 4


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match="none of the 3 classes has two samples"):
        ClassPairs(numbered(torch.tensor([0, 1, 2, -100, -100])))
    with pytest.raises(ValueError, match="none of the 10 classes"):
        paired(arrays(torch.arange(10)))
    with pytest.raises(TypeError, match=r"list has no 'targets'.*labels=\.\.\."):
        ClassPairs([1, 2])
    with pytest.raises(ValueError, match="2 of them for 3 items"):
        ClassPairs([1, 2, 3], labels=[0, 0])
    with pytest.raises(ValueError, match=r"got shape \(2, 2\)"):
        ClassPairs([1, 2], labels=[[0, 0], [0, 0]])
    with pytest.raises(TypeError, match="got list"):
        paired([1])
    with pytest.raises(ValueError, match="ids=False"):
        paired(arrays(ids=False))
    with pytest.raises(ValueError, match="batch_size=None"):
        paired(DataLoader(numbered(), batch_size=None))
    with pytest.raises(IndexError, match="10 is outside"):
        ClassPairs(numbered())[10]
    assert len(paired_loaders(fashion_loaders(limit=50, batch_size=10)).train) == 5
