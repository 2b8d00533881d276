"""Splits and label removal that are the same on every machine and for every version of the libraries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from tutelage.data.indexed import Indexed
from tutelage.views import UNLABELLED


def _labels_of(dataset: Any) -> np.ndarray:
    if isinstance(dataset, Subset):
        return _labels_of(dataset.dataset)[np.asarray(dataset.indices)]
    if isinstance(dataset, Indexed):
        return _labels_of(dataset.dataset)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return dataset.tensors[1].numpy()
    found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if found is None or len(found) != len(dataset):
        raise TypeError(
            f"{type(dataset).__name__} has no 'targets' or 'labels' of its length to stratify by: "
            "give labels=..., or stratify=False"
        )
    return np.asarray(found)


def _sizes(parts: Sequence[float], n: int) -> list[int]:
    if not parts or any(p <= 0 for p in parts):
        raise ValueError(f"parts must be positive fractions or sizes, got {tuple(parts)}")
    if all(isinstance(p, int | np.integer) for p in parts):
        sizes = [int(p) for p in parts]
    elif all(p <= 1 for p in parts) and sum(parts) <= 1 + 1e-9:
        # Cumulated first and rounded then, so that fractions that add up to one leave nothing over.
        ends = [0, *(int(np.floor(e * n + 0.5)) for e in np.cumsum(parts))]
        sizes = [b - a for a, b in pairwise(ends)]
    else:
        raise ValueError(f"parts must all be fractions with a sum of at most 1, or all be integers, got {tuple(parts)}")
    if sum(sizes) > n:
        raise ValueError(f"parts ask for {sum(sizes)} items, but there are {n}")
    if min(sizes) == 0:
        raise ValueError(f"parts {tuple(parts)} of {n} items leave a part empty")
    return sizes


def _order(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """An order in which every stretch holds the classes in proportion.

    The ``n`` items of a class, shuffled, stand at ``(k + u) / n`` for ``k = 0..n-1`` with one random ``u``
    in [0, 1).
    """
    places = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        places[random.permutation(members)] = (np.arange(len(members)) + random.random_sample()) / len(members)
    return np.argsort(places, kind="stable")


def split(
    source: Any,
    parts: Sequence[float],
    *,
    seed: int = 0,
    stratify: bool = True,
    labels: Any = None,
) -> list[Any]:
    """Disjoint random parts, for instance train, validation and test.

    With ``stratify`` every class is in each part in proportion, to within two items, and exactly where
    sizes of classes and parts divide. Deterministic: numpy's ``RandomState``, whose stream is frozen.

    Args:
        source: a map-style dataset, or a one-dimensional array, tensor or list of labels.
        parts: fractions of the whole with a sum of at most 1, or numbers of items. What is left over is in
            no part.
        seed: of the choice.
        stratify: keep the proportions of the classes.
        labels: the labels of a dataset's items, where it does not have them as ``targets`` or ``labels``, or as
            the second of two tensors.

    Returns:
        For a dataset, one ``torch.utils.data.Subset`` for each part; for labels, one sorted int64 array of
        positions.

    Raises:
        TypeError: if a dataset's labels are needed and not known.
        ValueError: for parts that are empty, mixed, or more than there is.

    >>> train, validation = split([0] * 8 + [1] * 4, (0.75, 0.25), seed=1)
    >>> len(train), validation.tolist()
    (9, [0, 4, 11])
    """
    plain = isinstance(source, np.ndarray | torch.Tensor | list | tuple)
    if labels is not None:
        marks = np.asarray(labels)
    elif plain:
        marks = np.asarray(source)
    else:
        marks = _labels_of(source) if stratify else np.zeros(len(source), dtype=np.int64)
    if marks.ndim != 1 or len(marks) != len(source):
        raise ValueError(f"labels must be one for each of {len(source)} items, got shape {marks.shape}")
    sizes = _sizes(parts, len(marks))
    random = np.random.RandomState(seed)
    order = _order(marks, random) if stratify else random.permutation(len(marks))
    pieces = np.split(order.astype(np.int64), np.cumsum(sizes))[: len(sizes)]
    positions = [np.sort(piece) for piece in pieces]
    return positions if plain else [Subset(source, piece.tolist()) for piece in positions]


def unlabel(labels: Any, keep_per_class: int, seed: int = 0) -> Any:
    """A copy of ``labels`` in which only ``keep_per_class`` items of each class, chosen at random, keep theirs.

    The others become -100, which cross-entropy and every loss of this package take as "without a label".
    With the same seed, the items kept for a smaller number are among those kept for a larger one.

    Args:
        labels: integers ``(N,)``: an array, a tensor or a list. Items that are -100 already stay so.
        keep_per_class: labels to keep in each class, 0 or more.
        seed: of the choice.

    Returns:
        Of the same kind as ``labels`` (an int64 array for a list).

    Raises:
        ValueError: if a class has fewer items, or the labels are not one-dimensional.

    >>> unlabel([0, 0, 0, 1, 1, 1], keep_per_class=1, seed=0).tolist()
    [-100, -100, 0, -100, -100, 1]
    """
    marks = np.array(labels, dtype=np.int64)
    if marks.ndim != 1:
        raise ValueError(f"labels must be one-dimensional, got shape {marks.shape}")
    if keep_per_class < 0:
        raise ValueError(f"keep_per_class must not be negative, got {keep_per_class}")
    random = np.random.RandomState(seed)
    kept = np.full_like(marks, UNLABELLED)
    for label in np.unique(marks[marks != UNLABELLED]):
        members = np.flatnonzero(marks == label)
        if len(members) < keep_per_class:
            raise ValueError(f"keep_per_class is {keep_per_class}, but class {label} has {len(members)} items")
        kept[random.permutation(members)[:keep_per_class]] = label
    return torch.from_numpy(kept).to(labels.device, labels.dtype) if isinstance(labels, torch.Tensor) else kept
