"""Classic image sets from packed npz files, or from torchvision's copies.

A packed file is an npz read without pickle. An entry whose name ends in ``__res`` holds uint8 images as
prediction residuals, which compress to about half: the array ``(planes, N, H, W)`` is the difference,
modulo 256, of each pixel from the one to its left, and then of each such difference from the one above;
with three planes these are green, red minus green and blue minus green. Decoding sums again and is exact.
``__ares`` holds int16 sound: the high and the low bytes of the differences, uint8 ``(2, T)``.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutelage.errors import nearest, require

IMAGE_SUFFIX = "__res"
SOUND_SUFFIX = "__ares"


@dataclass(frozen=True)
class Images:
    """Images uint8 ``(N, H, W)`` or ``(N, H, W, C)`` and labels int64 ``(N,)``."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, on the scale 0..1.

        >>> Images(np.array([[[0, 255]]], dtype=np.uint8), np.zeros(1, dtype=np.int64)).statistics()
        ((0.5,), (0.5,))
        """
        planes = self.images.reshape(-1, 1 if self.images.ndim == 3 else self.images.shape[-1])
        levels = np.arange(256) / 255
        means, deviations = [], []
        for channel in range(planes.shape[1]):
            # A histogram of the 256 levels is exact and needs no float copy of the set.
            share = np.bincount(planes[:, channel], minlength=256) / len(planes)
            mean = float(share @ levels)
            means.append(mean)
            deviations.append(float(np.sqrt(share @ (levels - mean) ** 2)))
        return tuple(means), tuple(deviations)


@dataclass(frozen=True)
class ImageSet:
    """A training set, a test set and the names of the classes."""

    train: Images
    test: Images
    classes: tuple[str, ...]


def decode_residuals(residuals: np.ndarray) -> np.ndarray:
    """Images uint8 ``(N, H, W)`` or ``(N, H, W, 3)`` from residuals ``(1 or 3, N, H, W)``.

    Raises:
        ValueError: for another dtype or shape.

    >>> images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    >>> bool((decode_residuals(encode_residuals(images)) == images).all())
    True
    """
    if residuals.dtype != np.uint8 or residuals.ndim != 4 or residuals.shape[0] not in (1, 3):
        raise ValueError(f"residuals must be uint8 (1 or 3, N, H, W), got {residuals.dtype} {residuals.shape}")
    planes = residuals.cumsum(axis=2, dtype=np.uint8).cumsum(axis=3, dtype=np.uint8)
    if len(planes) == 1:
        return planes[0]
    green, red, blue = planes
    return np.stack([red + green, green, blue + green], axis=-1)


def encode_residuals(images: np.ndarray) -> np.ndarray:
    """The inverse of ``decode_residuals``: uint8 images to residuals ``(1 or 3, N, H, W)``.

    Raises:
        ValueError: for another dtype or shape.
    """
    grey = images.ndim == 3
    if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[-1] == 3)):
        raise ValueError(f"images must be uint8 (N, H, W) or (N, H, W, 3), got {images.dtype} {images.shape}")
    if grey:
        planes = images[None]
    else:
        red, green, blue = np.moveaxis(images, -1, 0)
        planes = np.stack([green, red - green, blue - green])
    zero = np.uint8(0)
    return np.diff(np.diff(planes, axis=3, prepend=zero), axis=2, prepend=zero)


def load_packed(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a packed npz; ``name__res`` and ``name__ares`` come back decoded, as ``name``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is no npz, is damaged, or holds pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no packed file at {path}")
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it holds a single array")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable npz of plain arrays: {error}") from error
    decoded = {}
    for name, array in arrays.items():
        if name.endswith(IMAGE_SUFFIX):
            decoded[name.removesuffix(IMAGE_SUFFIX)] = decode_residuals(array)
        elif name.endswith(SOUND_SUFFIX):
            decoded[name.removesuffix(SOUND_SUFFIX)] = _decode_sound(array)
        else:
            decoded[name] = array
    return decoded


def _decode_sound(halves: np.ndarray) -> np.ndarray:
    high, low = halves.astype(np.uint16)
    return np.cumsum((high << 8) | low, dtype=np.uint16).view(np.int16)


def _images(images: np.ndarray, labels: Sequence[int] | np.ndarray, source: object) -> Images:
    marks = np.asarray(labels).astype(np.int64)
    if len(images) != len(marks):
        raise ValueError(f"{source}: {len(images)} images but {len(marks)} labels")
    return Images(np.asarray(images), marks)


def _from_packed(folder: Path) -> ImageSet:
    parts: list[Images] = []
    classes: tuple[str, ...] = ()
    for part in ("train", "test"):
        path = folder / f"{part}.npz"
        arrays = load_packed(path)
        for name in ("images", "labels"):
            if name not in arrays:
                raise ValueError(f"{path} has no array {name!r}{nearest(name, arrays)}")
        parts.append(_images(arrays["images"], arrays["labels"], path))
        if part == "train":
            last = int(parts[0].labels.max(initial=-1))
            names = arrays.get("classes", np.arange(last + 1).astype(str))
            classes = tuple(str(name) for name in names)
    return ImageSet(parts[0], parts[1], classes)


def _load(name: str, torchvision_name: str, root: str | Path | None, download: bool) -> ImageSet:
    given = root if root is not None else os.environ.get("TUTELAGE_DATA")
    if given is None:
        raise FileNotFoundError(
            f"no folder of data sets for {name}: give root=..., or set the environment variable TUTELAGE_DATA"
        )
    base = Path(given).expanduser()
    if (base / name / "train.npz").is_file():
        return _from_packed(base / name)
    try:
        datasets = require("torchvision.datasets", extra="vision")
        make = getattr(datasets, torchvision_name)
        train, test = (make(str(base), train=part, download=download) for part in (True, False))
    except (RuntimeError, ImportError) as error:
        if download:
            raise
        raise FileNotFoundError(
            f"{name} is not in {base}: neither packed ({base / name}/train.npz) nor as torchvision keeps it; "
            "put it there, or pass download=True, for which torchvision must be installed"
        ) from error
    parts = [_images(np.asarray(part.data), part.targets, base) for part in (train, test)]
    return ImageSet(parts[0], parts[1], tuple(train.classes))


def cifar10(root: str | Path | None = None, download: bool = False) -> ImageSet:
    """CIFAR-10: colour images ``(N, 32, 32, 3)`` of 10 classes (Krizhevsky 2009).

    Args:
        root: the folder of data sets; where None, the environment variable TUTELAGE_DATA. The packed files
            ``<root>/cifar10/train.npz`` and ``test.npz`` are read if they are there, and otherwise
            torchvision's copy.
        download: let torchvision fetch what is missing.

    Raises:
        FileNotFoundError: if neither copy is there, or no folder is known.
    """
    return _load("cifar10", "CIFAR10", root, download)


def cifar100(root: str | Path | None = None, download: bool = False) -> ImageSet:
    """CIFAR-100: colour images ``(N, 32, 32, 3)`` of 100 classes (Krizhevsky 2009). See ``cifar10``."""
    return _load("cifar100", "CIFAR100", root, download)


def mnist(root: str | Path | None = None, download: bool = False) -> ImageSet:
    """MNIST: grey images ``(N, 28, 28)`` of 10 digits (LeCun et al. 1998). See ``cifar10``."""
    return _load("mnist", "MNIST", root, download)


def fashion_mnist(root: str | Path | None = None, download: bool = False) -> ImageSet:
    """Fashion-MNIST: grey images ``(N, 28, 28)`` of 10 kinds of clothes (arXiv:1708.07747).

    See ``cifar10``.
    """
    return _load("fashion_mnist", "FashionMNIST", root, download)
