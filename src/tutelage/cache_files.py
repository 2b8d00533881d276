"""Rows of one size in memory-mapped shards, each with its checksum, which several processes read and fill at once.

A row is found by a key and lies in the file ``key // rows_per_shard`` at the place ``key % rows_per_shard``. Its last
four bytes are its checksum, 0 while it is not written; they are written after all else of it. So a row is whole or not
there, whenever its writer was killed. A row that is there is never written again.

What was not written takes no room. To look at it through the memory would give it room on a file system that is in
the memory itself (/dev/shm), or end the process with SIGBUS if that is full. So whether a row is there, the file is
asked.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tutelage.files import locked, replacing

SHARD_BYTES = 2**28
MOST_ROWS = 65_536


class DamagedCache(ValueError):
    """A file of a cache is not what was written; the message names it."""


class Rows:
    """One kind of rows.

    Args:
        folder: where the shards are, with the file that writers lock.
        name: that the shards' file names begin with.
        fields: numpy's names, types and shapes of a row's parts.
        salt: a number that belongs into the checksums, so that a shard of another cache is noticed.
        per_shard: rows of a shard; by default as many as make a quarter of a GiB, and 65,536 at most.

    >>> import tempfile
    >>> rows = Rows(Path(tempfile.mkdtemp()), "a", [("x", "<f4", (2,))], salt=1)
    >>> record = rows.empty(1)
    >>> record["x"] = 3.0
    >>> rows.write(np.array([5]), record)
    1
    >>> found, there = rows.read(np.array([4, 5]))
    >>> there.tolist(), found["x"][1].tolist()
    ([False, True], [3.0, 3.0])
    """

    def __init__(self, folder: Path, name: str, fields: list, salt: int, per_shard: int | None = None):
        self.folder, self.name, self.salt = folder, name, salt
        size = np.dtype(fields).itemsize
        # so that no checksum lies in two pages, of which a full disk might take one
        padding = [("padding", "u1", (-size % 4,))] if size % 4 else []
        self.dtype = np.dtype([*fields, *padding, ("sum", "<u4")])
        self.per_shard = per_shard or max(1, min(MOST_ROWS, SHARD_BYTES // self.dtype.itemsize))
        self._maps: dict[int, np.ndarray] = {}
        self._known: dict[int, np.ndarray] = {}  # which rows of a shard were seen to be there

    def empty(self, count: int) -> np.ndarray:
        """Records to fill in and to write."""
        return np.zeros(count, self.dtype)

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.name}-{shard:05d}.rows"

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The records of these keys, and which of them there are.

        Raises:
            DamagedCache: a row does not have its checksum, or a file its size.
        """
        found = self._gathered(keys)
        there = found["sum"] != 0
        wrong = there & (found["sum"] != self._sums(keys, found))
        if wrong.any():  # it may have been read while it was being written; whatever has a sum now is complete
            again = self._gathered(keys[wrong])
            bad = again["sum"] != self._sums(keys[wrong], again)
            if bad.any():
                key = int(keys[wrong][bad][0])
                raise DamagedCache(
                    f"cache: {self.path(key // self.per_shard)} is damaged: row {key % self.per_shard} does not have "
                    "its checksum; remove the file, and only its rows are made again"
                )
            found[wrong] = again
        return found, there

    def write(self, keys: np.ndarray, records: np.ndarray) -> int:
        """Write the records of keys that are not there yet; returns how many those were.

        Raises:
            OSError: the disk is full or the folder may not be written to; what is whole stays.
        """
        keys, first = np.unique(keys, return_index=True)
        records = records[first]
        records["sum"] = self._sums(keys, records)
        count = 0
        with locked(self.folder / "lock", wait=True):
            missing = self._gathered(keys)["sum"] == 0
            keys, records = keys[missing], records[missing]
            shards = keys // self.per_shard
            for shard in np.unique(shards):
                mine = shards == shard
                path = self.path(int(shard))
                if not path.exists():
                    with replacing(path) as beside, beside.open("wb") as new:
                        new.truncate(self.per_shard * self.dtype.itemsize)
                with path.open("r+b", buffering=0) as file:
                    places, size = keys[mine] % self.per_shard, self.dtype.itemsize
                    _put(file, places, records[mine], 0, size - 4)
                    _put(file, places, records[mine], size - 4, size)
                count += int(mine.sum())
        return count

    def check(self) -> Iterator[tuple[Path, np.ndarray]]:
        """Every shard with the records that it holds, all checksums compared.

        Raises:
            DamagedCache: as :meth:`read`.
        """
        for path in sorted(self.folder.glob(f"{self.name}-{'[0-9]' * 5}.rows")):
            shard = int(path.stem.rpartition("-")[2])
            self._mapped(shard)  # which looks at the size
            sums = np.concatenate([part["sum"].copy() for part in self._parts(path)])
            keys = np.flatnonzero(sums) + shard * self.per_shard
            chunks = [self.read(part)[0] for part in np.array_split(keys, max(1, len(keys) // 4096))]
            yield path, np.concatenate(chunks)

    def _mapped(self, shard: int) -> np.ndarray | None:
        if shard not in self._maps:
            path, size = self.path(shard), self.per_shard * self.dtype.itemsize
            try:
                there = path.stat().st_size
            except FileNotFoundError:
                return None
            if there != size:
                raise DamagedCache(
                    f"cache: {path} is damaged: {there} bytes and not {size}; remove the file, and only its rows are "
                    "made again"
                )
            self._maps[shard] = np.memmap(path, self.dtype, mode="r", shape=(self.per_shard,))
            self._known[shard] = np.zeros(self.per_shard, bool)
        return self._maps[shard]

    def _parts(self, path: Path) -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            while len(part := np.fromfile(file, self.dtype, max(1, 2**22 // self.dtype.itemsize))):
                yield part

    def _there(self, shard: int, places: np.ndarray) -> np.ndarray:
        """Which rows of a shard that is mapped have a checksum."""
        known = self._known[shard]
        if not known[places].all():
            with self.path(shard).open("rb", buffering=0) as file:
                for place in places[~known[places]]:
                    file.seek((int(place) + 1) * self.dtype.itemsize - 4)
                    known[place] = any(file.read(4))
        return known[places]

    def _gathered(self, keys: np.ndarray) -> np.ndarray:
        shards, places = np.divmod(keys, self.per_shard)
        found = self.empty(len(keys))
        for shard in np.unique(shards):
            if (mapped := self._mapped(int(shard))) is not None:
                mine = np.flatnonzero(shards == shard)
                mine = mine[self._there(int(shard), places[mine])]
                found[mine] = mapped[places[mine]]
        return found

    def _sums(self, keys: np.ndarray, records: np.ndarray) -> np.ndarray:
        size = self.dtype.itemsize
        text, marks = memoryview(records.tobytes()), memoryview(keys.astype("<i8").tobytes())
        sums = [
            zlib.crc32(text[n * size : (n + 1) * size - 4], zlib.crc32(marks[8 * n : 8 * n + 8], self.salt)) or 1
            for n in range(len(keys))
        ]
        return np.array(sums, np.uint32)


def _put(file: BinaryIO, places: np.ndarray, records: np.ndarray, begin: int, end: int) -> None:
    """Write the bytes from ``begin`` to ``end`` of each record at its place."""
    size, text = records.dtype.itemsize, memoryview(records.tobytes())
    for n, place in enumerate(places):
        file.seek(int(place) * size + begin)
        rest = text[n * size + begin : n * size + end]
        while rest:  # a disk that is nearly full takes less than it is given
            rest = rest[file.write(rest) :]
