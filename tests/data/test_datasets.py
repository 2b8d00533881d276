"""Datasets from folders, torchvision, Hugging Face and arrays, on tiny generated files."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from tutelage import data


def test_from_numpy_keeps_numbers_and_chooses_types() -> None:
    x, y = np.random.RandomState(0).randn(5, 3), np.arange(5, dtype=np.int32)
    item = data.from_numpy(x, y)[4]
    assert (item[0].dtype, item[1].dtype) == (torch.float32, torch.int64)
    np.testing.assert_allclose(item[0], x[4], rtol=1e-6)
    assert item[1] == 4
    tokens, value = data.from_numpy(np.array([[3, 4]]), [0.5])[0]
    assert tokens.tolist() == [3, 4]
    assert (tokens.dtype, value.dtype) == (torch.int64, torch.float32)
    assert len(data.from_numpy(x)[0]) == 1


def test_from_numpy_refuses_what_it_would_misread() -> None:
    with pytest.raises(TypeError, match="ArrayDataset"):
        data.from_numpy(np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(TypeError, match="labels must be numbers"):
        data.from_numpy(np.zeros((2, 4)), ["a", "b"])
    with pytest.raises(ValueError, match="2 and 3"):
        data.from_numpy(np.zeros((2, 4)), [0, 1, 2])


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    colours = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for i, size in enumerate([(40, 30), (30, 50)]):
            image.new("RGB", size, colour).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("train", [False, True])
def test_image_folder(folder, train: bool) -> None:
    found = data.image_folder(folder, 16, train=train, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert len(found) == 4
    assert found.classes == ["blue", "red"]
    for x, y in found:
        assert x.shape == (3, 16, 16)
        assert x.dtype == torch.float32
        expected = torch.tensor([-1.0, -1.0, 1.0] if y == 0 else [1.0, -1.0, -1.0])
        torch.testing.assert_close(x, expected[:, None, None].expand(3, 16, 16))
    train_part, _ = data.split(found, (0.5, 0.5))
    assert sorted(y for _, y in train_part) == [0, 1]


def test_image_folder_that_is_not_there(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        data.image_folder(tmp_path / "none")
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError):
        data.image_folder(tmp_path)


def test_torchvision_by_name(tmp_path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="torchvision has no dataset 'FashionMnist'; nearest: 'FashionMNIST'"):
        data.torchvision_dataset("FashionMnist", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"SVHN is not in .*download=True"):
        data.torchvision_dataset("SVHN", tmp_path, train=False)
    images = np.random.RandomState(0).randint(0, 256, (3, 28, 28)).astype(np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images[:count].tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, count) + bytes(range(count)))
    train = data.torchvision_dataset("MNIST", tmp_path)
    assert (len(train), len(data.torchvision_dataset("MNIST", tmp_path, train=False))) == (3, 2)
    x, y = train[2]
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), images[2][None] / 255, rtol=1e-6)
    assert y == 2
    raw_item = data.torchvision_dataset("MNIST", tmp_path, transform=np.asarray)[1][0]
    assert np.array_equal(raw_item, images[1])


@pytest.fixture
def rows():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"text": ["a", "b", "c"], "vector": [[0.0], [1.0], [2.0]], "label": [0, 1, 0]})


def test_huggingface_in_memory(rows) -> None:
    named = data.huggingface(rows)[1]
    assert (named["text"], named["vector"].tolist(), int(named["label"])) == ("b", [1.0], 1)
    x, y = data.huggingface(rows, columns=("vector", "label"))[2]
    assert torch.equal(x, torch.tensor([2.0]))
    assert int(y) == 0
    upper = data.huggingface(rows, columns=("text", "label"), transform=str.upper)
    assert [x for x, _ in upper] == ["A", "B", "C"]
    assert upper.targets.tolist() == [0, 1, 0]
    assert data.huggingface(rows, transform=lambda row: sorted(row))[0] == ["label", "text", "vector"]


def test_huggingface_items_batch_and_split(rows) -> None:
    found = data.huggingface(rows, columns=("vector", "label"))
    x, y, ids = next(iter(torch.utils.data.DataLoader(data.Indexed(found), batch_size=3)))
    assert (x.shape, y.tolist(), ids.tolist()) == ((3, 1), [0, 1, 0], [0, 1, 2])
    assert len(data.split(found, (2, 1))[0]) == 2


def test_huggingface_from_disk(rows, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    rows.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "parts")
    assert len(data.huggingface(tmp_path / "single")) == 3
    assert len(data.huggingface(tmp_path / "parts", "test")) == 1
    with pytest.raises(ValueError, match="split: there is no 'tests'; nearest: 'test'"):
        data.huggingface(tmp_path / "parts", "tests")


def test_huggingface_from_a_csv_file(tmp_path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.csv").write_text("x,y\n1.5,0\n2.5,1\n")
    found = data.huggingface(
        "csv", columns=("x", "y"), data_files=str(tmp_path / "a.csv"), cache_dir=str(tmp_path / "cache")
    )
    assert [(float(x), int(y)) for x, y in found] == [(1.5, 0), (2.5, 1)]


def test_huggingface_mistakes(rows) -> None:
    with pytest.raises(ValueError, match="columns: there is no 'labels'; nearest: 'label'"):
        data.huggingface(rows, columns=("text", "labels"))
    with pytest.raises(TypeError, match=r"map-style datasets\.Dataset, got IterableDataset"):
        data.huggingface(rows.to_iterable_dataset())
