"""Random numbers that are a function of a key: the same in every process, order and batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014): every bit of the input changes half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys_of(seed: int, ids: np.ndarray, view: np.ndarray) -> np.ndarray:
    """A key for each sample and view under a seed: (N,) uint64.

    >>> first = keys_of(0, np.array([7, 8]), np.array([0, 0]))
    >>> bool(first[0] == keys_of(0, np.array([3, 7]), np.array([1, 0]))[1]), bool(first[0] == first[1])
    (True, False)
    """
    key = _mixed(np.full(len(ids), seed, dtype=np.uint64) + _STEP)
    key = _mixed(key + np.asarray(ids).astype(np.uint64) * _STEP)
    return _mixed(key + (np.asarray(view).astype(np.uint64) + np.uint64(1)) * _STEP)


def uniform(keys: np.ndarray, number: int) -> np.ndarray:
    """Each key's draw of this number, 0 for the first: (N,) float64 in [0, 1).

    >>> draws = uniform(keys_of(0, np.arange(10_000), np.zeros(10_000)), 0)
    >>> bool(abs(draws.mean() - 0.5) < 0.02)
    True
    """
    drawn = _mixed(keys + np.full(1, number + 1, dtype=np.uint64) * _STEP)
    return (drawn >> np.uint64(11)) * 2.0**-53


@contextmanager
def drawing(key: int) -> Iterator[None]:
    """Inside, the global generators of Python, NumPy and torch (on the processor) draw what the key says; afterwards
    they are as they were.

    >>> with drawing(5):
    ...     first = torch.rand(1), random.random()
    >>> with drawing(5):
    ...     (torch.rand(1), random.random()) == first
    True
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])  # noqa: NPY002  (what users' transforms draw from)
    torch.default_generator.manual_seed(key & (2**63 - 1))  # torch.manual_seed would reseed the accelerators as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
