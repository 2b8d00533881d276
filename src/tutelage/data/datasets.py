"""Map-style datasets from folders, from torchvision, from Hugging Face and from arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from tutelage.errors import nearest, require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def image_folder(
    path: str | Path,
    size: int = 224,
    *,
    train: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Dataset[Any]:
    """A folder of images with one subfolder for each class, in the order of their names.

    An item is ``(x, y)``: ``x`` float32 ``(3, size, size)``, normalised, and ``y`` the number of the class.
    For training a random crop of 35 to 100 % of the image and a random flip, otherwise the middle of the
    image after its shorter side was scaled to ``size * 8 / 7``. The classes are the dataset's ``classes``,
    the labels its ``targets``.

    Args:
        path: the folder.
        size: pixels of the square output.
        train: random crops and flips.
        mean: of each channel, on the scale 0..1; ImageNet's by default.
        std: of each channel; ImageNet's by default.

    Raises:
        FileNotFoundError: if the folder is missing, or holds no class with an image.
        ImportError: without torchvision.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder of images at {path}")
    transforms = require("torchvision.transforms.v2", extra="vision")
    datasets = require("torchvision.datasets", extra="vision")
    if train:
        shape = [
            transforms.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True),
            transforms.RandomHorizontalFlip(),
        ]
    else:
        shape = [transforms.Resize(round(size * 8 / 7), antialias=True), transforms.CenterCrop(size)]
    pipeline = transforms.Compose(
        [
            transforms.ToImage(),
            *shape,
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(list(mean), list(std)),
            transforms.ToPureTensor(),
        ]
    )
    return datasets.ImageFolder(str(path), transform=pipeline)


def torchvision_dataset(
    name: str,
    root: str | Path,
    *,
    train: bool = True,
    download: bool = False,
    transform: Callable[[Any], Any] | None = None,
) -> Dataset[Any]:
    """A torchvision dataset by name, whose items are ``(x, y)``.

    Args:
        name: as torchvision spells it, for instance ``"FashionMNIST"``.
        root: the folder of its files.
        train: the training part, or the test part.
        download: let torchvision fetch what is missing.
        transform: of the image; by default float32 ``(C, H, W)`` on the scale 0..1.

    Raises:
        ValueError: for a name that torchvision does not have, or LSUN, which is read by unpickling.
        FileNotFoundError: if the files are not there and ``download`` is False.
        ImportError: without torchvision.
    """
    datasets = require("torchvision.datasets", extra="vision")
    if name in ("LSUN", "LSUNClass"):
        raise ValueError(f"name={name!r}: torchvision unpickles a file of its folder, which may hold code")
    if name not in datasets.__all__:
        raise ValueError(f"torchvision has no dataset {name!r}{nearest(name, datasets.__all__)}")
    if transform is None:
        transforms = require("torchvision.transforms.v2", extra="vision")
        transform = transforms.Compose(
            [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True), transforms.ToPureTensor()]
        )
    make = getattr(datasets, name)
    options: dict[str, Any] = {"transform": transform}
    parameters = inspect.signature(make).parameters
    if "train" in parameters:
        options["train"] = train
    elif "split" in parameters:
        options["split"] = "train" if train else "test"
    if "download" in parameters:
        options["download"] = download
    try:
        return make(str(root), **options)
    except RuntimeError as error:
        if download:
            raise
        raise FileNotFoundError(f"{name} is not in {root}: put it there, or pass download=True") from error


class _Columns(Dataset[Any]):
    """Rows of a Hugging Face dataset as ``(x, y)`` or as dicts, with ``transform`` applied to ``x``."""

    def __init__(self, rows: Any, columns: Sequence[str] | None, transform: Callable[[Any], Any] | None) -> None:
        self.rows, self.columns, self.transform = rows, columns, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[int(index)]
        if self.columns is None:
            return row if self.transform is None else self.transform(row)
        x, *rest = (row[name] for name in self.columns)
        return (x if self.transform is None else self.transform(x), *rest)

    @property
    def targets(self) -> np.ndarray:
        """The second column, read without the first."""
        if self.columns is None or len(self.columns) < 2:
            raise AttributeError("targets: there is no second column; name the columns (x, y)")
        return np.asarray(self.rows.with_format("numpy")[self.columns[1]][:])


def huggingface(
    source: Any,
    split: str | None = "train",
    columns: Sequence[str] | None = None,
    *,
    transform: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Dataset[Any]:
    """A Hugging Face dataset as a map-style dataset of tensors.

    Numbers and images come as tensors, strings as strings (the dataset's ``"torch"`` format).

    Args:
        source: a ``datasets.Dataset`` or ``DatasetDict`` in memory, a folder written by ``save_to_disk``,
            or what ``datasets.load_dataset`` takes: a name on the hub, or ``"csv"``, ``"parquet"``,
            ``"imagefolder"``, ...
        split: the part to take; not used for a single ``Dataset``.
        columns: the names of ``x`` and ``y`` for tuple items; where None, items are dicts of all columns.
        transform: applied to ``x``, or to the whole dict where ``columns`` is None.
        options: passed to ``load_dataset``, for instance ``data_files=...``.

    Raises:
        ValueError: for a split or a column that is not there.
        TypeError: for a streaming dataset, which has no length.
        ImportError: without ``datasets``.
    """
    datasets = require("datasets", extra="text")
    found = source
    if isinstance(source, str | Path):
        folder = Path(source)
        saved = [folder / "dataset_info.json", folder / "state.json", folder / "dataset_dict.json"]
        if any(file.is_file() for file in saved):
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(source), **options)
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"split: there is no {split!r}{nearest(str(split), found)}")
        found = found[split]
    if not isinstance(found, datasets.Dataset):
        raise TypeError(f"source must be a map-style datasets.Dataset, got {type(found).__name__}")
    for name in columns or ():
        if name not in found.column_names:
            raise ValueError(f"columns: there is no {name!r}{nearest(name, found.column_names)}")
    return _Columns(found.with_format("torch"), columns, transform)


def from_numpy(inputs: np.ndarray, labels: np.ndarray | Sequence[Any] | None = None) -> TensorDataset:
    """A dataset of ``(x, y)``, or of ``(x,)`` without labels, from arrays with one row an item.

    Floating point becomes float32, and integers become int64 (token ids, class numbers). Nothing is scaled.

    Args:
        inputs: ``(N, ...)`` numbers.
        labels: ``(N, ...)`` numbers, for instance classes or values to regress on.

    Raises:
        TypeError: for uint8 inputs of three or four dimensions (images, which ``ArrayDataset`` scales), or
            arrays of something other than numbers.
        ValueError: for lengths that differ.

    >>> x, y = from_numpy(np.zeros((3, 5)), [0, 1, 2])[2]
    >>> x.dtype, y
    (torch.float32, tensor(2))
    """
    inputs = np.asarray(inputs)
    if inputs.dtype == np.uint8 and inputs.ndim in (3, 4):
        raise TypeError("inputs are uint8 images: use ArrayDataset or ArrayLoader, which scale them")
    tensors = [_numbers("inputs", inputs)]
    if labels is not None:
        tensors.append(_numbers("labels", np.asarray(labels)))
        if len(tensors[0]) != len(tensors[1]):
            raise ValueError(f"inputs and labels differ in length: {len(tensors[0])} and {len(tensors[1])}")
    return TensorDataset(*tensors)


def _numbers(name: str, array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype(np.float32))
    if array.dtype.kind in "iub":
        return torch.from_numpy(array.astype(np.int64))
    raise TypeError(f"{name} must be numbers, got an array of {array.dtype}")
