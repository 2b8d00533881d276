"""Image sets that fit in memory: augmented and normalised a whole batch at a time, without workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from tutelage.data.keyed import uniform
from tutelage.views import UNLABELLED


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    array = np.asarray(array)
    # torch shares memory with an array, and warns where that memory may not be written.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class CropFlip:
    """Random shifts and mirror images of a whole batch: pad with zeros, crop the old size, flip.

    Works on ``(N, C, H, W)`` or on one ``(C, H, W)``, of any dtype. Every image has its own shift, uniform on
    ``{-padding..padding}`` in each direction, and is mirrored left-right with probability one half. Draws
    from torch's global CPU generator, three calls a batch: vertical offsets, horizontal offsets, flips.

    Args:
        padding: zeros added on every side before the crop; 0 for no shift.
        flip: whether to mirror.

    >>> CropFlip(padding=4)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        if padding < 0:
            raise ValueError(f"padding must not be negative, got {padding}")
        self.padding = padding
        self.flip = flip

    def __call__(self, images: Tensor) -> Tensor:
        if images.ndim == 3:
            return self(images[None])[0]
        n, span = len(images), 2 * self.padding + 1
        rows = torch.randint(span, (n,))
        columns = torch.randint(span, (n,))
        mirrored = torch.rand(n) < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool)
        return self._moved(images, rows, columns, mirrored)

    def replay(self, images: Tensor, keys: np.ndarray) -> Tensor:
        """The same with each image's draws from its key alone, so that a key gives one image in every batch.

        Args:
            images: (N, C, H, W).
            keys: (N,) uint64 (:func:`tutelage.data.keyed.keys_of`).
        """
        span = 2 * self.padding + 1
        rows, columns = (torch.from_numpy((uniform(keys, n) * span).astype(np.int64)) for n in (0, 1))
        mirrored = torch.from_numpy((uniform(keys, 2) < 0.5) & self.flip)
        return self._moved(images, rows, columns, mirrored)

    def _moved(self, images: Tensor, rows: Tensor, columns: Tensor, mirrored: Tensor) -> Tensor:
        n, _, height, width = images.shape
        p = self.padding
        if p == 0 and not self.flip:
            return images
        # One gather does crop and flip: each output pixel names the input pixel it is read from.
        down = rows[:, None] + torch.arange(height)
        across = torch.arange(width).expand(n, width)
        across = torch.where(mirrored[:, None], width - 1 - across, across) + columns[:, None]
        padded = F.pad(images, (p, p, p, p)).permute(0, 2, 3, 1)
        item = torch.arange(n)[:, None, None]
        return padded[item, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)

    def __repr__(self) -> str:
        return f"CropFlip(padding={self.padding}, flip={self.flip})"


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """A map-style dataset over arrays in memory, for use with a ``DataLoader``.

    An item is ``(x, y)``: ``x`` float32 ``(C, H, W)``, equal to ``(pixel / 255 - mean) / std``, and ``y``
    int64.

    Args:
        images: uint8 ``(N, H, W)`` or ``(N, H, W, C)``, numpy or torch; not copied.
        labels: integers ``(N, ...)``; where None, every label is ``UNLABELLED`` (-100).
        mean: one number, or one for each channel, on the scale 0..1.
        std: the same, positive.
        transform: applied to the uint8 ``(C, H, W)`` image before it is normalised, for instance
            ``CropFlip()``.
        indices: the positions to use, in order; all where None.

    Attributes:
        images: all images, uint8 ``(N, H, W, C)``.
        labels: all labels, int64.
        indices: the position in ``images`` of each item.
        classes: names of the labels, for people; may be set, and is empty at first.

    Raises:
        TypeError: for images that are not uint8, or labels that are not integers.
        ValueError: for other shapes, lengths that differ, indices out of range, or a mean or std that does
            not fit.

    >>> data = ArrayDataset(np.full((5, 8, 8), 255, dtype=np.uint8), np.arange(5), mean=0.5, std=0.5)
    >>> x, y = data[3]
    >>> x.shape, x.max().item(), y.item()
    (torch.Size([1, 8, 8]), 1.0, 3)
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | Sequence[int] | None = None,
        *,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        transform: Callable[[Tensor], Tensor] | None = None,
        indices: np.ndarray | Tensor | Sequence[int] | None = None,
    ) -> None:
        pixels = _tensor(images)
        if pixels.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 (0..255), got {pixels.dtype}")
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        if pixels.ndim != 4 or pixels.shape[-1] > 4:
            raise ValueError(
                f"images must have shape (N, H, W) or (N, H, W, C) with C <= 4, got {tuple(pixels.shape)}"
                "; channels come last: permute(0, 2, 3, 1)"
            )
        n, channels = len(pixels), pixels.shape[-1]
        if labels is None:
            marks = torch.full((n,), UNLABELLED, dtype=torch.int64)
        else:
            marks = _tensor(labels)
            if marks.is_floating_point() or marks.is_complex():
                raise TypeError(f"labels must be integers, got {marks.dtype}")
            marks = marks.to(torch.int64)
        if len(marks) != n:
            raise ValueError(f"images and labels differ in length: {n} and {len(marks)}")
        # The copy keeps a caller's later shuffle of its own array out of this dataset.
        chosen = torch.arange(n) if indices is None else _tensor(indices).to(torch.int64).clone()
        if chosen.ndim != 1 or (len(chosen) and (chosen.min() < 0 or chosen.max() >= n)):
            raise ValueError(f"indices must be positions 0..{n - 1} in one dimension")
        self.images, self.labels, self.indices, self.transform = pixels, marks, chosen, transform
        self.classes: tuple[str, ...] = ()
        centre = torch.as_tensor(mean, dtype=torch.float64).reshape(-1, 1, 1)
        spread = torch.as_tensor(std, dtype=torch.float64).reshape(-1, 1, 1)
        for name, value in (("mean", centre), ("std", spread)):
            if len(value) not in (1, channels):
                raise ValueError(f"{name} must be one number or one for each of {channels} channels, got {len(value)}")
        if not (spread > 0).all():
            raise ValueError(f"std must be positive, got {std}")
        self._scale = (1 / (255 * spread)).float()
        self._shift = (-centre / spread).float()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def targets(self) -> Tensor:
        """The labels of the items, in their order."""
        return self.labels[self.indices]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        position = self.indices[index]
        image = self.images[position].permute(2, 0, 1)
        if self.transform is not None:
            image = self.transform(image)
        return self.normalise(image), self.labels[position]

    def normalise(self, images: Tensor) -> Tensor:
        """``(pixel / 255 - mean) / std`` of uint8 ``(..., C, H, W)``, as float32."""
        return images.to(torch.float32).mul_(self._scale).add_(self._shift)


class ArrayLoader:
    """Batches ``(inputs, labels, ids)`` of a set in memory, faster than a ``DataLoader`` with workers.

    ``inputs`` is float32 ``(B, C, H, W)``, equal to ``(pixel / 255 - mean) / std``; ``labels`` is int64
    (-100, the index that cross-entropy ignores, where there are none); ``ids`` is int64, the item's
    position in ``images``, so the same for every order, rank and subset.

    Randomness comes from torch's global CPU generator and from nowhere else, and all of it is drawn when the
    iteration starts: first the permutation (if ``shuffle``), then one seed (if ``augment``). Batch ``b`` is
    augmented under a generator seeded from that seed, ``b`` and the rank, and the global generator is left
    as it was: so ``torch.manual_seed(s)`` before an epoch fixes the epoch, whatever the model draws between
    batches, and skipped batches do not change those that follow.

    With ``torch.distributed`` every rank must iterate under the same seed. The epoch's order is cut into
    global batches of ``batch_size * world_size`` and each rank takes every ``world_size``-th item of each:
    the shares are disjoint, together they are the whole set, and every rank has the same number of batches.
    A last global batch too small to give every rank an item is joined to the one before, so that a batch
    may there hold one item more than ``batch_size``.

    Args:
        images: uint8 ``(N, H, W)`` or ``(N, H, W, C)``, numpy or torch; not copied.
        labels: integers ``(N, ...)``, or None.
        batch_size: items in a batch, on each rank.
        shuffle: a new order for every epoch.
        augment: called with the uint8 ``(B, C, H, W)`` batch, returns the same shape; see ``CropFlip``. It
            should draw from torch's global CPU generator.
        mean: one number, or one for each channel, on the scale 0..1.
        std: the same, positive.
        drop_last: leave out a last global batch that is not full.
        ids: False for batches ``(inputs, labels)``.
        channels_last: inputs in ``torch.channels_last`` memory format.
        indices: the positions to use; all where None.
        rank: this process's number; where None it is read from ``torch.distributed``, or 0.
        world_size: the number of processes; where None it is read from ``torch.distributed``, or 1.

    Attributes:
        dataset: the items as an ``ArrayDataset``, without augmentation; its length is the whole set's, on
            every rank.
        batch_size: as given.

    Raises:
        TypeError, ValueError: as ``ArrayDataset``; also for a batch size below 1, fewer items than
            processes, or a rank outside the world.

    >>> loader = ArrayLoader(np.zeros((10, 28, 28), np.uint8), np.arange(10), batch_size=4)
    >>> [ids.tolist() for inputs, labels, ids in loader]
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | Sequence[int] | None = None,
        *,
        batch_size: int,
        shuffle: bool = False,
        augment: Callable[[Tensor], Tensor] | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        drop_last: bool = False,
        ids: bool = True,
        channels_last: bool = False,
        indices: np.ndarray | Tensor | Sequence[int] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.dataset = ArrayDataset(images, labels, mean=mean, std=std, indices=indices)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.drop_last = drop_last
        self.ids = ids
        self.channels_last = channels_last
        self._rank = rank
        self._world_size = world_size
        if world_size is not None and not 0 <= self.rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {self.rank}")

    # Read when used, not when built: a process group may be initialised after its loaders.
    @property
    def rank(self) -> int:
        """The number of this process."""
        if self._rank is not None:
            return self._rank
        return torch.distributed.get_rank() if _distributed() else 0

    @property
    def world_size(self) -> int:
        """The number of processes that share an epoch."""
        if self._world_size is not None:
            return self._world_size
        return torch.distributed.get_world_size() if _distributed() else 1

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank."""
        full, rest = divmod(len(self.dataset), self.batch_size * self.world_size)
        if self.drop_last:
            return full
        return full + (rest >= self.world_size or (full == 0 and rest > 0))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.dataset)) if self.shuffle else torch.arange(len(self.dataset))
        seed = int(torch.randint(2**62, ())) if self.augment is not None else 0
        return self._batches(self.dataset.indices[order], seed)

    def _batches(self, order: Tensor, seed: int) -> Iterator[tuple[Tensor, ...]]:
        rank, world = self.rank, self.world_size
        if 0 < len(order) < world:
            raise ValueError(f"{len(order)} items cannot be shared by {world} processes")
        whole, count = self.batch_size * world, len(self)
        for number in range(count):
            last = number == count - 1 and not self.drop_last
            ids = order[number * whole : None if last else (number + 1) * whole][rank::world]
            yield self._batch(ids, seed + number * world + rank)

    def _batch(self, ids: Tensor, seed: int) -> tuple[Tensor, ...]:
        data = self.dataset
        images = data.images[ids].permute(0, 3, 1, 2)
        if self.augment is not None:
            images = self._augmented(images, ids, seed)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        inputs = data.normalise(images.contiguous(memory_format=layout))
        return (inputs, data.labels[ids], ids) if self.ids else (inputs, data.labels[ids])

    def _augmented(self, images: Tensor, ids: Tensor, seed: int) -> Tensor:
        assert self.augment is not None
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the accelerators as well.
            torch.default_generator.manual_seed(seed)
            return self.augment(images)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
