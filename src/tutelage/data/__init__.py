"""Loaders of real data sets, splits, and batches with sample ids."""

from __future__ import annotations

from tutelage.data.arrays import ArrayDataset, ArrayLoader, CropFlip
from tutelage.data.datasets import from_numpy, huggingface, image_folder, torchvision_dataset
from tutelage.data.fashion import fashion_subset
from tutelage.data.indexed import Indexed
from tutelage.data.loaders import (
    Loaders,
    cifar10_loaders,
    cifar100_loaders,
    dataset_loaders,
    fashion_loaders,
    image_loaders,
)
from tutelage.data.packed import (
    Images,
    ImageSet,
    cifar10,
    cifar100,
    decode_residuals,
    encode_residuals,
    fashion_mnist,
    load_packed,
    mnist,
)
from tutelage.data.pairs import ClassPairs, PairedArrays, PairedBatch, paired, paired_loaders
from tutelage.data.replayed import Replayed, replayed, replayed_loaders
from tutelage.data.scenes import Scenes, fashion_detection_loaders, fashion_keypoint_loaders, scattered
from tutelage.data.shards import shard, sharded
from tutelage.data.splits import split, unlabel
from tutelage.data.text import TokenSet, pydoc_loaders, pydoc_topics

__all__ = [
    "ArrayDataset",
    "ArrayLoader",
    "ClassPairs",
    "CropFlip",
    "ImageSet",
    "Images",
    "Indexed",
    "Loaders",
    "PairedArrays",
    "PairedBatch",
    "Replayed",
    "Scenes",
    "TokenSet",
    "cifar10",
    "cifar10_loaders",
    "cifar100",
    "cifar100_loaders",
    "dataset_loaders",
    "decode_residuals",
    "encode_residuals",
    "fashion_detection_loaders",
    "fashion_keypoint_loaders",
    "fashion_loaders",
    "fashion_mnist",
    "fashion_subset",
    "from_numpy",
    "huggingface",
    "image_folder",
    "image_loaders",
    "load_packed",
    "mnist",
    "paired",
    "paired_loaders",
    "pydoc_loaders",
    "pydoc_topics",
    "replayed",
    "replayed_loaders",
    "scattered",
    "shard",
    "sharded",
    "split",
    "torchvision_dataset",
    "unlabel",
]
