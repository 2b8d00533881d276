from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation
from tutelage.knowledge.feature import mgd
from tutelage.knowledge.feature.mgd import MGD, generation_distance, random_mask
from tutelage.models import SmallCNN


def filled(parameters):
    """Weights that anyone can rebuild: 0.3·sin(0.37·i + number of the tensor)."""
    for number, parameter in enumerate(parameters):
        with torch.no_grad():
            values = torch.arange(parameter.numel(), dtype=torch.float64) * 0.37 + number
            parameter.copy_(values.sin().view_as(parameter) * 0.3)


@pytest.mark.parametrize(
    ("masked", "shape", "known"),
    [("channels", (3, 6, 1, 1), 158.4609716447905), ("positions", (3, 1, 5, 5), 154.8674675566146)],
)
def test_has_the_value_of_the_authors_code(bound, monkeypatch, masked, shape, known):
    """Of their classification code (channels, 0.15) and their detection code (positions, 0.65), for a known mask."""
    random = np.random.RandomState(0)
    student, teacher = (torch.from_numpy(random.randn(3, c, 5, 5)) for c in (4, 6))
    numbers = torch.from_numpy(np.random.RandomState(7).rand(*shape))
    mask = (numbers >= 0.15 if masked == "channels" else numbers <= 0.35).double()
    monkeypatch.setattr(mgd, "random_mask", lambda *_: mask)
    loss = MGD(masked=masked)
    call = bound(loss, student, teacher)
    filled(loss.parameters())
    assert call(student, teacher).item() == pytest.approx(known, rel=1e-12)


def test_the_distance_is_the_loop_over_a_samples_numbers():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 4, 5).double()
    total = sum((a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    assert generation_distance(student, teacher).item() == pytest.approx(total / 3)


def test_a_generator_that_repeats_and_no_mask_make_it_the_distance_of_features(bound):
    """The identity: with nothing hidden and kernels that repeat what is positive, equal features cost nothing."""
    torch.manual_seed(0)
    student, teacher = torch.rand(3, 4, 5, 5), torch.rand(3, 4, 5, 5)
    loss = MGD(ratio=0.0)
    call = bound(loss, student, teacher)
    for layer in (loss.generators[0][0], loss.generators[0][2]):
        nn.init.dirac_(layer.weight), nn.init.zeros_(layer.bias)
    torch.testing.assert_close(call(student, teacher), generation_distance(student, teacher))
    assert call(student, student).item() == 0


@pytest.mark.parametrize(("masked", "same_over"), [("positions", 1), ("channels", (2, 3))])
def test_whole_positions_or_whole_channels_are_hidden_with_the_probability_asked_for(masked, same_over):
    torch.manual_seed(0)
    features = torch.rand(20, 30, 25, 25) + 1
    hidden = features * random_mask(features, 0.3, masked) == 0
    torch.testing.assert_close(hidden.any(same_over), hidden.all(same_over))
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert len({tuple(row.tolist()) for row in hidden.flatten(1)}) == 20  # each sample its own


def test_what_is_hidden_teaches_the_student_nothing(bound, monkeypatch):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 6, 6)
    mask = (torch.rand(2, 1, 6, 6) > 0.5).float()
    monkeypatch.setattr(mgd, "random_mask", lambda *_: mask)
    bound(MGD(), student, teacher)(student, teacher).backward()
    touched = student.grad.abs().sum(1, keepdim=True) > 0
    assert torch.equal(touched, mask > 0)


def test_training_draws_a_new_mask_and_evaluation_repeats_one_without_touching_the_random_numbers(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 6, 6)
    loss = MGD()
    call = bound(loss, student, teacher)
    assert call(student, teacher) != call(student, teacher)
    torch.manual_seed(1)
    first = call(student, teacher)
    torch.manual_seed(1)
    assert call(student, teacher) == first
    loss.eval()
    state = torch.random.get_rng_state()
    assert call(student, teacher) == call(student, teacher)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_binding_leaves_the_random_numbers_as_they_were():
    d = Distillation(SmallCNN(4), SmallCNN(8), losses=[MGD("stage2")])
    state = torch.random.get_rng_state()
    d.bind(torch.ones(2, 1, 12, 12))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_by_default_the_last_stage_is_read_and_channels_are_aligned_only_where_they_differ():
    images = torch.randn(4, 1, 16, 16)
    loss = MGD()
    d = Distillation(SmallCNN(4), SmallCNN(8), losses=[loss]).bind(images)
    assert loss.pairs == [("stage3", "stage3")]
    assert loss.aligners[0].weight.shape == (32, 16, 1, 1)
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in d.parameters()}
    equal = MGD()
    Distillation(SmallCNN(8), SmallCNN(8), losses=[equal]).bind(images)
    assert isinstance(equal.aligners[0], nn.Identity)
    assert loss.weight == 7e-5


def test_maps_of_different_sizes_meet_at_the_smaller(bound):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 8, 6), torch.randn(2, 4, 4, 6)
    loss = MGD().eval()
    call = bound(loss, student, teacher)
    torch.testing.assert_close(call(student, teacher), call(F.adaptive_avg_pool2d(student, (4, 6)), teacher))


def test_the_gradient_reaches_the_student_and_the_generator_but_not_the_teacher(bound):
    torch.manual_seed(0)
    student = torch.randn(3, 4, 5, 5, requires_grad=True)
    teacher = torch.randn(3, 6, 5, 5, requires_grad=True)
    loss = MGD()
    bound(loss, student, teacher)(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("value", [0.0, 500.0])
def test_equal_samples_and_a_batch_of_one_are_finite(bound, count, value):
    torch.manual_seed(0)
    student = torch.full((count, 3, 4, 4), value, requires_grad=True)
    teacher = torch.randn(count, 5, 4, 4)
    loss = bound(MGD(), student, teacher)(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_float64_stays_and_half_precision_is_calculated_in_float32():
    torch.manual_seed(0)
    images = torch.randn(4, 1, 12, 12)
    wide = Distillation(SmallCNN(4).double(), SmallCNN(8).double(), losses=[MGD()]).bind(images.double())
    assert wide(images.double()).total.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = Distillation(SmallCNN(4), SmallCNN(8), losses=[MGD()]).bind(images)
        assert half(images)["MGD"].dtype == torch.float32


def test_what_cannot_be_compared_is_refused(bound):
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        generation_distance(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="expected maps"):
        bound(MGD(), torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"ratio=1\.0"):
        MGD(ratio=1.0)
    with pytest.raises(ValueError, match="masked='pixels'"):
        MGD(masked="pixels")


def test_training_lets_unseen_maps_be_generated_from_half_of_the_students(lessons):
    def generation():
        return MGD("stage3", weight=0.05)

    alone, taught = lessons.student(), lessons.student(generation())
    assert lessons.distance(taught, generation()) < 0.9 * lessons.distance(alone, generation())
