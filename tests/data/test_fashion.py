"""The packaged subset of Fashion-MNIST."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from tutelage.data import fashion, fashion_subset

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def subset():
    return fashion_subset()


def test_sizes_balance_and_order(subset) -> None:
    for part, count in ((subset.train, 11_000), (subset.test, 3_000)):
        assert part.images.shape == (count, 28, 28)
        assert part.images.dtype == np.uint8
        assert np.bincount(part.labels).tolist() == [count // 10] * 10
        assert np.bincount(part.labels[:50]).tolist() == [5] * 10
    assert len(subset.classes) == 10
    assert fashion.PATH.stat().st_size < 5_200_000


def test_images_are_upright_clothes(subset) -> None:
    means = np.stack([subset.train.images[subset.train.labels == c].mean(0) for c in range(10)])
    trousers, sneakers = means[1], means[7]
    # Trousers stand: their middle columns are filled over the whole height, and the sides are empty.
    assert trousers[:, 10:18].mean() > 5 * trousers[:, :6].mean()
    # Shoes lie: their middle rows are filled over the whole width, and the top is empty.
    assert sneakers[13:20].mean() > 5 * sneakers[:6].mean()


def test_no_image_is_in_both_parts_or_twice(subset) -> None:
    train = {image.tobytes() for image in subset.train.images}
    test = {image.tobytes() for image in subset.test.images}
    assert len(train) == 11_000
    assert len(test) == 3_000
    assert not train & test


def test_a_nearest_mean_classifier_works(subset) -> None:
    means = np.stack([subset.train.images[subset.train.labels == c].mean(0).ravel() for c in range(10)])
    flat = subset.test.images.reshape(-1, 784).astype(float)
    guess = (means**2).sum(1)[None] - 2 * flat @ means.T
    assert (guess.argmin(1) == subset.test.labels).mean() > 0.6


def test_damage_is_found(tmp_path) -> None:
    content = bytearray(fashion.PATH.read_bytes())
    content[1_000_000] ^= 1
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: .*bad\.npz .*SHA-256.*reinstall"):
        fashion_subset(tmp_path / "bad.npz")
    (tmp_path / "short.npz").write_bytes(content[:1000])
    with pytest.raises(ValueError, match="damaged"):
        fashion_subset(tmp_path / "short.npz")
    with pytest.raises(FileNotFoundError, match="missing"):
        fashion_subset(tmp_path / "none.npz")


def test_the_licence_travels_with_the_file() -> None:
    text = fashion.PATH.with_name("LICENSE.txt").read_text()
    assert "Copyright (c) 2017 Zalando SE" in text
    assert "Permission is hereby granted, free of charge" in text


def test_the_script_chooses_these_images(subset) -> None:
    script = REPOSITORY / "scripts" / "make_fashion_subset.py"
    source = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    if not script.is_file() or not (source / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip("no full Fashion-MNIST (set FASHION_MNIST to the folder of its idx files)")
    spec = importlib.util.spec_from_file_location("make_fashion_subset", script)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for part, found in (("train", subset.train), ("t10k", subset.test)):
        images = make.read_idx(source, f"{part}-images-idx3-ubyte")
        labels = make.read_idx(source, f"{part}-labels-idx1-ubyte")
        positions = make.chosen(labels, len(found) // 10).T.ravel()
        assert np.array_equal(images[positions], found.images)
        assert np.array_equal(labels[positions], found.labels)
