"""The demo: few labels, many unlabelled images, and somebody else's large network.

The packaged images are shared out once: 5,000 labelled ones for whoever made the teacher, 5,000 for us, of which
only 20 a class have labels, 1,000 labelled ones to choose weights by, and 3,000 test images that are looked at once.
The student learns from the teacher's opinion of all our images; the control is the same network with the same initial
weights and the same number of optimiser steps, trained on the labels that we have.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.console import console, say
from tutelage.data import ArrayLoader, CropFlip, fashion_subset, split, unlabel
from tutelage.deploy import export_onnx, measure
from tutelage.deploy.analysis import analyse
from tutelage.deploy.report import Curve, Kind, Report, Row, environment
from tutelage.distilling import Result, distill
from tutelage.evaluation import Metrics
from tutelage.files import replacing
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.models import SmallCNN
from tutelage.training import Training

LABELS_PER_CLASS = 20
BATCH = 64
TEACHER_EPOCHS = 8
STUDENT_EPOCHS = 10


def run_demo(out: str | Path = "demo", seeds: int = 3, overwrite: bool = True) -> Report:
    """Train a teacher, distil it ``seeds`` times, train the controls, and write table, page and ONNX file.

    Args:
        out: folder for ``report.html``, ``report.json``, ``student.onnx`` and ``student.safetensors``.
        seeds: trainings of student and control, 2 or more, so that there is an interval.
        overwrite: replace those files where they are.

    Raises:
        ValueError: fewer than two seeds.
        FileExistsError: the folder holds a demo and ``overwrite`` is off.
    """
    if seeds < 2:
        raise ValueError(f"seeds={seeds}: expected 2 or more, for an interval")
    out = Path(out)
    if (out / "report.html").exists() and not overwrite:
        raise FileExistsError(
            f"out: {out} holds a demo already; leave --keep out to replace it, or choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    parts = _share_out()

    say("1/4  training the teacher on 5,000 labelled images")
    torch.manual_seed(0)
    teacher = SmallCNN(width=32, depth=1)
    taught = distill(
        teacher,
        None,
        parts.teacher,
        parts.validation,
        test=parts.test,
        training=_settings(epochs=TEACHER_EPOCHS, lr=0.004),
    )

    students: list[Result] = []
    controls: list[Result] = []
    steps = STUDENT_EPOCHS * len(parts.student)
    for seed in range(seeds):
        say(f"2/4  seed {seed}: a student of the teacher, and the same student with {len(parts.few)} labels alone")
        torch.manual_seed(seed)
        student = SmallCNN(width=8, depth=1)
        control = copy.deepcopy(student)
        students.append(
            distill(
                student,
                teacher,
                parts.student,
                parts.validation,
                test=parts.test,
                losses=[TaskLoss(weight=0.1), KD(temperature=4.0, weight=0.9)],
                training=_settings(steps=steps, lr=0.01, seed=seed),
            )
        )
        every = max(1, len(parts.student) // len(parts.control))
        controls.append(
            distill(
                control,
                None,
                parts.control,
                parts.validation,
                test=parts.test,
                training=_settings(steps=steps, lr=0.01, seed=seed, evaluate_every=every),
            )
        )

    say("3/4  measuring and exporting")
    report = _report(parts, taught, students, controls)
    example = next(iter(parts.test))[0]
    exported = export_onnx(students[0].student, example[:8].contiguous(), out / "student.onnx")
    report.notes.append(
        f"student.onnx (seed 0): {exported.size_bytes / 1000:,.1f} kB; its outputs differ from PyTorch's by at most "
        f"{exported.max_abs_error:.1e}, with the same first choice for {exported.agreement:.1%} of the checked images."
    )
    report.files = {"The student for onnxruntime": "student.onnx", "These figures": "report.json"}
    report.notes.append(f"The whole demo took {time.monotonic() - began:.0f} s.")
    with replacing(out / "student.safetensors") as beside:
        from tutelage.models import save_weights

        save_weights(students[0].student, beside)
    report.save_json(out / "report.json")
    report.html(out / "report.html")
    say("4/4  done")
    console.print(report.table())
    console.print(report.headline(), highlight=False)
    say(f"{out / 'report.html'}   {out / 'student.onnx'}   ({time.monotonic() - began:.0f} s)")
    return report


class _Parts:
    """Who sees which images."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, test: ArrayLoader, few: np.ndarray):
        self.images, self.labels, self.test, self.few = images, labels, test, few
        self.teacher: ArrayLoader
        self.student: ArrayLoader
        self.control: ArrayLoader
        self.validation: ArrayLoader


