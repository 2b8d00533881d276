"""Make the packaged subset of Fashion-MNIST from the full set.

    python scripts/make_fashion_subset.py --source <folder with the four idx files, gzipped or not>
    python scripts/make_fashion_subset.py --download

The same images every time: of every class, the first ``--train / 10`` of a seeded permutation of the
training files, and ``--test / 10`` of the test files. Prints the SHA-256 to put into
``tutelage/data/fashion/__init__.py``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import lzma
import tempfile
from pathlib import Path

import numpy as np

from tutelage.data.fashion import CLASSES
from tutelage.files import replacing

TARGET = Path(__file__).resolve().parents[1] / "src" / "tutelage" / "data" / "fashion" / "fashion.npz"
SEED = 2017
# Literal context of four bits and no position bits: grey bytes are alike in the high half and not aligned.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The uint8 array of an idx file: two zero bytes, type 8, the rank, big-endian sizes, the values."""
    path = folder / f"{name}.gz"
    if path.is_file():
        data = gzip.decompress(path.read_bytes())
    elif (folder / name).is_file():
        data = (folder / name).read_bytes()
    else:
        raise SystemExit(f"neither {name}.gz nor {name} is in {folder}")
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an idx file of bytes")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def chosen(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Positions ``(classes, per_class)``, row ``c`` holding images of class ``c``."""
    random = np.random.RandomState(SEED)
    return np.stack([random.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(len(CLASSES))])


def packed(folder: Path, part: str, count: int) -> np.ndarray:
    images = read_idx(folder, f"{part}-images-idx3-ubyte")
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
    # Class by class and column by column is what compresses best: clothes are more alike up and down.
    images = images[chosen(labels, count // len(CLASSES))].swapaxes(2, 3)
    return np.frombuffer(lzma.compress(images.tobytes(), filters=FILTERS), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--source", type=Path, help="folder of the idx files")
    where.add_argument("--download", action="store_true", help="fetch them with torchvision")
    parser.add_argument("--train", type=int, default=11000, help="training images, a multiple of 10")
    parser.add_argument("--test", type=int, default=3000, help="test images, a multiple of 10")
    parser.add_argument("--target", type=Path, default=TARGET)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.source
        if arguments.download:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(temporary, download=True)
            folder = Path(temporary) / "FashionMNIST" / "raw"
        train = packed(folder, "train", arguments.train)
        test = packed(folder, "t10k", arguments.test)
    with replacing(arguments.target) as beside:
        np.savez(beside, train=train, test=test)
    content = arguments.target.read_bytes()
    print(f"{arguments.target}: {len(content):,} bytes, SHA256 = {hashlib.sha256(content).hexdigest()!r}")


if __name__ == "__main__":
    main()
