"""What holds for every loss of the catalogue, built as its packaged recipe builds it, bound to real models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from tutelage import Distillation, Loss, Stage, methods
from tutelage.beside import SideLearner
from tutelage.data import Images, ImageSet, fashion_subset, loaders
from tutelage.recipe import load
from tutelage.tasks import task_of
from tutelage.views import UNLABELLED

LOSSES = [m for m in methods() if m.role == "losses"]
SAMPLES = 8
Change = Callable[[Tensor], Tensor]
every = pytest.mark.parametrize("recipe", [m.recipe.removesuffix(".yaml") for m in LOSSES])


@functools.cache
def few_images() -> ImageSet:
    """The beginning of the packaged set, which need not be read for each test."""
    whole = fashion_subset()
    parts = (Images(part.images[:1500], part.labels[:1500]) for part in (whole.train, whole.test))
    return ImageSet(*parts, whole.classes)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    monkeypatch.setattr(loaders, "fashion_subset", few_images)
    torch.manual_seed(0)


def built(recipe: str) -> dict[str, Any]:
    """The recipe's parts, with its data set and without the training of its teacher."""
    return load(recipe, ["teacher_training=null", "data.init_args.limit=100"]).keywords


def stages_of(parts: dict[str, Any]) -> list[list[Loss]]:
    stages: list[Stage] | None = parts.get("stages")
    return [list(stage.losses) for stage in stages] if stages else [list(parts["losses"])]


def batch_of(parts: dict[str, Any], count: int = SAMPLES) -> Any:
    """The first samples of the packaged images; eight of them are of at least two classes, some with two samples.

    Of data with a task of its own, and of text, their own first samples, which are dicts.
    """
    if task_of(parts["data"].train) is not None:
        return default_collate([parts["data"].train.dataset[n] for n in range(count)])
    if isinstance(first := next(iter(parts["data"].train)), dict):
        return {name: value[:count] for name, value in first.items()}
    part = few_images().train
    shape = next(iter(parts["data"].train))[0].shape[1:]
    images = torch.as_tensor(part.images[:count]).float().reshape(count, *shape) / 255
    return images, torch.as_tensor(part.labels[:count]).long(), torch.arange(count)


def changed(batch: Any, images: Change | None = None, labels: Change | None = None) -> Any:
    """The batch with other images or labels."""

    def same(x: Tensor) -> Tensor:
        return x

    images, labels = images or same, labels or same
    if isinstance(batch, dict):
        inputs = "images" if "images" in batch else "input_ids"
        return {**batch, inputs: images(batch[inputs]), "labels": labels(batch["labels"])}
    return images(batch[0]), labels(batch[1]), batch[2]


def distillations(parts: dict[str, Any], batch: Any) -> list[Distillation]:
    """A bound distillation for each stage, one after the other, each going on from the one before."""
    made: list[Distillation] = []
    for losses in stages_of(parts):
        d = Distillation(parts["student"], parts.get("teacher"), losses, parts.get("views"))
        if made:
            d.continue_from(made[-1])
        made.append(d.bind(batch, population=100))
        made[-1].progress = 0.7  # weights that warm up or begin late are no longer 0
        made[-1](batch).total.backward()  # what the stage remembers is no longer empty
    return made


def gradients(d: Distillation, batch: Any) -> Tensor:
    d.zero_grad()
    total = d(batch).total
    assert total.isfinite()
    total.backward()
    parameters = [p for p in d.student.parameters() if p.grad is not None]
    return torch.cat([p.grad.flatten() for p in parameters]) if parameters else torch.zeros(1)


@every
def test_the_student_learns_the_teacher_stays_and_the_student_remains_a_plain_model(recipe):
    parts = built(recipe)
    student, teacher = parts["student"], parts.get("teacher")
    names = list(student.state_dict())
    frozen = copy.deepcopy(teacher.state_dict()) if isinstance(teacher, nn.Module) else {}
    batch = batch_of(parts)
    for d in distillations(parts, batch):
        for _ in range(2):
            gradients(d, batch)
    assert gradients(d, batch).abs().max() > 0  # the last stage is the one that the student learns in
    assert list(student.state_dict()) == names
    for key, value in frozen.items():
        assert torch.equal(value, teacher.state_dict()[key]), key
    if isinstance(teacher, nn.Module):
        assert all(p.grad is None for p in teacher.parameters())


