"""Data on which self-distillation has something to gain."""

from __future__ import annotations

import pytest
import torch

from tutelage.data import fashion_subset


@pytest.fixture(scope="session")
def few_images_with_wrong_labels():
    """500 of the packaged images, a fifth of them with a random label, in batches; and 1500 right ones to test on."""
    data = fashion_subset()

    def images(part, count):
        x, y = torch.as_tensor(part.images[:count]), torch.as_tensor(part.labels[:count]).long()
        return x.reshape(count, -1).float() / 255, y

    generator = torch.Generator().manual_seed(0)
    x, y = images(data.train, 500)
    wrong = torch.rand(500, generator=generator) < 0.2
    y = torch.where(wrong, torch.randint(0, 10, (500,), generator=generator), y)
    return list(zip(x.split(50), y.split(50), strict=True)), [images(data.test, 1500)]
