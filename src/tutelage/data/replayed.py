"""Augmentation that can be shown again: a function of the sample's number, a view's number and a seed.

A sample has ``views`` augmented views; epoch e shows view e mod ``views`` of every sample, bit for bit the same in
whatever order, batch, worker or process. So what a teacher says of a view can be kept (:class:`tutelage.Cached`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from tutelage.data.arrays import ArrayLoader
from tutelage.data.keyed import drawing, keys_of
from tutelage.data.loaders import Loaders
from tutelage.views import Batch, Inputs, Replay, read_batch


class Replayed(Dataset[Any]):
    """The items of a data set, each read while the global generators draw what its number and its view's number say.

    What the data set's transforms draw from Python's, NumPy's and torch's global generators is so replayed, in any
    worker; the generators are afterwards as they were. A transform with a generator of its own is not.

    An item is ``(item, number, view)``, and an index ``(position, view)``; a position alone means view 0. The number
    is the position in the innermost data set of nested ``Subset``s (or in the ``Indexed`` inside them), so a sample has
    the same one in every part.

    Args:
        dataset: map-style.
        views: how many views of each sample there are.
        seed: of the augmentation.

    Raises:
        TypeError: a data set without length or indexing.
        ValueError: ``views`` below 1, or a seed out of range.

    >>> class Noisy(list):
    ...     def __getitem__(self, index):
    ...         return super().__getitem__(index) + torch.rand(1)
    >>> data = Replayed(Noisy([1.0, 2.0]), views=2)
    >>> data[1, 0] == data[1, 0], data[1, 0] == data[1, 1]
    (True, False)
    """

    def __init__(self, dataset: Any, views: int = 4, seed: int = 0):
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(f"dataset: expected one with a length and indexing, got {type(dataset).__name__}")
        _check(views, seed)
        self.dataset, self.views, self.seed = dataset, views, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, int, int]:
        place, view = index if isinstance(index, tuple) else (index, 0)
        number, inner = int(place) % len(self), self.dataset
        while isinstance(inner, Subset):
            number, inner = int(inner.indices[number]), inner.dataset
        (key,) = keys_of(self.seed, torch.tensor([number]).numpy(), torch.tensor([view]).numpy())
        with drawing(int(key)):
            return self.dataset[int(place)], number, view


class EachView(Sampler[tuple[int, int]]):
    """The positions that a sampler gives, with the view that the epoch shows of each.

    Args:
        sampler: of positions.
        views: how many views there are; epoch e shows view e mod ``views``.
    """

    def __init__(self, sampler: Any, views: int):
        self.sampler, self.views, self.epoch = sampler, views, 0

    @property
    def generator(self) -> torch.Generator | None:
        """The sampler's own, which an engine may seed."""
        return getattr(self.sampler, "generator", None)

    @generator.setter
    def generator(self, generator: torch.Generator) -> None:
        self.sampler.generator = generator  # one that an engine keeps equal in all processes

    def set_epoch(self, epoch: int) -> None:
        """Choose the view; an engine calls it before each epoch, and so must a loop of your own."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((place, self.epoch % self.views) for place in self.sampler)


@dataclass
class _Collate:
    """Batches of :class:`Replayed` items: what the loader's own function makes of them, with numbers and views."""

    single: Callable[[list[Any]], Any]
    views: int
    seed: int

    def __call__(self, items: list[tuple[Any, int, int]]) -> Batch:
        plain, numbers, view = zip(*items, strict=True)
        batch, ids = read_batch(self.single(list(plain))), torch.tensor(numbers)
        if batch.ids is not None and not torch.equal(torch.as_tensor(batch.ids), ids):
            raise ValueError(
                f"ids: the items bring {batch.ids.tolist()[:4]} where their places in the data set are "
                f"{ids.tolist()[:4]}; expected the same: take a Subset of Indexed data, or leave the ids out"
            )
        return replace(batch, ids=ids, replay=Replay(torch.tensor(view), self.views, self.seed))


