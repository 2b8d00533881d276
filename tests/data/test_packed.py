"""Packed files, and the sets read from them or from torchvision's copies."""

from __future__ import annotations

import gzip
import importlib.util
import struct

import numpy as np
import pytest

from tutelage import data


@pytest.fixture(scope="module")
def kdload(data_root):
    if not (data_root / "kdload.py").is_file():
        pytest.skip("no kdload.py beside the data sets")
    spec = importlib.util.spec_from_file_location("kdload", data_root / "kdload.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, images, labels, **more) -> None:
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        np.savez_compressed(folder / f"{part}.npz", images__res=data.encode_residuals(images), labels=labels, **more)


@pytest.mark.parametrize("name", ["cifar10/test.npz", "cifar100/test.npz", "mnist/test.npz", "fsdd/fsdd.npz"])
def test_packed_reader_equals_kdload(name: str, data_root, kdload) -> None:
    path = data_root / name
    if not path.is_file():
        pytest.skip(f"no {name}")
    ours, theirs = data.load_packed(path), kdload.load(path)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype
        assert np.array_equal(ours[key], theirs[key])


def test_residuals_are_kdloads(kdload) -> None:
    random = np.random.RandomState(0)
    for shape in ((3, 5, 7, 3), (3, 5, 7)):
        images = random.randint(0, 256, shape).astype(np.uint8)
        assert np.array_equal(data.encode_residuals(images), kdload.encode_images(images))


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3), (0, 5, 6, 3), (1, 1, 1)])
def test_residuals_decode_to_the_images(shape) -> None:
    images = np.random.RandomState(1).randint(0, 256, shape).astype(np.uint8)
    decoded = data.decode_residuals(data.encode_residuals(images))
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, images)


def test_first_pixels_of_residuals_by_hand() -> None:
    images = np.array([[[10, 12], [250, 3]]], np.uint8)
    # Left differences: 10, 2 and 250, 9 (mod 256); then rows: the second less the first.
    assert data.encode_residuals(images).tolist() == [[[[10, 2], [240, 7]]]]


def test_residuals_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        data.decode_residuals(np.zeros((1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 4\)"):
        data.decode_residuals(np.zeros((2, 1, 3, 4), np.uint8))
    with pytest.raises(ValueError, match="images must be uint8"):
        data.encode_residuals(np.zeros((2, 3, 4, 4), np.uint8))


def test_unreadable_packed_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no packed file"):
        data.load_packed(tmp_path / "none.npz")
    np.savez_compressed(tmp_path / "good.npz", a=np.random.RandomState(0).randint(0, 256, 9999))
    whole = (tmp_path / "good.npz").read_bytes()
    np.savez(tmp_path / "pickled.npz", a=np.array([{}, None], dtype=object))
    np.save(tmp_path / "single.npy", np.zeros(3))
    contents = {
        "empty": b"",
        "garbage": b"garbage" * 50,
        "half": whole[: len(whole) // 2],
        "flipped": whole[:2000] + bytes(20) + whole[2020:],
        "pickled": (tmp_path / "pickled.npz").read_bytes(),
        "single": (tmp_path / "single.npy").read_bytes(),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.npz is not a readable npz of plain arrays"):
            data.load_packed(path)


def test_a_packed_set(tmp_path, monkeypatch) -> None:
    images = np.random.RandomState(2).randint(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2], np.uint8)
    write(tmp_path / "cifar10", images, labels, classes=np.array(["a", "b", "c"]))
    monkeypatch.setenv("TUTELAGE_DATA", str(tmp_path))
    for found in (data.cifar10(), data.cifar10(tmp_path), data.cifar10(str(tmp_path))):
        assert np.array_equal(found.test.images, images)
        assert found.train.labels.tolist() == labels.tolist()
        assert found.train.labels.dtype == np.int64
        assert found.classes == ("a", "b", "c")
        assert len(found.train) == 6


def test_classes_are_numbered_where_they_have_no_names(tmp_path) -> None:
    write(tmp_path / "mnist", np.zeros((3, 4, 4), np.uint8), np.array([0, 1, 2]))
    assert data.mnist(tmp_path).classes == ("0", "1", "2")


def test_incomplete_sets_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TUTELAGE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"cifar100: give root=.*TUTELAGE_DATA"):
        data.cifar100()
    with pytest.raises(FileNotFoundError, match=r"cifar100/train.npz\) nor as torchvision keeps it.*download=True"):
        data.cifar100(tmp_path)
    write(tmp_path / "mnist", np.zeros((3, 4, 4), np.uint8), np.arange(2))
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        data.mnist(tmp_path)
    (tmp_path / "cifar10").mkdir()
    np.savez(tmp_path / "cifar10" / "train.npz", image=np.zeros((1, 2, 2), np.uint8), labels=np.zeros(1))
    with pytest.raises(ValueError, match="no array 'images'; nearest: 'image'"):
        data.cifar10(tmp_path)


def test_torchvisions_copy(tmp_path) -> None:
    pytest.importorskip("torchvision")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.RandomState(3)
    wanted = {}
    for part, count in (("train", 5), ("t10k", 3)):
        images = random.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        wanted[part] = images
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, count, 28, 28)
        for name, content in (
            (f"{part}-images-idx3-ubyte", header + images.tobytes()),
            (f"{part}-labels-idx1-ubyte", struct.pack(">BBBBI", 0, 0, 8, 1, count) + labels.tobytes()),
        ):
            (raw / name).write_bytes(content)
            (raw / f"{name}.gz").write_bytes(gzip.compress(content))
    found = data.fashion_mnist(tmp_path)
    assert np.array_equal(found.train.images, wanted["train"])
    assert np.array_equal(found.test.images, wanted["t10k"])
    assert found.test.labels.tolist() == [0, 1, 2]
    assert found.classes[9] == "Ankle boot"


def test_statistics_are_numpys() -> None:
    images = np.random.RandomState(4).randint(0, 256, (5, 6, 7, 3)).astype(np.uint8)
    mean, std = data.Images(images, np.zeros(5, np.int64)).statistics()
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)


def test_cifar10_has_its_published_statistics(data_root) -> None:
    if not (data_root / "cifar10" / "test.npz").is_file():
        pytest.skip("no CIFAR-10")
    arrays = data.load_packed(data_root / "cifar10" / "test.npz")
    mean, std = data.Images(arrays["images"], arrays["labels"].astype(np.int64)).statistics()
    np.testing.assert_allclose(mean, (0.4942, 0.4851, 0.4504), atol=2e-4)
    np.testing.assert_allclose(std, (0.2467, 0.2429, 0.2616), atol=2e-4)
