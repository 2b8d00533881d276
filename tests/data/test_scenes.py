"""Scattered garments: what is said about a scene is what its pixels show."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tutelage.data import (
    Images,
    ImageSet,
    fashion_detection_loaders,
    fashion_keypoint_loaders,
    fashion_subset,
    loaders,
    scattered,
)
from tutelage.data.scenes import FAINT
from tutelage.tasks import task_of


@functools.cache
def garments() -> Images:
    part = fashion_subset().train
    return Images(part.images[:200], part.labels[:200])


@pytest.fixture(autouse=True)
def few(monkeypatch):
    test = fashion_subset().test
    monkeypatch.setattr(
        loaders, "fashion_subset", lambda: ImageSet(garments(), Images(test.images[:40], test.labels[:40]), ())
    )


def halved(image: np.ndarray) -> np.ndarray:
    """One image at half its size, pixel by pixel."""
    small = np.zeros((14, 14), np.uint8)
    for row in range(14):
        for column in range(14):
            mean = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].astype(int).sum() / 4
            small[row, column] = int(mean) if mean >= FAINT else 0
    return small


def test_every_box_ends_where_its_garments_pixels_do_and_nothing_is_outside():
    scenes = scattered(garments(), objects=3)
    for canvas, classes, corners in zip(scenes.canvases, scenes.classes, scenes.corners, strict=True):
        rest = canvas.copy()
        for left, top, right, bottom in corners[classes >= 0]:
            inside = canvas[top:bottom, left:right]
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            rest[top:bottom, left:right] = 0
        assert not rest.any()


def test_scene_i_shows_image_i_whole():
    scenes = scattered(garments(), objects=1)
    assert (scenes.classes[:, 0] == garments().labels).all()
    for n in range(0, 200, 17):
        small = halved(garments().images[n])
        rows, columns = np.nonzero(small)
        cut = small[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        left, top, right, bottom = scenes.corners[n, 0]
        np.testing.assert_array_equal(scenes.canvases[n, top:bottom, left:right], cut)


def test_garments_are_many_or_few_anywhere_and_the_same_for_the_same_seed():
    scenes, again, other = (scattered(garments(), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(scenes.canvases, again.canvases)
    assert (scenes.canvases != other.canvases).any((1, 2)).mean() > 0.9
    counts = np.bincount((scenes.classes >= 0).sum(1), minlength=4)
    assert counts[0] == 0
    assert (counts[1:] > 20).all()
    ends = scenes.corners[scenes.classes >= 0]
    assert ends[:, :2].min() <= 1
    assert ends[:, 2:].max() >= 47
    assert ends.max() <= 48


@pytest.mark.parametrize("objects", [3, 6])
def test_no_two_middles_share_a_cell_so_that_the_grid_holds_every_box(objects):
    scenes = scattered(garments(), objects=objects)
    made = fashion_detection_loaders(validation=60, objects=objects)
    for part in (made.train, made.validation, made.test):
        for batch in part:
            assert ((batch["labels"] > 0).sum((1, 2)) >= 1).all()
    for classes, corners in zip(scenes.classes, scenes.corners, strict=True):
        cells = [tuple((c[:2] + c[2:]) // 16) for c in corners[classes >= 0]]
        assert len(set(cells)) == len(cells)


def test_the_grids_say_where_the_pixels_are():
    loader = fashion_detection_loaders(validation=60, objects=1).validation
    batch = next(iter(loader))
    assert set(batch) == {"images", "labels", "boxes", "ids"}
    dark = batch["images"].amin()
    for image, labels, boxes in zip(batch["images"][:, 0], batch["labels"], batch["boxes"], strict=True):
        ((row, column),) = labels.nonzero().tolist()
        rows, columns = (image > dark + 1e-4).nonzero(as_tuple=True)
        left, top, right, bottom = (8 * boxes[:, row, column]).tolist()
        x, y = 8 * column + 4, 8 * row + 4
        found = (x - left, y - top, x + right, y + bottom)
        assert found == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert boxes.abs().sum() == boxes[:, row, column].abs().sum()


def test_the_heat_maps_peak_at_the_middle_and_the_corners():
    batch = next(iter(fashion_keypoint_loaders(validation=60).validation))
    dark = batch["images"].amin()
    for image, maps, points in zip(batch["images"][:, 0], batch["labels"], batch["points"], strict=True):
        rows, columns = (image > dark + 1e-4).nonzero(as_tuple=True)
        left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        expected = [((left + right) / 2, (top + bottom) / 2), *((x, y) for y in (top, bottom) for x in (left, right))]
        assert points.tolist() == [[float(x), float(y)] for x, y in expected]
        for one, (x, y) in zip(maps, points.tolist(), strict=True):
            row, column = divmod(int(one.argmax()), 12)
            assert abs(4 * column + 2 - x) <= 2
            assert abs(4 * row + 2 - y) <= 2
            assert one[row, column] >= np.exp(-0.25) - 1e-6


@pytest.mark.parametrize("make", [fashion_detection_loaders, fashion_keypoint_loaders])
def test_the_parts_are_apart_and_normalised_as_the_part_that_is_trained_on(make):
    made = make(validation=60, limit=100, batch_size=30)
    assert [len(part.dataset) for part in (made.train, made.validation, made.test)] == [100, 60, 40]
    assert [len(batch["images"]) for batch in made.train] == [30, 30, 30, 10]
    pixels = torch.cat([batch["images"] for batch in made.train])
    assert float(pixels.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(pixels.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    ids = torch.cat([batch["ids"] for batch in made.train])
    assert sorted(ids.tolist()) == list(range(100))
    assert task_of(made.train) is task_of(made.test) is not None
    other = make(validation=60, limit=100, seed=1)
    assert not torch.equal(made.test.dataset.canvases, other.test.dataset.canvases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 44}, "size=44: expected a multiple of 8"),
        ({"size": 8}, "size=8: .* 14 pixels or more"),
        ({"objects": 0}, "objects=0: expected 1 or more"),
        ({"validation": 200}, "validation=200: .* fewer than the 200 training images"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fashion_detection_loaders(**{"validation": 60, **arguments})
    with pytest.raises(ValueError, match="sigma=0: expected a positive number"):
        fashion_keypoint_loaders(validation=60, sigma=0)
    with pytest.raises(ValueError, match=r"\(32, 32\): expected 28×28 grey ones"):
        scattered(Images(np.zeros((1, 32, 32), np.uint8), np.zeros(1, np.int64)))