class ReplayedArrays(ArrayLoader):
    """An :class:`tutelage.data.ArrayLoader` whose augmentation is replayed, and whose batches are
    :class:`tutelage.views.Batch`.

    An augmentation that has ``replay(images, keys)``, as :class:`tutelage.data.CropFlip` has, is called with a whole
    batch; any other with one image at a time, while torch's, NumPy's and Python's global generators draw what the
    image's key says.

    Args:
        loader: with ids.
        views: how many views of each image there are.
        seed: of the augmentation.

    Raises:
        ValueError: the loader gives no ids, ``views`` is below 1, or the seed is out of range.
    """

    def __init__(self, loader: ArrayLoader, views: int = 4, seed: int = 0):
        if not loader.ids:
            raise ValueError("replayed: the ArrayLoader has ids=False, and views belong to samples with a number")
        _check(views, seed)
        vars(self).update(vars(loader))
        self.views, self.seed, self.epoch = views, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the view; an engine calls it before each epoch, and so must a loop of your own."""
        self.epoch = epoch

    def _batch(self, ids: Tensor, seed: int) -> Any:
        inputs, labels, ids = super()._batch(ids, seed)
        view = torch.full_like(ids, self.epoch % self.views)
        seen = Inputs((inputs,))
        return Batch(seen, seen, labels, ids, replay=Replay(view, self.views, self.seed))

    def _augmented(self, images: Tensor, ids: Tensor, seed: int) -> Tensor:
        assert self.augment is not None
        view = torch.full_like(ids, self.epoch % self.views)
        keys = keys_of(self.seed, ids.numpy(), view.numpy())
        if hasattr(self.augment, "replay"):
            return self.augment.replay(images, keys)
        found = []
        for image, key in zip(images.split(1), keys, strict=True):
            with drawing(int(key)):
                found.append(self.augment(image))
        return torch.cat(found)


def replayed(loader: ArrayLoader | DataLoader, views: int = 4, seed: int = 0) -> ReplayedArrays | DataLoader:
    """A loader that gives the same samples in the same order, with augmentation that is replayed.

    Its batches are :class:`tutelage.views.Batch` with the samples' numbers and views. In a loop of your own call
    ``loader.set_epoch(epoch)`` (of a ``DataLoader``: ``loader.sampler.set_epoch(epoch)``) before each epoch.

    Args:
        loader: an ``ArrayLoader``, or a ``DataLoader`` of a map-style data set.
        views: how many views of each sample there are. With one, every epoch shows the same images.
        seed: of the augmentation, and not of the order. Runs with other seeds of their own may share one.

    Raises:
        TypeError: another kind of loader.
        ValueError: ``views`` below 1, a seed out of range, or a ``DataLoader`` with a batch sampler of its own.

    >>> from tutelage.data import fashion_loaders
    >>> loader = replayed(fashion_loaders(limit=100, batch_size=100).train, views=2)
    >>> batches = []
    >>> for epoch in (0, 1, 2):
    ...     loader.set_epoch(epoch)
    ...     batch = next(iter(loader))
    ...     batches.append(batch.student.args[0][batch.ids.argsort()])
    >>> torch.equal(batches[0], batches[2]), torch.equal(batches[0], batches[1])
    (True, False)
    """
    if isinstance(loader, ArrayLoader):
        return ReplayedArrays(loader, views, seed)
    if not isinstance(loader, DataLoader):
        raise TypeError(f"replayed: expected an ArrayLoader or a DataLoader, got {type(loader).__name__}")
    if loader.batch_size is None:
        raise ValueError("replayed: the DataLoader has a batch sampler of its own, or batch_size=None: give a sampler")
    kept = ["batch_size", "drop_last", "num_workers", "timeout", "worker_init_fn", "generator"]
    kept += ["multiprocessing_context"]
    if loader.num_workers:
        kept += ["prefetch_factor", "persistent_workers"]
    return DataLoader(
        Replayed(loader.dataset, views, seed),
        sampler=EachView(loader.sampler, views),
        collate_fn=_Collate(loader.collate_fn or default_collate, views, seed),
        **{name: getattr(loader, name) for name in kept},
    )


def replayed_loaders(data: Loaders, views: int = 4, seed: int = 0) -> Loaders:
    """The same data with training batches whose augmentation is replayed; what is judged on stays.

    Args:
        data: such as ``fashion_loaders()``.
        views, seed: as in :func:`replayed`.

    Raises:
        TypeError, ValueError: as :func:`replayed`.

    >>> from tutelage.data import fashion_loaders
    >>> batch = next(iter(replayed_loaders(fashion_loaders(limit=100, batch_size=10), views=8).train))
    >>> batch.replay.views, batch.ids.shape
    (8, torch.Size([10]))
    """
    train: Any = data.train
    return Loaders(replayed(train, views, seed), data.validation, data.test)


def _check(views: int, seed: int) -> None:
    if views < 1:
        raise ValueError(f"views={views}: expected 1 or more")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: expected a whole number from 0 to 4294967295")
