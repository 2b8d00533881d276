"""Sample ids for any map-style dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from tutelage.views import UNLABELLED


class Indexed(Dataset[Any]):
    """The items of a dataset together with their numbers, for losses that remember samples and for caches.

    ========================  ===========================
    item of ``dataset``       item of ``Indexed(dataset)``
    ========================  ===========================
    ``(x, y)``, ``(x, y, z)`` ``(x, y, index)``, ``(x, y, z, index)``
    a mapping                 a dict with the key ``"ids"`` added
    ``x`` or ``(x,)``         ``(x, -100, index)``: a number alone in second place would be read as the label
    ========================  ===========================

    The index is never negative: ``Indexed(d)[-1]`` is numbered ``len(d) - 1``. Wrap the whole set and split
    afterwards (``Subset(Indexed(d), part)``), so that a sample keeps its number in every part.

    Args:
        dataset: anything with ``len`` and integer indexing.

    Raises:
        TypeError: for a dataset without length or indexing.
        ValueError: on reading a mapping that already has ``"ids"``.

    >>> Indexed([("a", 0), ("b", 1)])[1]
    ('b', 1, 1)
    >>> Indexed([{"text": "a", "label": 0}])[0]
    {'text': 'a', 'label': 0, 'ids': 0}
    """

    def __init__(self, dataset: Any) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(f"dataset must have a length and indexing (map style), got {type(dataset).__name__}")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        number = int(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} is outside a dataset of {len(self)}")
        number %= len(self)
        item = self.dataset[number]
        if isinstance(item, Mapping):
            if "ids" in item:
                raise ValueError("the items already have a field 'ids': leave Indexed out")
            return {**item, "ids": number}
        values = tuple(item) if isinstance(item, tuple | list) else (item,)
        return (*values, number) if len(values) > 1 else (*values, UNLABELLED, number)
