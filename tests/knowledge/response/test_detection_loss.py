from __future__ import annotations

import math

import pytest
import torch

from tutelage import DetectionLoss, DetectionResponse, Distillation
from tutelage.functional import detection_loss
from tutelage.models import SmallDetector


def regions(dtype=torch.float64):
    torch.manual_seed(0)
    logits, boxes, truth = torch.randn(2, 3, 4, 5), 2 * torch.randn(2, 4, 4, 5), torch.randn(2, 4, 4, 5)
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, 0] = -100
    return logits.to(dtype).requires_grad_(), boxes.to(dtype).requires_grad_(), labels, truth.to(dtype)


def test_is_the_sum_written_out():
    logits, boxes, labels, truth = regions()
    total, count = 0.0, 0
    for b in range(2):
        for y in range(4):
            for x in range(5):
                label = int(labels[b, y, x])
                if label == -100:
                    continue
                count += 1
                row = logits[b, :, y, x].tolist()
                total += math.log(sum(map(math.exp, row))) - row[label]
                for s, t in zip(boxes[b, :, y, x].tolist(), truth[b, :, y, x].tolist(), strict=True):
                    d = abs(s - t)
                    total += (label > 0) * 0.7 * (d**2 / 2 if d < 1 else d - 0.5)
    value = detection_loss(logits, boxes, labels, truth, box_weight=0.7)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(total / count)
    rows = [x.movedim(1, -1).reshape(2, 20, -1) for x in (logits, boxes, truth)]
    torch.testing.assert_close(value, detection_loss(rows[0], rows[1], labels.reshape(2, 20), rows[2], box_weight=0.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_regions_that_do_not_count_change_neither_value_nor_gradient(dtype):
    logits, boxes, labels, truth = regions(dtype)
    value = detection_loss(logits, boxes, labels, truth)
    truth.movedim(1, -1)[labels <= 0] = torch.nan
    again = detection_loss(logits, boxes, labels, truth)
    assert again == value
    assert again.dtype == torch.float32
    classes, sides = torch.autograd.grad(again, (logits, boxes))
    assert classes.movedim(1, -1)[labels == -100].abs().max() == 0
    assert sides.movedim(1, -1)[labels <= 0].abs().max() == 0
    assert sides.movedim(1, -1)[labels > 0].abs().amax(-1).min() > 0
    none = detection_loss(logits, boxes, torch.full_like(labels, -100), truth)
    assert none == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(none, (logits, boxes)))


@pytest.mark.parametrize("size", [500.0, 0.0])
def test_extreme_and_equal_outputs_give_finite_gradients(size):
    logits, boxes, labels, truth = regions(torch.float32)
    said = [(size * x.detach().sign()).requires_grad_() for x in (logits, boxes)]
    value = detection_loss(*said, labels, truth)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, said))


def scene():
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (4, 6, 6)) * (torch.rand(4, 6, 6) < 0.1)
    return {"images": torch.randn(4, 1, 48, 48), "labels": labels, "boxes": torch.randn(4, 4, 6, 6)}


def test_the_term_is_the_function_of_the_models_fields_and_halves_of_a_step_make_the_whole():
    batch, model = scene(), SmallDetector(4).eval()
    batch["labels"][1, :3] = -100
    d = Distillation(
        model, None, losses=[DetectionLoss(box_weight=2.0), DetectionLoss("classes", "boxes", name="taps")]
    )
    d.bind(batch).eval()
    found = model(batch["images"])
    expected = detection_loss(found.logits, found.boxes, batch["labels"], batch["boxes"], box_weight=2.0)
    torch.testing.assert_close(d(batch)["DetectionLoss"], expected.detach())
    plain = detection_loss(found.logits, found.boxes, batch["labels"], batch["boxes"])
    torch.testing.assert_close(d(batch)["taps"], plain.detach())
    parts = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    units = [int(d.units(part)["DetectionLoss"]) for part in parts]
    assert units == [36, 3 * 36 - 18]
    summed = sum(d(part)["DetectionLoss"] * n for part, n in zip(parts, units, strict=True)) / sum(units)
    torch.testing.assert_close(summed, expected.detach())


def test_it_stands_beside_the_response_on_the_same_batches():
    d = Distillation(SmallDetector(4), SmallDetector(8), losses=[DetectionLoss(), DetectionResponse()]).bind(scene())
    assert sorted(d(scene()).values) == ["DetectionLoss", "DetectionResponse"]


def test_what_does_not_fit_is_refused():
    logits, boxes, labels, truth = regions()
    with pytest.raises(ValueError, match=r"predicted \(2, 4, 4, 5\), target \(2, 4, 4, 4\)"):
        detection_loss(logits, boxes, labels, truth[..., :4])
    with pytest.raises(ValueError, match=r"labels of shape \(2, 4, 4\) do not fit boxes"):
        detection_loss(logits, boxes, labels[..., :4], truth)
    with pytest.raises(ValueError, match="DetectionLoss: box_weight=-1"):
        DetectionLoss(box_weight=-1)
    with pytest.raises(ValueError, match="DetectionLoss: 1 taps: expected two"):
        DetectionLoss("classes")

    def binding(changed, **arguments):
        Distillation(SmallDetector(4), None, losses=[DetectionLoss(**arguments)]).bind({**scene(), **changed})

    with pytest.raises(ValueError, match="no field 'boxs' with the true boxes; nearest: 'boxes'"):
        binding({}, targets="boxs")
    with pytest.raises(ValueError, match="class 11 appears among the labels"):
        binding({"labels": torch.full((4, 6, 6), 11)})
    with pytest.raises(ValueError, match=r"'boxes' \(4, 4, 3, 3\): expected the same regions"):
        binding({"boxes": torch.zeros(4, 4, 3, 3)})
    with pytest.raises(ValueError, match="DetectionLoss needs labels"):
        binding({"labels": None})
