"""A teacher whose outputs are kept on disk: it runs once for each view of a sample, however many epochs and runs.

The folder holds ``manifest.json`` (whose outputs, of which augmentation, in which codec, and which tensors), shards of
rows (:mod:`tutelage.cache_files`), and ``lock``. What is in it and how good it is, :meth:`Cache.held` says.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.cache_files import DamagedCache, Rows
from tutelage.codecs import Codec, Name, in_float16
from tutelage.files import locked, replacing
from tutelage.knowledge.base import Loss
from tutelage.record import Record
from tutelage.teachers import Frozen, Lesson
from tutelage.views import Batch, Inputs

FORMAT = 1


def fingerprint(module: nn.Module) -> str:
    """What a network is, in 64 hexadecimal digits: SHA-256 of its class's name, printed structure and state dict.

    Modes, devices and memory formats do not count. Code does not either: two networks of one name, structure and state
    whose ``forward`` differs have the same fingerprint.

    >>> network = nn.Linear(3, 2)
    >>> fingerprint(network) == fingerprint(network.eval()), fingerprint(network) == fingerprint(nn.Linear(3, 2))
    (True, False)
    """
    structure = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module))
    digest = hashlib.sha256(f"{type(module).__qualname__}\n{structure}".encode())
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"\n{name} {value!r}\n".encode())
    return digest.hexdigest()


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
                    f"cache: {self.folder} is of {name} {_said(there[name])}, and this is {name} {_said(about[name])}: "
                    "take the same, or another folder"
                )


class Cached(Frozen):
    """A frozen network that is asked once: what it said of a view of a sample is read from a folder afterwards.

    A row is found by the sample's id, its view and the network, never by a step, so that shuffled, resumed, accumulated
    and distributed runs get the right one. Rows that are not there are calculated by the network (in float32, whatever
    autocast says), written, and read back: a first run fills the cache, later epochs and other runs do not call the
    network. Several processes may read and fill one folder.

    The data must give ids, and if they are augmented, :class:`tutelage.views.Replay` too
    (:func:`tutelage.data.replayed`). Each row knows the checksum of the teacher's inputs that it was made of; that of
    one sample is compared in every batch, so a batch that shows something else is refused.

    Args:
        module: the network; it is evaluated and reported as itself.
        folder: of the cache.
        codec: of the logits (:class:`tutelage.codecs.Codec`); all other tensors that losses read are float16.
        k: of ``top_k``.
        temperature: of ``top_k``, that of the losses that read the logits.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: an unknown codec, ``k`` or ``temperature`` out of range. When binding: a folder of another teacher,
            seed, number of views or codec; a loss that derives the teacher's outputs with respect to its inputs; with
            ``top_k`` one that reads the logits without a temperature, or at another one.
        OSError: a row is missing and cannot be written.

    >>> import tempfile
    >>> from tutelage import KD, Distillation
    >>> teacher, batch = nn.Linear(8, 3), (torch.randn(5, 8), torch.zeros(5, dtype=torch.long), torch.arange(5))
    >>> role = Cached(teacher, tempfile.mkdtemp(), codec="float32")
    >>> cached = Distillation(nn.Linear(8, 3), role, [KD()]).bind(batch)
    >>> teacher.forward = None  # it is not called again
    >>> cached(batch)["KD"] >= 0, role.cache.held()[0].rows
    (tensor(True), 5)
    """

    def __init__(self, module: nn.Module, folder: str, codec: Name = "float16", k: int = 10, temperature: float = 1.0):
        super().__init__(module)
        self.folder, self.codec = folder, Codec(codec, k, temperature)
        self.cache: Cache | None = None

    def check(self, losses: Sequence[Loss]) -> None:
        for loss in (loss for loss in losses if loss.needs_teacher):
            if loss.needs_input_gradients:
                raise ValueError(
                    f"{loss.name} derives the teacher's outputs with respect to its inputs, which a cache does not "
                    "hold: give the network itself as the teacher"
                )
            if self.codec.name == "top_k" and any(theirs == "@logits" for _, theirs in loss.pairs):
                at = {m.temperature for m in loss.modules() if hasattr(m, "temperature")}
                if at != {self.codec.temperature}:
                    said = f"temperature {', '.join(sorted(map(str, at)))}" if at else "no temperature"
                    raise ValueError(
                        f"{loss.name} has {said}, and the cache keeps the likeliest classes at temperature "
                        f"{self.codec.temperature}: expected the same, or another codec than top_k"
                    )

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        self.cache = None  # the teacher may have learned since
        return super().bind(student, student_reads, teacher_reads)

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        assert self.observer is not None, "bind first"
        addresses = [address.text for address in self.observer.addresses]
        if not addresses:
            return [Lesson(student, Record())]  # no loss reads it
        keys, cache = self._keys(batch), self._opened(batch)
        found, there = cache.read(addresses, keys)
        if there.any():
            place = int(there.argmax())
            self._same_inputs(batch, place, int(found[addresses[0]]["inputs"][place]))
        if not there.all():
            self._fill(cache, batch, keys, np.flatnonzero(~there), student)
            found, there = cache.read(addresses, keys)
        device = batch.teacher.tensors()[0].device
        taps = {address: cache.decode(address, found[address], device) for address in addresses}
        return [Lesson(student, Record(taps.get("@logits"), taps))]

    def _keys(self, batch: Batch) -> np.ndarray:
        if batch.ids is None:
            raise ValueError(
                "Cached needs sample ids, and the batch has none: wrap the data set in tutelage.data.Indexed, or the "
                "loader in tutelage.data.replayed if it augments"
            )
        ids = batch.ids.detach().cpu().numpy().astype(np.int64)
        if not _samples(batch.teacher, len(ids)):
            sizes = [tuple(t.shape) for t in batch.teacher.tensors()]
            raise ValueError(
                f"Cached: the teacher sees {sizes} where the batch has {len(ids)} ids: expected one for each"
            )
        if len(ids) and ids.min() < 0:
            raise ValueError(f"Cached: the id {ids.min()}: expected 0 or more")
        if batch.replay is None:
            return ids
        return ids * batch.replay.views + batch.replay.view.detach().cpu().numpy()

    def _opened(self, batch: Batch) -> Cache:
        views, seed = (batch.replay.views, batch.replay.seed) if batch.replay is not None else (1, None)
        if self.cache is None:
            teacher = {"class": type(self.module).__qualname__, "sha256": fingerprint(self.module)}
            about = {"teacher": teacher, "seed": seed, "views": views, "codec": self.codec.about}
            self.cache = Cache(self.folder, about)
        if (self.cache.about["views"], self.cache.about["seed"]) != (views, seed):
            raise ValueError(
                f"Cached: the batch is of seed {_said(seed)} and {views} views, and the cache in {self.folder} of "
                f"seed {_said(self.cache.about['seed'])} and {self.cache.about['views']} views"
            )
        return self.cache

    def _fill(self, cache: Cache, batch: Batch, keys: np.ndarray, missing: np.ndarray, student: Record) -> None:
        count, rows = len(keys), torch.from_numpy(missing)
        inputs = batch.teacher.each(lambda x: x[rows.to(x.device)] if x.ndim and len(x) == count else x)
        with torch.autocast(batch.teacher.tensors()[0].device.type, enabled=False):
            (lesson,) = super().lessons(replace(batch, teacher=inputs), student)
        record, marks = lesson.teacher, _marks(inputs, len(missing))
        assert record is not None
        assert self.observer is not None
        for address in self.observer.addresses:
            try:
                cache.write(address.text, keys[missing], record[address.text], marks)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"cache: cannot write {address.text!r} to {self.folder} ({error.strerror or error}); what is "
                    "there is whole and stays",
                ) from error

    def _same_inputs(self, batch: Batch, place: int, mark: int) -> None:
        count = len(batch.ids) if batch.ids is not None else 0
        row = batch.teacher.each(lambda x: x[place : place + 1] if x.ndim and len(x) == count else x)
        if int(_marks(row, 1)[0]) != mark:
            assert batch.ids is not None
            view = "" if batch.replay is None else f", view {int(batch.replay.view[place])}"
            raise ValueError(
                f"cache: {self.folder} was made of other inputs than sample {int(batch.ids[place])}{view} has now: the "
                "data have changed, or are augmented by something that is not replayed (see tutelage.data.replayed)"
            )


def fill(
    role: Cached, batches: Callable[[int], Iterable[Batch]], views: int, after: Callable[[int], None] | None = None
) -> list[Held]:
    """Keep everything that a bound role's losses read, ahead of a training; what is there already is not made again.

    Args:
        role: bound.
        batches: gives the batches of a view.
        views: how many there are.
        after: called with the number of samples after each batch.

    Raises:
        ValueError: there is nothing to keep.
    """
    for view in range(views):
        for batch in batches(view):
            role.lessons(batch, Record())
            if after is not None:
                after(len(batch))
    if role.cache is None:
        raise ValueError("cache: nothing to keep: the data gave no batch, or no loss reads the teacher")
    return role.cache.sum_up()


def _samples(inputs: Inputs, count: int) -> list[Tensor]:
    """The tensors that have a row for each sample."""
    ordered = [*inputs.args, *(inputs.kwargs[name] for name in sorted(inputs.kwargs))]
    return [t for t in ordered if isinstance(t, Tensor) and t.ndim and len(t) == count]


def _marks(inputs: Inputs, count: int) -> np.ndarray:
    """A checksum of each sample's inputs."""
    marks = [0] * count
    for tensor in _samples(inputs, count):
        rows = tensor.detach().cpu().reshape(count, -1).contiguous().view(torch.uint8).numpy()
        marks = [zlib.crc32(row, mark) for row, mark in zip(rows, marks, strict=True)]
    return np.array(marks, np.uint32)


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


def _said(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value['class']} {value['sha256'][:12]}"
    if isinstance(value, dict):
        return ", ".join(str(v) if k == "name" else f"{k}={v}" for k, v in value.items())
    return "none" if value is None else str(value)