@every
def test_every_term_is_in_float32_under_autocast(recipe):
    parts = built(recipe)
    batch = batch_of(parts)
    for d in distillations(parts, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = d(batch)
        assert losses.total.isfinite()
        assert {v.dtype for v in losses.values.values()} <= {torch.float32}
        losses.total.backward()
        assert all(p.grad.isfinite().all() for p in d.parameters() if p.grad is not None)


def black(images: Tensor) -> Tensor:
    return torch.zeros_like(images)


def one_image(images: Tensor) -> Tensor:
    return images[:1].expand_as(images).clone()


def half_black(images: Tensor) -> Tensor:
    return torch.cat([images[: SAMPLES // 2], torch.zeros_like(images[SAMPLES // 2 :])])


@every
@pytest.mark.parametrize("spoil", [black, one_image, half_black])
def test_degenerate_images_give_finite_gradients(recipe, spoil):
    parts = built(recipe)
    batch = batch_of(parts)
    for d in distillations(parts, batch):
        assert gradients(d, changed(batch, images=spoil)).isfinite().all()


@every
def test_a_batch_of_one_is_finite_or_refused_by_name(recipe):
    parts = built(recipe)
    batch = batch_of(parts)
    for d in distillations(parts, batch):
        try:
            assert gradients(d.eval(), batch_of(parts, 1)).isfinite().all()
        except ValueError as error:
            refusal = str(error)
            assert "sample" in refusal or "batch" in refusal


@every
def test_labels_change_nothing_in_a_loss_that_does_not_need_them(recipe):
    parts = built(recipe)
    batch = batch_of(parts)
    for d in distillations(parts, batch):
        torch.manual_seed(1)
        known = d.eval()(batch)
        torch.manual_seed(1)
        unknown = d.eval()(changed(batch, labels=lambda labels: torch.full_like(labels, UNLABELLED)))
        assert unknown.total.isfinite()
        unknown.total.backward()
        for name, loss in d.terms.items():
            if not loss.needs_labels:
                torch.testing.assert_close(unknown[name], known[name])


@every
def test_what_the_losses_learned_is_saved_and_loaded(recipe):
    parts = built(recipe)
    batch = batch_of(parts)
    d = distillations(parts, batch)[-1]
    optimizer = torch.optim.SGD(d.parameters(), lr=1e-3)
    gradients(d, batch)
    optimizer.step()
    other = built(recipe)
    teacher = other.get("teacher")
    if isinstance(teacher, nn.Module):
        teacher.load_state_dict(parts["teacher"].state_dict())
    fresh = distillations(other, batch)[-1]
    fresh.load_state_dict(d.state_dict())
    sides = fresh.side_learners()
    for name, side in d.side_learners().items():
        sides[name].load_own_state(copy.deepcopy(side.own_state()))
    torch.manual_seed(1)
    mine = d.eval()(batch)
    torch.manual_seed(1)
    again = fresh.eval()(batch)
    for name, value in mine.values.items():
        torch.testing.assert_close(again[name], value)


@every
def test_binding_anew_makes_what_a_loss_owns_anew(recipe):
    parts = built(recipe)
    batch = batch_of(parts)
    first = distillations(parts, batch)[-1]

    def sizes(d: Distillation) -> dict[str, tuple[int, ...]]:
        return {k: tuple(v.shape) for k, v in d.losses.state_dict().items()}

    before = sizes(first)
    stages = stages_of(parts)
    again = Distillation(parts["student"], parts.get("teacher"), stages[-1], parts.get("views"))
    again.continue_from(first).bind(batch, population=100)
    assert sizes(again) == before
    assert len(again.side_learners()) == len([m for m in first.losses.modules() if isinstance(m, SideLearner)])
