"""What the tests of damaged files share: every way to damage one, and a judgement of what comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SAID = (ValueError, TypeError, OSError, ImportError, RuntimeError)  # what the command line makes one line of
FLIPS = 12  # of each file


def damages(content: bytes, random: np.random.Generator, used: int | None = None) -> Iterator[bytes]:
    """A file with one byte changed, at its ends and anywhere in what is ``used``; and with its end missing."""
    size = len(content)
    for place in (0, size - 1, *random.integers(0, used or size, FLIPS - 2).tolist()):
        yield content[:place] + bytes([content[place] ^ int(random.integers(1, 256))]) + content[place + 1 :]
    yield from (b"", content[: size // 2], content[: size - 1])


def judged(
    files: list[Path], use: Callable[[], Any], restore: Callable[[], None] = lambda: None, used: int | None = None
) -> Counter[str]:
    """Damage every file in every way, one at a time; returns how often it was noticed and how often it did no harm."""
    found: Counter[str] = Counter()
    random = np.random.default_rng(6)
    true = use()
    restore()
    assert files
    for file in files:
        content = file.read_bytes()
        for damaged in damages(content, random, used):
            file.write_bytes(damaged)
            try:
                kind = "harmless" if same(use(), true) else f"silent: {file.name}"
            except SAID as error:
                kind = "noticed" if str(file) in str(error) else f"unnamed: {file.name}: {type(error)}: {error}"
            found[kind] += 1
            restore()
            file.write_bytes(content)
    print(dict(found))
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in other)
    if isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
