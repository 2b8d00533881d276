"""Peaks of heat maps, the share of points that are found, and a student that is taught."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation, HeatmapResponse, TaskLoss, evaluate
from tutelage.data import fashion_keypoint_loaders
from tutelage.models import SmallKeypoints
from tutelage.tasks.keypoints import KeypointMetrics, Keypoints, gaussian_maps, peaks


def test_maps_are_the_gaussian_at_each_cells_middle():
    points = torch.tensor([[[3.0, 17.0], [10.5, 0.0]]])
    maps = gaussian_maps(points, size=6, stride=4, sigma=1.5)
    for k, (x, y) in enumerate(points[0].tolist()):
        for row in range(6):
            for column in range(6):
                squares = ((4 * column + 2 - x) ** 2 + (4 * row + 2 - y) ** 2) / 16
                assert maps[0, k, row, column].item() == pytest.approx(math.exp(-squares / (2 * 1.5**2)), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_peaks_are_the_points_inside_and_the_nearest_cells_at_the_border(scale):
    inside = 6 + 36 * torch.rand(50, 3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(peaks(scale * gaussian_maps(inside, 12, 4), 4), inside, atol=1e-2, rtol=0)
    corners = torch.tensor([[[0.0, 0.0], [48.0, 0.0], [1.0, 48.0]]])
    assert peaks(gaussian_maps(corners, 12, 4), 4).tolist() == [[[2, 2], [46, 2], [2, 46]]]


def test_peaks_of_flat_negative_and_half_precision_maps_are_inside():
    for maps in (torch.zeros(2, 1, 5, 5), -torch.rand(2, 1, 5, 5), torch.rand(2, 1, 5, 5).half()):
        found = peaks(maps, 4)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert ((found >= 0) & (found <= 20)).all()


class Knows(nn.Module):
    """Heat maps at the given points."""

    def __init__(self, points):
        super().__init__()
        self.points, self.scale = points, nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * gaussian_maps(self.points, 12, 4)


def test_the_share_of_points_within_two_pixels_and_the_mean_distance():
    torch.manual_seed(0)
    points, away = 8 + 32 * torch.rand(40, 5, 2), 2.4 * torch.randn(40, 5, 2)
    batch = {"images": torch.zeros(40, 1, 48, 48), "labels": gaussian_maps(points, 12, 4), "points": points}

    class Data(list):
        task = Keypoints(4)

    data = Data([{k: v[part] for k, v in batch.items()} for part in (slice(0, 40),)])
    found = evaluate(Knows(points + away), data, Knows(points))
    distances = [math.hypot(*x) for x in away.reshape(-1, 2).tolist()]
    right = sum(d <= 2 for d in distances) / 200
    assert 0.2 < right < 0.8
    assert found.pck == pytest.approx(right, abs=0.006)  # peaks are found to a hundredth of a pixel
    assert found.error == pytest.approx(sum(distances) / 200, abs=0.01)
    assert found.agreement == found.pck  # the teacher is the truth here
    assert evaluate(Knows(points), data) == KeypointMetrics(1.0, evaluate(Knows(points), data).error, 40)
    wider = Data(data)
    wider.task = Keypoints(4, within=100.0)
    assert evaluate(Knows(points + away), wider).pck == 1.0


def trained(model, batch, losses, teacher=None, steps=60):
    model = copy.deepcopy(model)
    d = Distillation(model, teacher, losses=losses).bind(batch)
    optimizer = torch.optim.AdamW(d.parameters(), lr=0.01)
    for n in range(steps):
        part = {k: v[torch.arange(32 * n, 32 * n + 32) % len(v)] for k, v in batch.items()}
        optimizer.zero_grad()
        d(part).total.backward()
        optimizer.step()
    return model.eval()


def test_a_student_of_few_and_shifted_labels_comes_nearer_to_its_teacher_on_unseen_scenes_than_alone():
    torch.manual_seed(0)
    made = fashion_keypoint_loaders(validation=100, limit=640, batch_size=640)
    many, unseen = next(iter(made.train)), next(iter(made.validation))
    few = {k: v[:96] for k, v in many.items()}
    few["labels"] = gaussian_maps(few["points"] + 3 * torch.randn_like(few["points"]), 12, 4)  # careless annotators
    teacher = trained(SmallKeypoints(16), many, [TaskLoss(F.mse_loss)], steps=100)
    student = SmallKeypoints(8)
    alone = trained(student, few, [TaskLoss(F.mse_loss)])
    taught = trained(student, few, [HeatmapResponse(alpha=0.5)], copy.deepcopy(teacher))
    with torch.no_grad():
        theirs, *others = (model(unseen["images"]) for model in (teacher, alone, taught))
    gaps = [F.mse_loss(found, theirs) for found in others]
    assert gaps[1] < 0.8 * gaps[0]
