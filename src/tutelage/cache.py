"""A teacher whose outputs are kept on disk: it runs once for each view of a sample, however many epochs and runs.

What its folder holds, and how good that is, :meth:`tutelage.cache_folder.Cache.held` says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.cache_folder import Cache, Held, said
from tutelage.codecs import Codec, Name
from tutelage.fingerprint import fingerprint
from tutelage.knowledge.base import Loss
from tutelage.record import Record
from tutelage.teachers import Frozen, Lesson
from tutelage.views import Batch, Inputs


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
                    has = f"temperature {', '.join(sorted(map(str, at)))}" if at else "no temperature"
                    raise ValueError(
                        f"{loss.name} has {has}, and the cache keeps the likeliest classes at temperature "
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
                f"Cached: the batch is of seed {said(seed)} and {views} views, and the cache in {self.folder} of "
                f"seed {said(self.cache.about['seed'])} and {self.cache.about['views']} views"
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
        assert batch.ids is not None
        count = len(batch.ids)
        row = batch.teacher.each(lambda x: x[place : place + 1] if x.ndim and len(x) == count else x)
        if int(_marks(row, 1)[0]) != mark:
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
