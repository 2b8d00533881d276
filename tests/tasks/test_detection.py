"""Average precision and the grid's boxes against their definitions, and a detector that is taught."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from tutelage import DetectionLoss, DetectionResponse, Distillation, evaluate
from tutelage.data import fashion_detection_loaders
from tutelage.functional import kd_divergence
from tutelage.models import Detected, SmallDetector
from tutelage.tasks.detection import (
    Boxes,
    DetectionMetrics,
    GridDetection,
    average_precision,
    encoded,
    matches,
    overlap,
)
from tutelage.views import read_batch


def pixels(box):
    left, top, right, bottom = (int(x) for x in box)
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


def share(a, b):
    return len(pixels(a) & pixels(b)) / max(len(pixels(a) | pixels(b)), 1)


def naive(found, truth, least=0.5):
    """The area under max over recalls ≥ r of the precision, every point of it counted anew."""
    areas = []
    for number in sorted({int(c) for t in truth for c in t.classes}):
        total = sum(int(c) == number for t in truth for c in t.classes)
        said = [(float(s), n, m) for n, f in enumerate(found) for m, s in enumerate(f.scores) if f.classes[m] == number]
        said.sort(key=lambda entry: -entry[0])
        points = []
        for k in range(1, len(said) + 1):
            taken = set()
            for _, image, m in said[:k]:
                rivals = [(share(found[image].corners[m], truth[image].corners[j]), -j) for j, c in
                          enumerate(truth[image].classes) if c == number]  # fmt: skip
                if rivals and max(rivals)[0] >= least:
                    taken.add((image, max(rivals)[1]))
            points.append((len(taken) / total, len(taken) / k))
        edges = [0.0, *sorted({r for r, _ in points})]
        steps = itertools.pairwise(edges)
        areas.append(sum((b - a) * max(p for r, p in points if r >= b) for a, b in steps))
    return sum(areas) / len(areas)


def scattered_boxes(count, generator, near=None):
    start = torch.randint(0, 20, (count, 2), generator=generator)
    corners = torch.cat([start, start + torch.randint(3, 9, (count, 2), generator=generator)], 1).float()
    classes = torch.randint(1, 4, (count,), generator=generator)
    if near is not None and len(near):  # most are near a true box, some twice at the same one
        which = torch.randint(0, len(near), (count,), generator=generator)
        corners = near.corners[which] + torch.randint(-1, 2, (count, 4), generator=generator)
        wrong = torch.rand(count, generator=generator) < 0.2
        classes = torch.where(wrong, classes, near.classes[which])
    return Boxes(corners, classes, torch.rand(count, generator=generator))


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_what_counting_every_point_gives(seed):
    generator = torch.Generator().manual_seed(seed)
    truth = [scattered_boxes(n, generator) for n in (3, 1, 0, 4, 2, 5)]
    found = [scattered_boxes(n, generator, near) for n, near in zip((5, 0, 3, 9, 2, 7), truth, strict=True)]
    value = average_precision(found, truth)
    assert value == pytest.approx(naive(found, truth))
    assert 0.05 < value < 0.95
    order = torch.randperm(6, generator=generator).tolist()
    assert average_precision([found[n] for n in order], [truth[n] for n in order]) == pytest.approx(value)


def test_average_precision_of_everything_of_nothing_and_of_what_cannot_be():
    truth = [scattered_boxes(4, torch.Generator().manual_seed(0))]
    none = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert average_precision([none], truth) == 0.0
    apart = Boxes(100.0 * torch.arange(4)[:, None] + truth[0].corners, truth[0].classes, torch.ones(4))
    assert average_precision([apart], [apart]) == 1.0
    with pytest.raises(ValueError, match="there is no box"):
        average_precision([none], [none])
    with pytest.raises(ValueError, match="boxes of 2 images, and true boxes of 1"):
        average_precision([none, none], truth)


def test_overlap_is_the_share_of_pixels():
    generator = torch.Generator().manual_seed(1)
    a, b = (scattered_boxes(12, generator).corners for _ in range(2))
    expected = torch.tensor([[share(x, y) for y in b] for x in a])
    torch.testing.assert_close(overlap(a, b), expected)
    assert (expected > 0).sum() > 10
    assert overlap(a[:1], torch.tensor([[3.0, 3, 3, 9]])) == 0


def test_of_two_detections_of_one_object_the_surer_is_right():
    box = torch.tensor([[0.0, 0, 8, 8]])
    truth = Boxes(box, torch.tensor([2]), torch.ones(1))
    said = Boxes(torch.cat([box, box, box]), torch.tensor([2, 2, 1]), torch.tensor([0.3, 0.6, 0.9]))
    assert matches(said, truth).tolist() == [False, True, False]


class Knows(nn.Module):
    """A detector that reads the truth of the batch that it was given."""

    def __init__(self, batch, sure=9.0):
        super().__init__()
        self.batch, self.sure = batch, nn.Parameter(torch.tensor(sure))

    def forward(self, images):
        logits = self.sure * nn.functional.one_hot(self.batch["labels"], 11).movedim(-1, 1)
        return Detected(logits, self.batch["boxes"].clone())


@pytest.fixture(scope="module")
def scenes():
    return next(iter(fashion_detection_loaders(validation=60, limit=100).validation))


@pytest.fixture(scope="module")
def loader():
    return fashion_detection_loaders(validation=60, limit=100).validation


def test_the_truth_is_judged_as_right_and_another_place_or_class_is_not(scenes, loader):
    knows = Knows(scenes)
    found = evaluate(knows, loader, Knows(scenes, 20.0))
    assert found == DetectionMetrics(ap50=1.0, samples=60, agreement=1.0)
    assert (found.value, found.known()) == (1.0, {"ap50": 1.0, "samples": 60, "agreement": 1.0})
    apart = Knows({**scenes, "boxes": scenes["boxes"] + torch.tensor([-9.0, 0, 9, 0])[:, None, None]})
    moved = evaluate(apart, loader, knows)
    assert moved.ap50 == 0.0
    assert moved.agreement == 0.0
    others = torch.where(scenes["labels"] > 0, 1 + scenes["labels"] % 10, 0)
    assert evaluate(Knows({**scenes, "labels": others}), loader).ap50 < 0.05
    assert evaluate(Knows(scenes, 0.0), loader).ap50 < 0.05  # as likely as everything else in every cell


def test_agreement_is_twice_the_pairs_over_both_ones_detections(scenes, loader):
    half = scenes["labels"].clone()
    half[::2] = 0
    objects, kept = int((scenes["labels"] > 0).sum()), int((half > 0).sum())
    found = evaluate(Knows({**scenes, "labels": half}), loader, Knows(scenes))
    assert found.agreement == pytest.approx(2 * kept / (objects + kept))
    nothing = Knows({**scenes, "labels": torch.zeros_like(half)})
    assert evaluate(nothing, loader, nothing).agreement == 0.0


def test_cells_and_corners_are_the_same_boxes(scenes):
    task, knows = GridDetection(8), Knows(scenes)
    found, truth = task.look(knows(scenes["images"]), read_batch(scenes))
    for f, t, labels, boxes in zip(found, truth, scenes["labels"], scenes["boxes"], strict=True):
        torch.testing.assert_close(f.corners, t.corners)
        cells = labels.nonzero().flip(1)
        torch.testing.assert_close(encoded(t.corners, cells, 8), boxes[:, labels > 0].T)
        assert t.classes.tolist() == labels[labels > 0].tolist()


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


def test_a_student_of_few_wrongly_labelled_scenes_comes_nearer_to_its_teacher_on_unseen_ones_than_alone():
    torch.manual_seed(0)
    made = fashion_detection_loaders(validation=100, limit=640, batch_size=640, size=32, objects=1)
    many, unseen = next(iter(made.train)), next(iter(made.validation))
    few = {k: v[:96].clone() for k, v in many.items()}
    confused = (few["labels"] > 0) & (torch.rand(few["labels"].shape) < 0.4)
    few["labels"] = torch.where(confused, torch.randint_like(few["labels"], 1, 11), few["labels"])
    teacher = trained(SmallDetector(16), many, [DetectionLoss()], steps=120)
    student = SmallDetector(8)
    alone = trained(student, few, [DetectionLoss()])
    taught = trained(student, few, [DetectionLoss(), DetectionResponse(weight=1.0)], copy.deepcopy(teacher))
    with torch.no_grad():
        theirs, *others = (model(unseen["images"]).logits for model in (teacher, alone, taught))
    gaps = [kd_divergence(found, theirs, temperature=1.0) for found in others]
    assert gaps[1] < 0.9 * gaps[0]
