"""The generator, and what every data-free data role promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tutelage.algorithms.data_free.dafl import DAFL
from tutelage.algorithms.data_free.generator import GeneratedData, Generator, buffers_kept
from tutelage.algorithms.data_free.zskt import ZSKT
from tutelage.views import read_batch

SHAPE = (1, 8, 8)


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 3),
    )


def small(kind: str, **arguments) -> GeneratedData:
    generator = Generator(SHAPE, latent=6, width=4)
    if kind == "zskt":
        return ZSKT(generator, **{"steps": 5, "batch_size": 8, "student_steps": 2, **arguments})
    return DAFL(generator, **{"steps": 5, "batch_size": 8, **arguments})


def state(*modules: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (2, 5, 11), (1, 2, 2)])
def test_images_have_the_asked_shape_and_are_normalised_per_channel(shape):
    torch.manual_seed(0)
    images = Generator(shape, latent=7, width=6)(torch.randn(64, 7))
    assert images.shape == (64, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(shape[0]), atol=1e-2, rtol=0)


def test_the_last_norm_learns_no_scale():
    last = Generator(SHAPE, latent=6, width=4).layers[-1]
    assert isinstance(last, nn.BatchNorm2d)
    assert last.weight is None


@pytest.mark.parametrize(
    "arguments", [{"image_shape": (28, 28)}, {"image_shape": (1, 1, 8)}, {"latent": 0}, {"width": 1}]
)
def test_impossible_generators_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Generator(**{"image_shape": SHAPE, **arguments})


@pytest.mark.parametrize("kind", ["zskt", "dafl"])
def test_an_epoch_is_images_that_a_distillation_can_read(kind):
    data = small(kind)
    data.attach(network(), network())
    batches = list(data)
    assert len(data) == len(batches) == 5
    for images in batches:
        batch = read_batch(images)
        assert (len(batch), batch.labels) == (8, None)
        assert images.shape == (8, *SHAPE)
        assert not images.requires_grad


@pytest.mark.parametrize("kind", ["zskt", "dafl"])
@pytest.mark.parametrize("training", [True, False])
def test_only_the_generator_changes(kind, training):
    torch.manual_seed(0)
    student, teacher = network().train(training), network(6)  # a teacher that nobody froze or put in eval mode
    data = small(kind)
    data.attach(student, teacher)
    before, generator = state(student, teacher), state(data.generator)
    list(data)
    assert same(before, state(student, teacher))  # running averages too
    assert not same(generator, state(data.generator))
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters(), *data.generator.parameters()))
    assert student.training is training
    assert not any(m.training for m in teacher.modules())


@pytest.mark.parametrize("kind", ["zskt", "dafl"])
def test_a_teacher_put_in_train_mode_between_batches_is_put_back(kind):
    teacher = network()
    data = small(kind, steps=3)
    data.attach(network(), teacher)
    before = state(teacher)
    for _ in data:
        teacher.train()
    assert same(before, state(teacher))


@pytest.mark.parametrize("kind", ["zskt", "dafl"])
def test_iterating_works_where_gradients_are_off(kind):
    data = small(kind, steps=2)
    data.attach(network(), network())
    before = state(data.generator)
    with torch.no_grad():
        list(data)
    assert not same(before, state(data.generator))


def test_iterating_before_attach_and_attaching_without_a_teacher_are_refused():
    data = small("zskt")
    with pytest.raises(RuntimeError, match="attach"):
        next(iter(data))
    with pytest.raises(ValueError, match="teacher"):
        data.attach(network(), None)


def test_a_second_attach_keeps_the_trained_generator_and_its_optimiser():
    data = small("dafl")
    data.attach(network(), network())
    list(data)
    learner, before = data.learner, state(data.generator)
    data.attach(network(), network())
    assert data.learner is learner
    assert same(before, state(data.generator))


@pytest.mark.parametrize("kind", ["zskt", "dafl"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_run_interrupted_anywhere_goes_on_exactly(kind, stop):
    """As the engine resumes: load, skip the batches that are done, restore the random numbers."""
    torch.manual_seed(1)
    student, teacher = network(), network()
    torch.manual_seed(2)
    whole = small(kind)
    whole.attach(student, teacher)
    torch.manual_seed(3)
    expected, saved = [], None
    for epoch in range(2):
        for number, images in enumerate(whole, 1):
            expected.append(images)
            if epoch == 0 and number == stop:
                saved = {"own": whole.own_state(), "random": torch.get_rng_state()}
                saved = torch.load(_file(saved), weights_only=True)  # as it comes back from a checkpoint
    torch.manual_seed(99)
    other = small(kind)
    other.attach(student, teacher)
    next(iter(other))
    other.load_own_state(saved["own"])
    batches = iter(other)
    # a checkpoint at the end of an epoch is one at the beginning of the next
    for _ in range(stop % 5):
        next(batches)
    torch.set_rng_state(saved["random"])
    resumed = [*batches]
    if stop != 5:
        resumed += list(other)
    assert len(resumed) == len(expected) - stop
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected[stop:], strict=True))


def _file(value):
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def test_processes_share_one_draw_of_noise(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.broadcast", lambda value, src: None)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    data = small("dafl")
    data.attach(network(), network())
    parts = []
    for rank in range(2):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        parts.append(data.noise())
    torch.manual_seed(0)
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), torch.randn(16, 6))


@pytest.mark.parametrize("name", ["steps", "batch_size", "lr"])
@pytest.mark.parametrize("kind", ["zskt", "dafl"])
def test_arguments_that_are_not_positive_are_named(kind, name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        small(kind, **{name: 0})


def test_buffers_are_put_back_after_an_error_too():
    norm = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="more than 1 value"), buffers_kept(norm):
        norm(norm(torch.randn(4, 2))[:1])
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(2))
