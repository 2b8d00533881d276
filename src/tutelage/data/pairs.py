"""Batches of pairs: beside each sample another one of its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tutelage.data.arrays import ArrayLoader
from tutelage.data.loaders import Loaders
from tutelage.data.splits import _labels_of
from tutelage.views import UNLABELLED, Batch, Inputs, read_batch


@dataclass
class PairedBatch(Batch):
    """A batch in which the teacher's inputs are not the student's samples, but for each another one of its class."""


class _Classes:
    """The other members of each sample's class."""

    def __init__(self, labels: Any) -> None:
        marks = np.asarray(labels)
        if marks.ndim != 1:
            raise ValueError(f"labels: expected one class for each sample, got shape {marks.shape}")
        order = np.argsort(marks, kind="stable")
        _, self.start, self.own, self.size = np.unique(
            marks[order], return_index=True, return_inverse=True, return_counts=True
        )
        self.order = order
        self.place = np.empty_like(order)  # where a sample stands in that order
        self.place[order] = np.arange(len(order))
        self.unlabelled = marks == UNLABELLED
        counted = self.size[marks[order[self.start]] != UNLABELLED]
        if not (counted > 1).any():
            raise ValueError(
                f"labels: none of the {len(counted)} classes has two samples, so no sample has another one of its class"
            )

    def draw(self, samples: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Another member of each sample's class, all equally likely; itself where there is none or no label.

        ``chance`` are numbers in [0, 1), one for each sample.
        """
        place = self.place[samples]
        group = self.own[place]
        start, size = self.start[group], self.size[group]
        step = 1 + (chance * (size - 1)).astype(np.int64)  # size - 1 places further on in the ring, at most
        found = self.order[start + (place - start + step) % size]
        return np.where(self.unlabelled[samples], samples, found)


class ClassPairs(Dataset[Any]):
    """Each item of a data set together with another one of its class, drawn anew every time.

    A data set and no batch sampler, so that every sampler, and every way to share batches out among processes, stays
    what it is. Draws from torch's global generator, one number an item. A sample without another of its class, or
    without a label (-100), comes with itself, which a random augmentation makes another view of it.

    ``DataLoader(ClassPairs(data), collate_fn=ClassPairs.collate(), ...)`` gives :class:`PairedBatch`;
    :func:`paired` makes one of a loader.

    Args:
        dataset: any map-style data set of ``(x, y)``, ``(x, y, id)`` or mappings.
        labels: the class of each item, where the data set does not have them as ``targets`` or ``labels``, or as the
            second of two tensors.

    Raises:
        TypeError: the labels are not known.
        ValueError: no class has two samples, or the labels are not one for each item.

    >>> pairs = ClassPairs([("a", 0), ("b", 1), ("c", 0)], labels=[0, 1, 0])
    >>> pairs[0], pairs[1]
    ((('a', 0), ('c', 0)), (('b', 1), ('b', 1)))
    """

    def __init__(self, dataset: Any, labels: Any = None) -> None:
        if labels is None:
            try:
                labels = _labels_of(dataset)
            except TypeError:
                raise TypeError(
                    f"labels: {type(dataset).__name__} has no 'targets' or 'labels' of its length to find classes by: "
                    "give labels=..."
                ) from None
        if len(labels) != len(dataset):
            raise ValueError(f"labels: {len(labels)} of them for {len(dataset)} items")
        self.dataset = dataset
        self._classes = _Classes(labels)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        number = int(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} is outside a data set of {len(self)}")
        chance = torch.rand(1, dtype=torch.float64).numpy()
        (other,) = self._classes.draw(np.array([number % len(self)]), chance)
        return self.dataset[number], self.dataset[int(other)]

    @staticmethod
    def collate(single: Callable[[list[Any]], Any] | None = None) -> Callable[[list[tuple[Any, Any]]], PairedBatch]:
        """The ``collate_fn`` of pairs, from that of single items; by default torch's own."""
        return _Collate(single or torch.utils.data.default_collate)


@dataclass
class _Collate:
    single: Callable[[list[Any]], Any]

    def __call__(self, pairs: list[tuple[Any, Any]]) -> PairedBatch:
        mine, theirs = (read_batch(self.single(list(side))) for side in zip(*pairs, strict=True))
        return PairedBatch(mine.student, theirs.student, mine.labels, mine.ids)


class PairedArrays:
    """An :class:`tutelage.data.ArrayLoader` whose batches are :class:`PairedBatch`.

    The partners are augmented by themselves. As with the loader, everything random is drawn when the iteration starts
    and each rank has its share, so a seed fixes the epoch and skipped batches do not change those that follow.

    Args:
        loader: with ids.

    Raises:
        ValueError: no class has two samples, or the loader gives no ids.
    """

    def __init__(self, loader: ArrayLoader) -> None:
        if not loader.ids:
            raise ValueError("paired: the ArrayLoader has ids=False, and samples are found by their ids")
        self.loader, self.dataset = loader, loader.dataset
        labels = torch.full_like(self.dataset.labels, UNLABELLED)  # what is not used has no class
        labels[self.dataset.indices] = self.dataset.targets
        self._classes = _Classes(labels)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[PairedBatch]:
        return self._pairs(iter(self.loader), int(torch.randint(2**62, ())))

    def _pairs(self, batches: Iterator[tuple[Tensor, ...]], seed: int) -> Iterator[PairedBatch]:
        for number, (inputs, labels, ids) in enumerate(batches):
            own = seed + number * self.loader.world_size + self.loader.rank
            chance = torch.rand(len(ids), dtype=torch.float64, generator=torch.Generator().manual_seed(own))
            others = torch.from_numpy(self._classes.draw(ids.numpy(), chance.numpy()))
            theirs = self.loader._batch(others, own)[0]
            yield PairedBatch(Inputs((inputs,)), Inputs((theirs,)), labels, ids)


def paired(loader: ArrayLoader | DataLoader) -> PairedArrays | DataLoader:
    """A loader whose batches come in pairs: the samples it gave before, and beside each another one of its class.

    Args:
        loader: with the labels of its data set known (:class:`ClassPairs`).

    Raises:
        TypeError: another kind of loader, or unknown labels.
        ValueError: no class has two samples, or a loader that makes no batches.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.arange(6.0)[:, None], torch.arange(6) % 2)
    >>> batch = next(iter(paired(DataLoader(data, batch_size=4))))
    >>> bool((batch.student.args[0] % 2 == batch.teacher.args[0] % 2).all()), batch.labels
    (True, tensor([0, 1, 0, 1]))
    """
    if isinstance(loader, ArrayLoader):
        return PairedArrays(loader)
    if not isinstance(loader, DataLoader):
        raise TypeError(f"paired: expected an ArrayLoader or a DataLoader, got {type(loader).__name__}")
    if loader.batch_sampler is None:
        raise ValueError("paired: the DataLoader has batch_size=None: expected one that makes batches of samples")
    kept = ["num_workers", "timeout", "worker_init_fn", "generator", "multiprocessing_context"]
    if loader.num_workers:
        kept += ["prefetch_factor", "persistent_workers"]
    return DataLoader(
        ClassPairs(loader.dataset),
        batch_sampler=loader.batch_sampler,
        collate_fn=ClassPairs.collate(loader.collate_fn),
        **{name: getattr(loader, name) for name in kept},
    )


def paired_loaders(data: Loaders) -> Loaders:
    """The same data with training batches in pairs, for :class:`tutelage.ClassWise`; what is judged on stays.

    Args:
        data: such as ``fashion_loaders()``.

    Raises:
        TypeError, ValueError: as :func:`paired`.

    >>> from tutelage.data import fashion_loaders
    >>> batch = next(iter(paired_loaders(fashion_loaders(limit=100, batch_size=10)).train))
    >>> batch.student.args[0].shape == batch.teacher.args[0].shape == (10, 1, 28, 28)
    True
    """
    train: Any = data.train
    return Loaders(paired(train), data.validation, data.test)
