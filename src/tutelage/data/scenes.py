"""Small garments scattered over a larger canvas, with the boxes and key points that they were put at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tutelage.data import loaders
from tutelage.data.loaders import Loaders
from tutelage.data.packed import Images
from tutelage.data.splits import split
from tutelage.tasks import Task
from tutelage.tasks.detection import GridDetection, encoded
from tutelage.tasks.keypoints import Keypoints, gaussian_maps

GARMENT = 14  # pixels of a garment's side: half of the packaged images'
FAINT = 16  # grey levels below are left out, so that a box ends where the garment does
CELL, MAP_CELL = 8, 4  # pixels of a detector's cell, and of a heat map's


@dataclass(frozen=True)
class Scenes:
    """Canvases with garments.

    Args:
        canvases: (N, size, size) uint8.
        classes: (N, objects) int64 classes of the garments, -1 where there is none; the first one always is.
        corners: (N, objects, 4) int64 left, top, right and bottom of the box around each garment's pixels; right and
            bottom are the first pixels outside.
    """

    canvases: np.ndarray
    classes: np.ndarray
    corners: np.ndarray


def scattered(images: Images, *, size: int = 48, objects: int = 3, seed: int = 0) -> Scenes:
    """Scene i shows image i and up to ``objects`` − 1 others, at half their size, where they do not overlap.

    The number of garments, which ones and where are drawn for each scene, the same for the same images and seed
    (numpy's ``RandomState``, whose stream is frozen). The middles of two boxes are never in the same cell of 8 pixels.

    Args:
        images: grey, 28×28.
        size: pixels of a canvas's side.
        objects: most garments in a scene; a crowded one shows fewer.
        seed: of everything that is drawn.

    Raises:
        ValueError: the images are of another form, the canvas is smaller than a garment, or ``objects`` is below 1.

    >>> pixels = np.full((2, 28, 28), 255, dtype=np.uint8)
    >>> scenes = scattered(Images(pixels, np.array([3, 4])), size=16, objects=1)
    >>> scenes.canvases.shape, scenes.classes.tolist(), (scenes.corners[:, 0, 2:] - scenes.corners[:, 0, :2]).tolist()
    ((2, 16, 16), [[3], [4]], [[14, 14], [14, 14]])
    """
    if images.images.shape[1:] != (2 * GARMENT, 2 * GARMENT):
        raise ValueError(f"images of shape {images.images.shape[1:]}: expected {2 * GARMENT}×{2 * GARMENT} grey ones")
    if size < GARMENT:
        raise ValueError(f"size={size}: expected {GARMENT} pixels or more, the side of a garment")
    if objects < 1:
        raise ValueError(f"objects={objects}: expected 1 or more")
    garments, boxes = _garments(images.images)
    n = len(garments)
    scene = np.arange(n)
    tries = 1 if objects == 1 else 4 * objects
    many, which, place = (np.random.RandomState([seed, kind]) for kind in range(3))
    wanted = many.randint(1, objects + 1, n)
    shown = (which.random_sample((n, tries)) * n).astype(np.int64)
    shown[:, 0] = scene
    at = place.randint(0, size - GARMENT + 1, (n, tries, 2))  # column and row
    canvases = np.zeros((n, size, size), np.uint8)
    classes = np.full((n, objects), -1, np.int64)
    corners = np.zeros((n, objects, 4), np.int64)
    used = np.full((n, objects, 2), -2 * size, np.int64)
    count = np.zeros(n, np.int64)
    for t in range(tries):
        mine = boxes[shown[:, t]] + np.tile(at[:, t], 2)
        apart = np.any(np.abs(used - at[:, None, t]) >= GARMENT, axis=2)
        cells, others = (x // (2 * CELL) for x in (_sums(mine)[:, None], _sums(corners)))
        free = apart & ((cells != others).any(2) | (classes < 0))
        chosen = scene[free.all(1) & (count < wanted)]
        slot = count[chosen]
        classes[chosen, slot] = images.labels[shown[chosen, t]]
        corners[chosen, slot], used[chosen, slot] = mine[chosen], at[chosen, t]
        count[chosen] += 1
        across = np.arange(GARMENT)
        rows, columns = at[chosen, t, 1, None] + across, at[chosen, t, 0, None] + across
        canvases[chosen[:, None, None], rows[:, :, None], columns[:, None, :]] = garments[shown[chosen, t]]
    return Scenes(canvases, classes, corners)


def _sums(corners: np.ndarray) -> np.ndarray:
    """Twice the middles of boxes: column and row."""
    return corners[..., :2] + corners[..., 2:]


def _garments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images at half their size without faint pixels, and the boxes around what is left."""
    small = images.reshape(-1, GARMENT, 2, GARMENT, 2).mean((2, 4))
    small = np.where(small >= FAINT, small, 0).astype(np.uint8)
    ends = []
    for axis in (1, 2):  # left and right from the columns, top and bottom from the rows
        there = small.max(axis) > 0
        ends.append((there.argmax(1), GARMENT - there[:, ::-1].argmax(1)))
    (left, right), (top, bottom) = ends
    return small, np.stack([left, top, right, bottom], 1)


class _SceneSet(Dataset[dict[str, Any]]):
    """Canvases and what is known of each, by the names that a batch's fields have."""

    def __init__(self, scenes: Scenes, truth: dict[str, Tensor], scale: tuple[float, float], task: Task):
        self.canvases, self.truth, self.task = torch.from_numpy(scenes.canvases)[:, None], truth, task
        self.mean, self.std = scale

    def __len__(self) -> int:
        return len(self.canvases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = (self.canvases[index].float() / 255 - self.mean) / self.std
        return {"images": image, **{name: values[index] for name, values in self.truth.items()}, "ids": index}


def fashion_detection_loaders(
    *,
    batch_size: int = 64,
    validation: int = 1000,
    limit: int | None = None,
    objects: int = 3,
    size: int = 48,
    seed: int = 0,
) -> Loaders:
    """Scenes of one to three scattered garments of the packaged Fashion-MNIST subset, for one-stage detectors.

    Batches are dicts: ``images`` (B, 1, size, size) normalised; ``labels`` (B, size/8, size/8), for each cell of 8
    pixels 0 (background) or 1 + the class of the garment whose box has its middle there; ``boxes``
    (B, 4, size/8, size/8), in these cells the distances from the cell's middle to the left, top, right and bottom of
    the box around the garment's pixels, in cells; ``ids``. Their task is
    :class:`tutelage.tasks.detection.GridDetection`, so models are judged by AP@0.5. Scenes of the three parts show
    garments of their own; the test scenes are made from the test images.

    Args:
        batch_size: of training; evaluation uses 250.
        validation: scenes made from images that are taken from the training set for validation.
        limit: use only so many training images, and scenes, for short runs.
        objects: most garments in a scene (:func:`scattered`).
        size: pixels of a canvas's side, a multiple of 8.
        seed: of the splits and scenes (not of the training).

    >>> batch = next(iter(fashion_detection_loaders(limit=100).train))
    >>> batch["images"].shape, batch["labels"].shape, batch["boxes"].shape
    (torch.Size([64, 1, 48, 48]), torch.Size([64, 6, 6]), torch.Size([64, 4, 6, 6]))
    """

    def truth(scenes: Scenes) -> dict[str, Tensor]:
        labels = torch.zeros(len(scenes.classes), size // CELL, size // CELL, dtype=torch.long)
        boxes = torch.zeros(len(labels), 4, *labels.shape[1:])
        scene, slot = (torch.from_numpy(x) for x in np.nonzero(scenes.classes >= 0))
        corners = torch.from_numpy(scenes.corners)[scene, slot]
        cells = torch.from_numpy(_sums(corners.numpy())) // (2 * CELL)
        column, row = cells.unbind(1)
        labels[scene, row, column] = 1 + torch.from_numpy(scenes.classes)[scene, slot]
        boxes[scene, :, row, column] = encoded(corners.float(), cells, CELL)
        return {"labels": labels, "boxes": boxes}

    return _loaders(truth, GridDetection(CELL), CELL, batch_size, validation, limit, objects, size, seed)


def fashion_keypoint_loaders(
    *,
    batch_size: int = 64,
    validation: int = 1000,
    limit: int | None = None,
    size: int = 48,
    sigma: float = 1.0,
    seed: int = 0,
) -> Loaders:
    """Scenes of one scattered garment of the packaged Fashion-MNIST subset, with five key points as heat maps.

    The points are the middle of the box around the garment's pixels and its corners: top left, top right, bottom left,
    bottom right. Batches are dicts: ``images`` (B, 1, size, size) normalised; ``labels`` (B, 5, size/4, size/4), a
    Gaussian around each point; ``points`` (B, 5, 2), x and y in pixels; ``ids``. Their task is
    :class:`tutelage.tasks.keypoints.Keypoints`, so models are judged by the share of points within 2 pixels.

    Args:
        batch_size, validation, limit, seed: as of :func:`fashion_detection_loaders`.
        size: pixels of a canvas's side, a multiple of 4.
        sigma: σ of the Gaussians in cells of 4 pixels.

    >>> batch = next(iter(fashion_keypoint_loaders(limit=100).train))
    >>> batch["labels"].shape, batch["points"].shape
    (torch.Size([64, 5, 12, 12]), torch.Size([64, 5, 2]))
    """
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}: expected a positive number")

    def truth(scenes: Scenes) -> dict[str, Tensor]:
        left, top, right, bottom = torch.from_numpy(scenes.corners[:, 0]).float().unbind(1)
        middle = torch.stack([(left + right) / 2, (top + bottom) / 2], 1)
        corners = [torch.stack(pair, 1) for pair in ((left, top), (right, top), (left, bottom), (right, bottom))]
        points = torch.stack([middle, *corners], 1)
        return {"labels": gaussian_maps(points, size // MAP_CELL, MAP_CELL, sigma), "points": points}

    return _loaders(truth, Keypoints(MAP_CELL), MAP_CELL, batch_size, validation, limit, 1, size, seed)


def _loaders(
    truth: Callable[[Scenes], dict[str, Tensor]],
    task: Task,
    cell: int,
    batch_size: int,
    validation: int,
    limit: int | None,
    objects: int,
    size: int,
    seed: int,
) -> Loaders:
    if size % cell or size < GARMENT:
        raise ValueError(f"size={size}: expected a multiple of {cell}, and {GARMENT} pixels or more")
    images = loaders.fashion_subset()
    count = len(images.train)
    if not 0 < validation < count:
        raise ValueError(f"validation={validation}: expected 1 or more, and fewer than the {count} training images")
    held_out, rest = split(images.train.labels, (validation, count - validation), seed=seed)
    if limit is not None and limit < len(rest):
        rest = rest[split(images.train.labels[rest], (limit,), seed=seed)[0]]

    def part(source: Images, chosen: Sequence[int] | np.ndarray | slice, number: int) -> Scenes:
        taken = Images(source.images[chosen], source.labels[chosen])
        return scattered(taken, size=size, objects=objects, seed=4 * seed + number)

    parts = (part(images.train, rest, 0), part(images.train, held_out, 1), part(images.test, slice(None), 2))
    (mean,), (std,) = Images(parts[0].canvases, parts[0].classes).statistics()
    sets = [_SceneSet(scenes, truth(scenes), (mean, std), task) for scenes in parts]
    train = DataLoader(sets[0], batch_size=batch_size, shuffle=True)
    return Loaders(train, *(DataLoader(judged, batch_size=250) for judged in sets[1:]))