def _share_out() -> _Parts:
    data = fashion_subset()
    images, labels = data.train.images, data.train.labels
    validation, others, ours = split(labels, (1000, 5000, 5000), seed=0)
    known = np.full_like(labels, -100)
    known[ours] = unlabel(labels[ours], LABELS_PER_CLASS, seed=0)
    few = np.flatnonzero(known >= 0)
    mean, std = data.train.statistics()
    shared: dict[str, Any] = {"mean": mean, "std": std, "channels_last": True}
    test = ArrayLoader(data.test.images, data.test.labels, batch_size=500, **shared)
    parts = _Parts(images, labels, test, few)

    def training(which: np.ndarray, marks: np.ndarray) -> ArrayLoader:
        return ArrayLoader(
            images, marks, batch_size=BATCH, shuffle=True, augment=CropFlip(1, True), indices=which, **shared
        )

    parts.teacher, parts.student, parts.control = training(others, labels), training(ours, known), training(few, known)
    parts.validation = ArrayLoader(images, labels, batch_size=500, indices=validation, **shared)
    return parts


def _settings(
    lr: float, epochs: int | None = None, steps: int | None = None, seed: int = 0, evaluate_every: int = 1
) -> Training:
    return Training(
        epochs=epochs,
        steps=steps,
        optimizer="adamw",
        lr=lr,
        weight_decay=0.05,
        scheduler="cosine",
        seed=seed,
        evaluate_every=evaluate_every,
        channels_last=True,
        progress=False,
    )


def _report(parts: _Parts, taught: Result, students: list[Result], controls: list[Result]) -> Report:
    example = next(iter(parts.test))[0][:1].contiguous()
    rows = [_row("teacher", "teacher", [taught], example)]
    rows.append(_row("student", "student", students, example))
    rows.append(_row("student without a teacher", "control", controls, example))
    per_epoch = len(parts.student)
    curves = [Curve("student", _points(r, per_epoch)) for r in students]
    curves += [Curve("student without a teacher", _points(r, per_epoch)) for r in controls]
    notes = [
        "Data: the packaged subset of Fashion-MNIST (MIT licence). The teacher was trained on 5,000 labelled images "
        f"that the student never sees. The student has 5,000 other images, of which {len(parts.few)} have labels "
        f"({LABELS_PER_CLASS} a class); the control learns from those {len(parts.few)} alone, with the same initial "
        "weights, augmentation, optimiser and number of steps.",
        "Weights were chosen on 1,000 validation images; the 3,000 test images were looked at when training was over. "
        f"Intervals are 95 % (Student's t) over {len(students)} seeds of student and control; the teacher is one "
        "network and has no interval.",
        "The setting (few labels, many unlabelled images, a large network made by somebody else) is one that people "
        "have, and one in which a teacher has something to give that the labels lack. The gain where all labels are at "
        "hand was not measured here. The number of labels was set beforehand. The networks' sizes were settled after a "
        "first trial that showed test accuracies too, so the test images are not wholly unseen by whoever made this "
        "demo; optimiser, learning rates and lengths were chosen with the validation images, among a handful, and so "
        "that the whole takes less than two minutes.",
        "Learning curves are validation accuracy; an epoch is one pass over the student's 5,000 images, and the "
        "control is placed at the same number of optimiser steps.",
        "Loss terms, confidences, choices, layers and pictures are those of the student of seed 0.",
    ]
    return Report(
        "Few labels, many images: a small student of a larger teacher",
        rows,
        curves,
        notes=notes,
        environment=environment(),
        history=students[0].history,
        analysis=analyse(students[0].student, taught.student, parts.test, classes=fashion_subset().classes, worst=24),
        command=f"tutelage demo --seeds {len(students)}",
    )


def _row(name: str, kind: Kind, results: list[Result], example: torch.Tensor) -> Row:
    metrics = [r.metrics for r in results if isinstance(r.metrics, Metrics)]
    agreement = [m.agreement for m in metrics if m.agreement is not None]
    cost = measure(results[0].student, example)
    steps = [r.step_ms for r in results if r.step_ms is not None]
    return Row(
        name,
        kind,
        [m.accuracy for m in metrics],
        agreement,
        [m.nll for m in metrics],
        [m.ece for m in metrics],
        cost,
        validation=[r.validation_accuracy for r in results if r.validation_accuracy is not None],
        last_accuracy=[r.last_metrics.value for r in results if r.last_metrics is not None],
        step_ms=statistics.median(steps) if steps else None,
    )


def _points(result: Result, per_epoch: int) -> list[tuple[float, float]]:
    return [(h["step"] / per_epoch, h["metrics"]["accuracy"]) for h in result.history if h["metrics"]]
