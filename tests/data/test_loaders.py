"""Batches for recipes: parts that do not overlap, ids that number what is trained on, labels that stay or go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tutelage.data import (
    Images,
    ImageSet,
    cifar10_loaders,
    cifar100_loaders,
    dataset_loaders,
    fashion_loaders,
    image_loaders,
    loaders,
)


@pytest.fixture
def images() -> ImageSet:
    """Ten classes; every training image is a constant of its own."""
    levels = np.arange(200, dtype=np.uint8)
    train = Images(np.broadcast_to(levels[:, None, None], (200, 6, 6)).copy(), np.arange(200) % 10)
    return ImageSet(train, Images(np.zeros((30, 6, 6), np.uint8), np.arange(30) % 10), tuple("abcdefghij"))


PLAIN = {"validation": 50, "crop": 0, "flip": False, "mean": [0.0], "std": [1 / 255], "batch_size": 16}


def pixels(batches) -> list[int]:
    return [round(float(image.flatten()[0])) for batch in batches for image in batch[0]]


def test_training_and_validation_are_disjoint_and_complete(images):
    made = image_loaders(images, **PLAIN)
    train, validation = pixels(made.train), pixels(made.validation)
    assert sorted(train + validation) == list(range(200))
    assert np.bincount(np.array(validation) % 10).tolist() == [5] * 10
    assert sum(len(batch[0]) for batch in made.test) == 30


@pytest.mark.parametrize("limit", [None, 40])
def test_ids_number_the_images_that_are_trained_on(images, limit):
    made = image_loaders(images, **PLAIN, limit=limit)
    count = len(made.train.dataset)
    assert count == (limit or 150)
    assert sorted(int(i) for _, _, ids in made.train for i in ids) == list(range(count))
    first = {int(i): p for batch in made.train for i, p in zip(batch[2], pixels([batch]), strict=True)}
    again = {int(i): p for batch in made.train for i, p in zip(batch[2], pixels([batch]), strict=True)}
    assert first == again  # in another order


def test_limit_keeps_the_classes_in_proportion_and_the_validation_part(images):
    whole, part = (image_loaders(images, **PLAIN, limit=limit) for limit in (None, 40))
    assert torch.bincount(part.train.dataset.targets).tolist() == [4] * 10
    assert pixels(whole.validation) == pixels(part.validation)


def test_labels_that_are_taken_away(images):
    made = image_loaders(images, **PLAIN, limit=100, labelled_per_class=3)
    labels = torch.cat([labels for _, labels, _ in made.train])
    assert torch.bincount(labels[labels >= 0]).tolist() == [3] * 10
    assert (labels == -100).sum() == 70
    assert all((labels >= 0).all() for _, labels, _ in made.validation)


def test_normalised_by_the_part_that_is_trained_on(images):
    made = image_loaders(images, **{**PLAIN, "mean": None, "std": None}, limit=40)
    x = torch.cat([batch[0] for batch in made.train])
    assert float(x.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(x.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_a_given_mean_is_used_without_a_std(images):
    made = image_loaders(images, **{**PLAIN, "mean": [0.5], "std": None})
    assert made.train.dataset._shift.item() == pytest.approx(-0.5 / images_std(made))


def images_std(made) -> float:
    return float((made.train.dataset.images.double() / 255).std(correction=0))


def test_the_seed_chooses_the_validation_part(images):
    assert pixels(image_loaders(images, **PLAIN).validation) == pixels(image_loaders(images, **PLAIN).validation)
    assert pixels(image_loaders(images, **PLAIN).validation) != pixels(
        image_loaders(images, **PLAIN, seed=1).validation
    )


@pytest.mark.parametrize("validation", [0, 200, -1])
def test_a_validation_part_that_cannot_be(images, validation):
    with pytest.raises(ValueError, match=f"validation={validation}: expected 1 or more, and fewer than the 200"):
        image_loaders(images, validation=validation)


def test_channels_last(images):
    coloured = ImageSet(*(Images(np.stack([p.images] * 3, 3), p.labels) for p in (images.train, images.test)), ())
    made = image_loaders(coloured, validation=50, channels_last=True)
    for loader in (made.train, made.validation, made.test):
        assert next(iter(loader))[0].is_contiguous(memory_format=torch.channels_last)


def test_fashion():
    made = fashion_loaders(limit=100, batch_size=30)
    x, _, ids = next(iter(made.train))
    assert x.shape == (30, 1, 28, 28)
    assert int(ids.max()) < 100
    assert len(made.validation.dataset) == 1000
    assert len(made.test.dataset) == 3000


@pytest.mark.parametrize(("name", "make"), [("cifar10", cifar10_loaders), ("cifar100", cifar100_loaders)])
def test_cifar_from_packed_files(tmp_path, name, make):
    (tmp_path / name).mkdir()
    for part, n in (("train", 300), ("test", 20)):
        colours = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / name / f"{part}.npz", images=colours, labels=np.arange(n) % 10)
    made = make(tmp_path, validation=50, limit=100, labelled_per_class=2, batch_size=25)
    assert [batch[0].shape for batch in made.train] == [(25, 3, 32, 32)] * 4
    assert sum(int((labels >= 0).sum()) for _, labels, _ in made.train) == 20
    if name == "cifar10":
        raw = np.load(tmp_path / name / "test.npz")["images"][0].transpose(2, 0, 1) / 255
        expected = (raw - np.array(loaders.CIFAR_MEAN)[:, None, None]) / np.array(loaders.CIFAR_STD)[:, None, None]
        np.testing.assert_allclose(made.test.dataset[0][0].numpy(), expected, atol=1e-5)


def test_real_cifar10(data_root):
    made = cifar10_loaders(data_root, limit=100)
    assert len(made.test.dataset) == 10000
    assert len(made.train.dataset) == 100


def test_any_data_set():
    data = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40) % 4)
    made = dataset_loaders(data, 0.25, batch_size=8)
    train = torch.cat([x.flatten() for x, _, _ in made.train]).tolist()
    validation = torch.cat([x.flatten() for x, _ in made.validation]).tolist()
    assert sorted(train + validation) == list(range(40))
    assert sorted(torch.cat([ids for _, _, ids in made.train]).tolist()) == list(range(30))
    assert torch.cat([y for _, y in made.validation]).bincount().max() <= 3
    assert made.test is None
    given = dataset_loaders(data, data, data, batch_size=8)
    assert (len(given.train), len(given.validation), len(given.test)) == (5, 3, 3)
