"""Batches of sets in memory: the same as a naive loop, reproducible, and shared without overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tutelage.data import ArrayDataset, ArrayLoader, CropFlip

IMAGES = np.random.RandomState(0).randint(0, 256, (23, 6, 8, 3)).astype(np.uint8)
LABELS = np.arange(23) % 4


def epoch(seed: int, **options):
    loader = ArrayLoader(IMAGES, LABELS, **{"batch_size": 5, "shuffle": True, "augment": CropFlip(2), **options})
    torch.manual_seed(seed)
    return list(loader)


def equal(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def naive_crop_flip(image: np.ndarray, padding: int, row: int, column: int, mirrored: bool) -> np.ndarray:
    channels, height, width = image.shape
    out = np.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                y, x = i + row - padding, j + column - padding
                if mirrored:
                    x = width - 1 - j + column - padding
                if 0 <= y < height and 0 <= x < width:
                    out[c, i, j] = image[c, y, x]
    return out


@pytest.mark.parametrize(("padding", "flip"), [(3, True), (1, False), (0, True), (0, False)])
def test_crop_flip_is_the_naive_loop(padding: int, flip: bool) -> None:
    batch = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    torch.manual_seed(5)
    out = CropFlip(padding, flip)(batch)
    torch.manual_seed(5)
    rows, columns = torch.randint(2 * padding + 1, (23,)), torch.randint(2 * padding + 1, (23,))
    mirrored = torch.rand(23) < 0.5 if flip else torch.zeros(23, dtype=torch.bool)
    assert out.dtype == torch.uint8
    for i, image in enumerate(batch.numpy()):
        expected = naive_crop_flip(image, padding, int(rows[i]), int(columns[i]), bool(mirrored[i]))
        assert np.array_equal(out[i].numpy(), expected)


def test_crop_flip_reaches_every_shift_and_both_sides() -> None:
    marker = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    marker[:, :, 2, 2] = 1
    marker[:, :, 2, 3] = 2
    out = CropFlip(1)(marker)
    places = {tuple((image[0] == 1).nonzero()[0].tolist()) for image in out}
    assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}
    mirrored = torch.stack([(image == 2).nonzero()[0, 2] < (image == 1).nonzero()[0, 2] for image in out])
    assert 0.45 < mirrored.float().mean() < 0.55


def test_one_image_is_a_batch_of_one() -> None:
    image = torch.from_numpy(IMAGES[0]).permute(2, 0, 1)
    torch.manual_seed(1)
    single = CropFlip(2)(image)
    torch.manual_seed(1)
    assert torch.equal(single, CropFlip(2)(image[None])[0])


def test_plain_batches_are_the_normalised_images() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    loader = ArrayLoader(IMAGES, LABELS, batch_size=7, mean=mean, std=std)
    inputs, labels, ids = (torch.cat(parts) for parts in zip(*loader, strict=True))
    expected = ((IMAGES / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    assert (inputs.dtype, labels.dtype, ids.dtype) == (torch.float32, torch.int64, torch.int64)
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(labels, LABELS)
    assert np.array_equal(ids, np.arange(23))


def test_an_epoch_is_fixed_by_the_global_seed() -> None:
    assert equal(epoch(3), epoch(3))
    assert not equal(epoch(3), epoch(4))


def test_two_epochs_differ() -> None:
    loader = ArrayLoader(IMAGES, LABELS, batch_size=5, shuffle=True, augment=CropFlip(2))
    torch.manual_seed(0)
    assert not equal(list(loader), list(loader))


def test_what_the_model_draws_between_batches_changes_nothing() -> None:
    loader = ArrayLoader(IMAGES, LABELS, batch_size=5, shuffle=True, augment=CropFlip(2))
    torch.manual_seed(3)
    batches = []
    for batch in loader:
        torch.rand(17)
        batches.append(batch)
    assert equal(batches, epoch(3))


def test_the_loader_draws_only_when_the_iteration_starts() -> None:
    iterator = iter(ArrayLoader(IMAGES, LABELS, batch_size=5, shuffle=True, augment=CropFlip(2)))
    before = torch.get_rng_state()
    list(iterator)
    assert torch.equal(before, torch.get_rng_state())


def test_numpys_and_pythons_generators_are_not_used() -> None:
    import random

    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    first = epoch(3)
    np.random.seed(2)  # noqa: NPY002
    random.seed(2)
    assert equal(first, epoch(3))


def test_ids_name_the_images_whatever_the_order() -> None:
    for inputs, labels, ids in epoch(0, augment=None, indices=[20, 3, 5, 7, 11, 2]):
        assert set(ids.tolist()) <= {20, 3, 5, 7, 11, 2}
        expected = torch.from_numpy(IMAGES[ids.numpy()]).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(inputs, expected)
        assert np.array_equal(labels, LABELS[ids.numpy()])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("count", "batch_size", "world"), [(23, 5, 1), (23, 5, 2), (21, 5, 4), (23, 7, 3), (8, 2, 4), (4, 9, 4)]
)
def test_ranks_share_an_epoch_without_overlap(count: int, batch_size: int, world: int, drop_last: bool) -> None:
    shares = []
    for rank in range(world):
        loader = ArrayLoader(
            IMAGES[:count], batch_size=batch_size, shuffle=True, drop_last=drop_last, rank=rank, world_size=world
        )
        torch.manual_seed(9)
        batches = [ids.tolist() for _, _, ids in loader]
        assert len(batches) == len(loader)
        assert all(batches)
        shares.append(batches)
    assert len({len(batches) for batches in shares}) == 1
    seen = [i for batches in shares for batch in batches for i in batch]
    assert len(seen) == len(set(seen))
    largest = max((len(batch) for batches in shares for batch in batches), default=0)
    if drop_last:
        assert len(seen) == count // (batch_size * world) * batch_size * world
        assert largest in (0, batch_size)
    else:
        assert sorted(seen) == list(range(count))
        assert largest <= batch_size + (world > 1)


def test_ranks_augment_differently() -> None:
    same = np.repeat(IMAGES[:1], 32, axis=0)
    shares = []
    for rank in (0, 1):
        torch.manual_seed(0)
        loader = ArrayLoader(same, batch_size=16, augment=CropFlip(3), rank=rank, world_size=2)
        shares.append(next(iter(loader))[0])
    assert not torch.equal(*shares)


def test_the_process_group_is_read_when_it_is_there() -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    loader = ArrayLoader(IMAGES, LABELS, batch_size=2)
    assert (loader.rank, loader.world_size, len(loader)) == (0, 1, 12)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        assert (loader.rank, loader.world_size, len(loader)) == (2, 3, 4)
        assert next(iter(loader))[2].tolist() == [2, 5]
    finally:
        torch.distributed.destroy_process_group()


def test_lengths_and_the_dataset() -> None:
    loader = ArrayLoader(IMAGES, LABELS, batch_size=5, indices=np.arange(11))
    assert (len(loader), len(loader.dataset), loader.batch_size) == (3, 11, 5)
    assert (
        len(ArrayLoader(IMAGES, batch_size=5, drop_last=True))
        == len(list(ArrayLoader(IMAGES, batch_size=5, drop_last=True)))
        == 4
    )
    assert len(ArrayLoader(IMAGES[:0], batch_size=5)) == len(list(ArrayLoader(IMAGES[:0], batch_size=5))) == 0


def test_without_labels_and_without_ids() -> None:
    inputs, labels, _ = next(iter(ArrayLoader(IMAGES, batch_size=4)))
    assert labels.tolist() == [-100] * 4
    batch = next(iter(ArrayLoader(IMAGES, LABELS, batch_size=4, ids=False)))
    assert len(batch) == 2
    assert torch.equal(batch[0], inputs)


def test_memory_formats_hold_the_same_numbers() -> None:
    plain, last = epoch(1), epoch(1, channels_last=True)
    assert equal(plain, last)
    assert plain[0][0].is_contiguous()
    assert last[0][0].is_contiguous(memory_format=torch.channels_last)


def test_grey_images_torch_tensors_and_read_only_arrays() -> None:
    grey = IMAGES[..., 0].copy()
    grey.flags.writeable = False
    a = next(iter(ArrayLoader(grey, LABELS.tolist(), batch_size=3)))
    b = next(iter(ArrayLoader(torch.tensor(grey)[..., None], torch.tensor(LABELS), batch_size=3)))
    assert a[0].shape == (3, 1, 6, 8)
    assert equal([a], [b])


def test_array_dataset_in_a_data_loader_gives_the_same_batches() -> None:
    options = {"mean": (0.1, 0.2, 0.3), "std": 0.5, "indices": [4, 1, 20]}
    data = ArrayDataset(IMAGES, LABELS, **options)
    inputs, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
    expected = next(iter(ArrayLoader(IMAGES, LABELS, batch_size=3, ids=False, **options)))
    assert equal([(inputs, labels)], [expected])
    assert torch.equal(data.targets, labels)
    assert len(list(data)) == 3


def test_array_dataset_transforms_the_uint8_image() -> None:
    data = ArrayDataset(IMAGES, LABELS, transform=lambda image: 255 - image)
    torch.testing.assert_close(data[2][0], 1 - ArrayDataset(IMAGES, LABELS)[2][0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGES.astype(np.float32)}, TypeError, "images must be uint8"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, ValueError, r"channels come last: permute\(0, 2, 3, 1\)"),
        ({"labels": LABELS[:5]}, ValueError, "differ in length: 23 and 5"),
        ({"labels": LABELS / 2}, TypeError, "labels must be integers"),
        ({"mean": (0.1, 0.2)}, ValueError, "mean must be one number or one for each of 3 channels, got 2"),
        ({"std": 0.0}, ValueError, "std must be positive"),
        ({"indices": [23]}, ValueError, r"positions 0\.\.22"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be from 0 to world_size - 1 = 1, got 2"),
    ],
)
def test_mistakes_are_named(change, error, message) -> None:
    with pytest.raises(error, match=message):
        ArrayLoader(**{"images": IMAGES, "labels": LABELS, "batch_size": 4, **change})


def test_too_few_items_for_the_processes() -> None:
    with pytest.raises(ValueError, match="3 items cannot be shared by 4 processes"):
        list(ArrayLoader(IMAGES[:3], batch_size=2, rank=0, world_size=4))
