"""Disjoint parts of one data set, for several who each learn from their own."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from tutelage.data.arrays import ArrayLoader
from tutelage.data.loaders import Loaders
from tutelage.data.splits import split


def shard(source: Any, peer: int, peers: int, *, seed: int = 0) -> Any:
    """One of several random, disjoint parts that together are the whole; their sizes differ by one at most.

    A sample keeps its id. A loss that remembers every sample by its id has to know how many ids there are in the whole
    set (``CRD(samples=...)``).

    Args:
        source: a map-style data set; a ``DataLoader`` or an ``ArrayLoader`` of one; or a list of batches.
        peer: which part, 0 to ``peers`` − 1.
        peers: how many parts.
        seed: of the division; the same for all, or their parts overlap.

    Returns:
        Of the same kind; of a data set a ``Subset``. A part of an ``ArrayLoader`` is not shared out once more among
        the processes of ``torch.distributed``.

    Raises:
        ValueError: numbers that make no sense, more parts than samples, or a ``DataLoader`` whose sampler is its own.
        TypeError: a source of another kind.

    >>> parts = [shard(list("abcdefg"), peer, 3) for peer in range(3)]
    >>> [len(part) for part in parts], sorted(letter for part in parts for letter in part)
    ([3, 2, 2], ['a', 'b', 'c', 'd', 'e', 'f', 'g'])
    """
    if peers < 1 or not 0 <= peer < peers:
        raise ValueError(f"peer={peer}, peers={peers}: expected a number from 0 to peers - 1")
    if isinstance(source, ArrayLoader):
        part = copy.copy(source)
        part.dataset = copy.copy(source.dataset)
        part.dataset.indices = source.dataset.indices[_places(len(source.dataset), peer, peers, seed)]
        part._rank, part._world_size = 0, 1
        return part
    if isinstance(source, DataLoader):
        return _loader(source, shard(source.dataset, peer, peers, seed=seed))
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        raise TypeError(
            f"source: expected a map-style data set, a loader of one or a list of batches, got {type(source).__name__}"
        )
    places = _places(len(source), peer, peers, seed)
    return [source[i] for i in places] if isinstance(source, list | tuple) else Subset(source, places)


def sharded(data: Loaders, peer: int, peers: int, seed: int = 0) -> Loaders:
    """Loaders of which only the training batches are divided: what peer ``peer`` of ``peers`` learns from.

    Args:
        data: of the whole set.
        peer, peers, seed: as in :func:`shard`.

    >>> from tutelage.data import fashion_loaders
    >>> whole = fashion_loaders(limit=500)
    >>> part = sharded(whole, peer=0, peers=2)
    >>> len(part.train.dataset), len(part.validation.dataset) == len(whole.validation.dataset)
    (250, True)
    """
    return Loaders(shard(data.train, peer, peers, seed=seed), data.validation, data.test)


def _places(count: int, peer: int, peers: int, seed: int) -> list[int]:
    if count < peers:
        raise ValueError(f"peers={peers}: there are only {count} samples to divide")
    sizes = [count // peers + (i < count % peers) for i in range(peers)]
    return split(list(range(count)), sizes, seed=seed, stratify=False)[peer].tolist()


def _loader(whole: DataLoader, part: Any) -> DataLoader:
    """A loader of the part with the settings of the whole's."""
    plain = isinstance(whole.sampler, SequentialSampler) or (
        isinstance(whole.sampler, RandomSampler) and not whole.sampler.replacement
    )
    if not plain or whole.batch_size is None:
        raise ValueError(
            f"source: a DataLoader with a {type(whole.sampler).__name__} or batch sampler of its own; give a part of "
            "its data set to a new one"
        )
    names = [
        *("batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn"),
        *("multiprocessing_context", "generator", "prefetch_factor", "persistent_workers"),
    ]
    settings: dict[str, Any] = {name: getattr(whole, name) for name in names}
    return DataLoader(part, shuffle=isinstance(whole.sampler, RandomSampler), **settings)
