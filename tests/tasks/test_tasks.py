"""What a data set's own task changes from the training to the report, and where classifiers alone are understood."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset

from tutelage import DetectionLoss, DetectionResponse, HeatmapResponse, TaskLoss, distill, evaluate
from tutelage.comparison.cells import Cell, run_cell
from tutelage.data import Indexed, fashion_detection_loaders, fashion_keypoint_loaders, fashion_loaders
from tutelage.deploy.candidates import Prune
from tutelage.deploy.compress import compress
from tutelage.deploy.limits import Limits
from tutelage.evaluation import evaluate_together
from tutelage.models import SmallDetector, SmallKeypoints
from tutelage.tasks import Figures, task_of
from tutelage.tasks.detection import DetectionMetrics
from tutelage.tasks.keypoints import KeypointMetrics

SHORT = {"epochs": 2, "optimizer": "adamw", "lr": 0.01, "progress": False, "cpu": True}


@pytest.fixture(scope="module")
def detection():
    return fashion_detection_loaders(validation=50, limit=100, size=32)


@pytest.fixture(scope="module")
def points():
    return fashion_keypoint_loaders(validation=50, limit=100, size=32)


def test_the_task_is_found_inside_and_classification_has_none(points):
    inside = DataLoader(Subset(points.train.dataset, range(10)))
    assert task_of(inside) is task_of(points.train)
    assert task_of(Indexed(Subset(points.train.dataset, [1]))) is task_of(points.train)
    assert task_of(fashion_loaders(limit=100).train) is None
    assert task_of([torch.zeros(1)]) is None
    assert task_of(None) is None


@pytest.mark.parametrize(
    ("data", "model", "loss", "kind", "monitor", "title"),
    [
        ("detection", SmallDetector, DetectionResponse(), DetectionMetrics, "ap50", "AP@0.5"),
        ("points", SmallKeypoints, HeatmapResponse(), KeypointMetrics, "pck", "PCK"),
    ],
)
def test_a_distillation_is_judged_chosen_and_reported_by_the_tasks_figure(
    data, model, loss, kind, monitor, title, request, tmp_path
):
    made = request.getfixturevalue(data)
    torch.manual_seed(0)
    losses = [loss] if isinstance(loss, HeatmapResponse) else [DetectionLoss(), loss]
    parts = {"test": Subset(made.validation.dataset, range(30))}
    parts["test"] = DataLoader(parts["test"], batch_size=16)
    result = distill(
        model(4), model(8), made.train, made.validation, **parts, losses=losses, control=True, out=tmp_path / "run",
        monitor=monitor, **SHORT,
    )  # fmt: skip
    assert isinstance(result.metrics, kind)
    assert result.metrics.samples == 30
    assert 0 <= result.metrics.agreement <= 1
    assert result.teacher_metrics.agreement is None
    assert result.metrics == evaluate(result.student, parts["test"], result.teacher)
    assert [line["metrics"]["samples"] for line in result.history] == [50, 50]
    best = max(line["metrics"][monitor] for line in result.history)
    assert result.validation_accuracy == best == evaluate(result.student, made.validation).value
    assert result.control.runs[0].history[0].losses.keys() == {
        "loss",
        losses[0].name if len(losses) > 1 else "TaskLoss",
    }
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["best"] == result.metrics.known()
    report = result.report(data=made.validation)
    assert (report.figure, report.analysis) == (title, None)
    text = report.text()
    assert f"{title}, %" in text
    assert "ccuracy" not in text
    assert "NLL" not in text
    pytest.importorskip("matplotlib")
    page = report.html(tmp_path / "report.html").read_text()
    assert f"{title} by epoch" in page
    assert "ccuracy" not in page
    assert type(report).from_json(report.save_json(tmp_path / "report.json")) == report


def test_a_model_alone_learns_the_tasks_own_loss_and_with_a_teacher_nothing_is_guessed(points, detection):
    torch.manual_seed(0)
    alone = SmallKeypoints(4)
    batch = next(iter(points.validation))
    before = F.mse_loss(alone.eval()(batch["images"]), batch["labels"])
    distill(alone, None, points.train, points.validation, monitor="error", **{**SHORT, "epochs": 8})
    assert F.mse_loss(alone.eval()(batch["images"]), batch["labels"]) < 0.7 * before
    with pytest.raises(ValueError, match="losses: the data are for detection, which has no default with a teacher"):
        distill(SmallDetector(4), SmallDetector(4), detection.train, **SHORT)
    with pytest.raises(ValueError, match="monitor='accuracy': the validation has only ap50, samples"):
        distill(SmallDetector(4), None, detection.train, detection.validation, **{**SHORT, "epochs": 1})


@dataclass(frozen=True)
class Found(Figures):
    main: ClassVar[str] = "accuracy"
    title: ClassVar[str] = "near ones"
    accuracy: float
    samples: int
    agreement: float | None = None


class Nearness:
    """Regression, judged by the share of values within 0.5."""

    name = "regression"

    def loss(self):
        return TaskLoss(F.mse_loss)

    def look(self, output, batch):
        return (output - batch.labels).abs() < 0.5

    def figures(self, looks, theirs=None):
        near = torch.cat(looks)
        return Found(near.float().mean().item(), len(near))


class Numbers(list):
    task = Nearness()


def test_a_task_of_ones_own_is_a_class_and_an_attribute():
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    data = Numbers([(x, x.sum(1, keepdim=True))])
    result = distill(nn.Linear(4, 1), None, data, data, epochs=60, lr=0.1, progress=False, cpu=True)
    assert result.metrics == Found(1.0, 64)
    assert asdict(result.metrics)["accuracy"] == result.history[-1]["metrics"]["accuracy"]
    assert evaluate(nn.Linear(4, 1), data).accuracy < 0.8


def test_an_empty_loader_and_unlabelled_batches_are_refused(points):
    with pytest.raises(ValueError, match="the loader is empty"):
        evaluate(nn.Linear(4, 1), Numbers())
    with pytest.raises(ValueError, match="evaluation needs labels"):
        evaluate(nn.Linear(4, 1), Numbers([torch.zeros(2, 4)]))
    with pytest.raises(ValueError, match="expected another"):
        evaluate_together({"teacher": SmallKeypoints(4)}, points.validation)


def test_comparisons_and_compression_say_that_they_are_for_classifiers(detection, tmp_path):
    fields = {
        "student": {"class_path": "SmallKeypoints", "init_args": {"width": 4}},
        "data": {"class_path": "fashion_keypoint_loaders", "init_args": {"limit": 20, "validation": 10}},
        "training": {"epochs": 1, "monitor": "pck"},
    }
    cell = Cell("KD", "student", None, 0, fields)
    folder = tmp_path / "cells" / cell.key
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps({"cell": asdict(cell), "trust": []}))
    result = run_cell(folder)
    assert result.state == "skipped"
    assert result.reason == "comparisons are of classifiers, by their accuracy; these data are for key points"
    with pytest.raises(ValueError, match=r"compress is for classifiers, .* for detection"):
        compress(
            SmallDetector(4), detection.train, detection.validation, candidates=[Prune(0.5)],
            limits=Limits(max_size=10_000), out=tmp_path / "out",
        )  # fmt: skip


PROCESSES = """
import json, sys, torch, torch.distributed as dist
from pathlib import Path
from tutelage import evaluate
from tutelage.data import fashion_keypoint_loaders
from tutelage.models import SmallKeypoints
from torch.utils.data import DataLoader
torch.manual_seed(0)
student, teacher = SmallKeypoints(4), SmallKeypoints(4)
data = fashion_keypoint_loaders(validation=50, limit=100, size=32).validation.dataset
rank = 0
if sys.argv[1] == "several":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
found = evaluate(student, DataLoader(data, batch_size=20), teacher).known()
said = {name: round(value, 5) for name, value in found.items()}
Path(__file__).with_name(f"{sys.argv[1]}-{rank}.json").write_text(json.dumps(said))
if dist.is_initialized():
    dist.destroy_process_group()  # or its threads may outlive the interpreter
"""


def test_several_processes_find_what_one_finds(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([script, "one"], [*launch, script, "several"]):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    # in files: what several processes print can stand in one line
    one, *several = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one-0", "several-0", "several-1"))
    assert several == [one, one]
