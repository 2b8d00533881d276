"""The folder of a cache: ``manifest.json`` (whose outputs, of which augmentation, in which codec, and which tensors),
shards of rows (:mod:`tutelage.cache_files`), and ``lock``."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.cache_files import DamagedCache, Rows
from tutelage.codecs import Codec, in_float16
from tutelage.files import locked, replacing

FORMAT = 1


@dataclass(frozen=True)
class Held:
    """What a cache holds of one tensor.

    Args:
        address: of the tensor; ``@logits`` are the logits.
        rows: one for each view of a sample that is there.
        row_bytes: of each, with checksums.
        float32_bytes: of the same tensor in float32.
        nats: mean KL(full ‖ what comes back), of logits, measured on what was written.
        most_nats: the largest of a row.
        mass: the mean mass of the classes that were kept, of ``top_k``.
    """

    address: str
    rows: int
    row_bytes: int
    float32_bytes: int
    nats: float | None = None
    most_nats: float | None = None
    mass: float | None = None


class Cache:
    """The files of one teacher's outputs on one augmentation of one data set.

    Args:
        folder: of the cache; made when something is written.
        about: what it must be: ``teacher`` (``class``, ``sha256``), ``seed``, ``views``, ``codec``; ``None`` takes what
            is there.

    Raises:
        FileNotFoundError: no cache is there, and nobody says what it should be.
        DamagedCache: the manifest is damaged.
        ValueError: what is there is of another teacher, seed, number of views, codec or version.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.json"
        there = self._read()
        if there is None and about is None:
            raise FileNotFoundError(f"cache: there is none in {self.folder}")
        if there is not None and about is not None:
            self._refuse_others(there, about)
        fields = there or {**(about or {}), "tensors": {}}
        self.about = {name: fields[name] for name in ("teacher", "seed", "views", "codec")}
        self.codec = Codec(**self.about["codec"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.rows: dict[str, Rows] = {}
        self._take(fields["tensors"])

    def read(self, addresses: Sequence[str], keys: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The records of each tensor, and which keys have all of them.

        Raises:
            DamagedCache: a row does not have its checksum; the message names the file.
        """
        if any(address not in self.rows for address in addresses):
            self._take((self._read() or {"tensors": {}})["tensors"])  # another process may have begun
        there, found = np.ones(len(keys), bool), {}
        for address in addresses:
            if address in self.rows:
                found[address], mine = self.rows[address].read(keys)
                there &= mine
            else:
                there[:] = False
        return found, there

    def write(self, address: str, keys: np.ndarray, values: Tensor, marks: np.ndarray) -> None:
        """Keep one tensor of some samples.

        Args:
            address: of the tensor.
            keys: (N,) sample · views + view.
            values: (N, ...).
            marks: (N,) checksums of the inputs of which it was made.

        Raises:
            ValueError: values that cannot be kept, or of another shape than before.
            OSError: the disk is full, or the folder may not be written to.
        """
        values = values.detach()
        if values.ndim < 1 or len(values) != len(keys):
            raise ValueError(
                f"cache: {address!r} is {tuple(values.shape)} for {len(keys)} samples: expected a row each"
            )
        shape = tuple(values.shape[1:])
        if address not in self.rows:
            self._enter(address, shape)
        if shape != self.shapes[address]:
            raise ValueError(
                f"cache: {address!r} is {shape} of a sample, and the rows in {self.folder} are for "
                f"{self.shapes[address]}: expected samples of one size"
            )
        records = self.rows[address].empty(len(keys))
        if address == "@logits":
            kept = self.codec.encode(values)
            back = self.codec.decode({name: torch.from_numpy(v) for name, v in kept.items()}, shape)
            kept["nats"] = self.codec.nats(values, back).numpy()
        else:
            kept = {"values": in_float16(_real(address, values), f"cache: {address!r}", "read another tensor")}
        for name, value in {**kept, "inputs": marks}.items():
            records[name] = value
        self.rows[address].write(keys, records)

    def decode(self, address: str, records: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """The tensor that records stand for, in float32."""
        assert records.dtype.names is not None
        kept = {n: torch.from_numpy(np.ascontiguousarray(records[n])).to(device) for n in _content(records.dtype.names)}
        return self.codec.decode(kept, self.shapes[address]) if address == "@logits" else kept["values"].float()

    def held(self) -> list[Held]:
        """What there is of each tensor, after every checksum was compared.

        Raises:
            DamagedCache: something is damaged; the message names the file.
        """
        found = []
        for address, rows in self.rows.items():
            shards = [records for _, records in rows.check()]
            whole = np.concatenate(shards) if shards else rows.empty(0)
            line = Held(address, len(whole), rows.dtype.itemsize, 4 * int(np.prod(self.shapes[address], dtype=int)))
            if address == "@logits" and len(whole):
                nats = whole["nats"].astype(np.float64)
                line = replace(line, nats=float(nats.mean()), most_nats=float(nats.max()))
                if "mass" in (whole.dtype.names or ()):
                    line = replace(line, mass=float(whole["mass"].astype(np.float64).mean()))
            found.append(line)
        return found

    def sum_up(self) -> list[Held]:
        """:meth:`held`, noted in the manifest as ``measured``."""
        found = self.held()
        with locked(self.folder / "lock", wait=True):
            self._write({**(self._read() or {}), "measured": [asdict(line) for line in found]})
        return found

    def _take(self, tensors: dict[str, Any]) -> None:
        for address, entry in tensors.items():
            if address not in self.rows:
                shape = tuple(entry["shape"])
                text = json.dumps([self.about, address, shape], sort_keys=True)
                self.shapes[address] = shape
                fields = [("values", "<f2", shape)]
                if address == "@logits":
                    fields = [*self.codec.fields(shape), ("nats", "<f4", ())]
                self.rows[address] = Rows(
                    self.folder,
                    entry["files"],
                    [*fields, ("inputs", "<u4", ())],
                    zlib.crc32(text.encode()),
                    entry["rows_per_shard"],
                )

    def _enter(self, address: str, shape: tuple[int, ...]) -> None:
        """Let the manifest have one tensor more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock", wait=True):
            there = self._read()
            if there is not None:
                self._refuse_others(there, self.about)
            fields = there or {**self.about, "tensors": {}}
            if address not in fields["tensors"]:
                name = re.sub(r"[^A-Za-z0-9.]+", "_", address).strip("_")
                entry: dict[str, Any] = {
                    "shape": list(shape),
                    "files": f"{len(fields['tensors']):02d}-{name}",
                    "rows_per_shard": None,
                }
                self._take({address: entry})
                rows = self.rows[address]
                entry |= {"rows_per_shard": rows.per_shard, "row_bytes": rows.dtype.itemsize}
                self._write({**fields, "tensors": {**fields["tensors"], address: entry}})
            self._take(fields["tensors"])

    def _read(self) -> dict[str, Any] | None:
        try:
            text = self.manifest.read_bytes()
        except FileNotFoundError:
            return None
        try:
            fields = json.loads(text)
            checksum = fields.pop("checksum")
        except (ValueError, AttributeError, KeyError, TypeError):
            raise DamagedCache(f"cache: {self.manifest} is damaged: it is no manifest of a cache") from None
        if checksum != _checksum(fields):
            raise DamagedCache(f"cache: {self.manifest} is damaged: it does not have its checksum")
        if fields["format"] != FORMAT:
            raise ValueError(f"cache: {self.manifest} has format {fields['format']}, and this version reads {FORMAT}")
        return fields

    def _write(self, fields: dict[str, Any]) -> None:
        fields = {**fields, "format": FORMAT}
        with replacing(self.manifest) as beside:
            beside.write_text(json.dumps({**fields, "checksum": _checksum(fields)}, indent=1) + "\n")

    def _refuse_others(self, there: dict[str, Any], about: dict[str, Any]) -> None:
        for name in ("teacher", "seed", "views", "codec"):
            if there[name] != about[name]:
                raise ValueError(
                    f"cache: {self.folder} is of {name} {said(there[name])}, and this is {name} {said(about[name])}: "
                    "take the same, or another folder"
                )


def said(value: Any) -> str:
    """What a cache is of, for people: a teacher, a codec, or a number."""
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['class']} {value['sha256'][:12]}"
    if isinstance(value, dict):
        return ", ".join(str(v) if k == "name" else f"{k}={v}" for k, v in value.items())
    return "none" if value is None else str(value)


def _content(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in ("nats", "mass", "inputs", "padding", "sum")]


def _real(address: str, values: Tensor) -> Tensor:
    if not values.is_floating_point():
        raise ValueError(f"cache: {address!r} is {values.dtype}: expected real numbers, which float16 can hold")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"cache: {address!r} is NaN or infinite: nothing is kept of it")
    return values.float().cpu()


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
