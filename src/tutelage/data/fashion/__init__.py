"""A subset of Fashion-MNIST inside the package, so that a real distillation needs no download."""

from __future__ import annotations

import hashlib
import io
import lzma
from pathlib import Path

import numpy as np

from tutelage.data.packed import Images, ImageSet

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
PATH = Path(__file__).with_name("fashion.npz")
SHA256 = "e0d79e196533905b384bf0d45baec39b1ef9f9e834d1738ffa5f0581922195a1"


def _unpacked(stream: np.ndarray) -> Images:
    pixels = np.frombuffer(lzma.decompress(stream.tobytes()), np.uint8)
    # Stored class by class and column by column; given back row by row, with the classes in turn.
    images = pixels.reshape(len(CLASSES), -1, 28, 28).transpose(1, 0, 3, 2).reshape(-1, 28, 28)
    return Images(images, np.arange(len(images), dtype=np.int64) % len(CLASSES))


def fashion_subset(path: str | Path = PATH) -> ImageSet:
    """11,000 training and 3,000 test images of Fashion-MNIST (arXiv:1708.07747), in about half a second.

    Grey uint8 ``(N, 28, 28)``. Image ``i`` has label ``i % 10``, so a prefix whose length is a multiple of
    10 is balanced. The training images are from the original training set, the test images from the
    original test set.

    Args:
        path: another copy of the packaged file.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if the file is not, byte for byte, the one that was packaged.

    >>> data = fashion_subset()
    >>> data.train.images.shape, data.test.images.shape, data.classes[9]
    ((11000, 28, 28), (3000, 28, 28), 'Ankle boot')
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the packaged Fashion-MNIST subset is missing: {path}; reinstall tutelage")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"the packaged Fashion-MNIST subset is damaged: {path} ({len(content):,} bytes) has SHA-256 {found}, "
            f"expected {SHA256}; reinstall tutelage"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return ImageSet(_unpacked(archive["train"]), _unpacked(archive["test"]), CLASSES)
