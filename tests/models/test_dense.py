"""The small network with dense heads: what a cell sees, and the files that hold it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tutelage.deploy import export, open_exported
from tutelage.models import Detected, Joined, SmallCNN, SmallDetector, SmallKeypoints, create


@pytest.mark.parametrize(("name", "side"), [("SmallDetector", 6), ("SmallKeypoints", 12)])
def test_the_stages_are_the_small_networks(name, side):
    model, plain = (
        create(name, width=4, depth=2, in_channels=3).eval(),
        SmallCNN(width=4, depth=2, in_channels=3).eval(),
    )
    for part in ("stage1", "stage2", "stage3"):
        getattr(plain, part).load_state_dict(getattr(model, part).state_dict())
    images, seen = torch.randn(2, 3, 48, 48), []
    for network in (model, plain):
        network.stage3.register_forward_hook(lambda *given: seen.append(given[2]))
        network(images)
    torch.testing.assert_close(*seen)
    output = model(images)
    assert (output.logits if isinstance(output, Detected) else output).shape[2:] == (side, side)


@pytest.mark.parametrize(("model", "cell"), [(SmallDetector(4), 8), (SmallKeypoints(4), 4)])
def test_what_moves_by_a_cell_is_found_a_cell_further(model, cell):
    image = torch.zeros(1, 1, 64, 64)
    image[..., 24:32, 24:32] = torch.randn(8, 8)
    with torch.no_grad():
        here, there = (model.eval()(x) for x in (image, image.roll((cell, -cell), (2, 3))))
    for a, b in zip(here, there, strict=True) if isinstance(here, Detected) else [(here, there)]:
        torch.testing.assert_close(a.roll((1, -1), (2, 3))[..., 2:-2, 2:-2], b[..., 2:-2, 2:-2])


@pytest.mark.parametrize("model", [Joined(SmallDetector(4)), SmallKeypoints(4)])
def test_exported_files_say_the_same(model, tmp_path):
    pytest.importorskip("onnxruntime")
    images = torch.randn(3, 1, 48, 48)
    export(model, images[:1], tmp_path / "model.onnx")
    with open_exported(tmp_path / "model.onnx") as running:
        found = running(images.numpy())
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images).numpy(), atol=1e-5)
    if isinstance(model, Joined):
        with torch.no_grad():
            parts = model.detector(images)
        np.testing.assert_allclose(found[:, :11], parts.logits.numpy(), atol=1e-5)
        np.testing.assert_allclose(found[:, 11:], parts.boxes.numpy(), atol=1e-5)
