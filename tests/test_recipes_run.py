"""Every packaged recipe runs, shortened, and every method has one that really holds it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tutelage import Stage, methods
from tutelage.data import Images, ImageSet, fashion_subset, loaders
from tutelage.recipe import load, packaged_names, read, student_network

METHODS = {m.recipe.removesuffix(".yaml"): m for m in methods()}


@functools.cache
def few_images() -> ImageSet:
    """The beginning of the packaged set."""
    whole = fashion_subset()
    parts = (Images(part.images[:n], part.labels[:n]) for part, n in ((whole.train, 800), (whole.test, 60)))
    return ImageSet(*parts, whole.classes)


@pytest.fixture(autouse=True)
def small_data(monkeypatch, tmp_path):
    """Fewer images to judge on, images of CIFAR-10's form without its files, and a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loaders, "fashion_subset", few_images)
    random = np.random.default_rng(0)
    (tmp_path / "cifar10").mkdir()
    for part, n in (("train", 200), ("test", 30)):
        images = random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "cifar10" / f"{part}.npz", images=images, labels=np.arange(n) % 10)
    monkeypatch.setenv("TUTELAGE_DATA", str(tmp_path))


def shortened(name: str) -> list[str]:
    fields = read(name)
    big = "cifar" in fields["data"]["class_path"]
    inside = fields["data"]["class_path"] in ("paired_loaders", "sharded", "replayed_loaders")
    data = "data.init_args.data" if inside else "data"
    changes = [f"{data}.init_args.limit={100 if big else 300}", f"{data}.init_args.validation=50"]
    for part in ("training", "teacher_training"):
        if part in fields:
            changes += [f"{part}.epochs=1", f"{part}.progress=false"]
    changes += [f"stages.{n}.epochs=1" for n in range(len(fields.get("stages", ())))]
    if name == "early_stopped_teacher":
        changes += [f"procedure.init_args.{change}=1" for change in ("trial_epochs", "teacher_training.epochs")]
    if "source" in fields:
        changes += [f"source.init_args.{change}" for change in ("steps=3", "batch_size=16")]
        changes += ["source.init_args.generator.init_args.width=8"]
    return changes


def things(value: Any) -> Iterator[Any]:
    """Everything that was built, however deep."""
    yield value
    inner = value if isinstance(value, list | tuple) else value.losses if isinstance(value, Stage) else ()
    inner = value.children() if isinstance(value, nn.Module) else inner
    for part in inner:
        yield from things(part)


def holds(method: Any, built: dict[str, Any]) -> bool:
    if method.role == "procedure":
        procedure = built.get("procedure")
        return getattr(procedure, "func", procedure) is method.thing
    if method.name == "quantized_distillation":
        return parametrize.is_parametrized(built["student"].linear, "weight")
    return any(isinstance(thing, method.thing) for thing in things(list(built.values())))


def test_every_method_has_a_recipe():
    assert set(METHODS) <= set(packaged_names())


@pytest.mark.parametrize("name", packaged_names())
def test_runs(name):
    if "quantized" in name or name == "prune":
        pytest.importorskip("torch_pruning" if name == "prune" else "torchao")
    run = load(name, shortened(name))
    if name in METHODS:
        assert holds(METHODS[name], run.keywords)
    student = student_network(run.keywords)  # of a builder, what it makes of the untrained teacher
    before = {k: v.clone() for k, v in student.named_parameters()}
    result = run()
    if name == "hahn_choi":
        assert result.metrics.samples == int((run.keywords["data"].test.dataset.labels >= 0).sum())
    else:
        assert result.metrics.samples == (30 if "cifar" in name or name == "rgb_to_grey" else 60)
    assert all(np.isfinite(v) for line in result.history for v in line["losses"].values())
    learned = student if student is run.keywords["student"] else result.student
    changed = [k for k, v in learned.named_parameters() if not torch.equal(v, before[k])]
    assert changed
