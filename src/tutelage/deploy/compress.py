"""From a teacher to a file that keeps to its limits: derive or shrink, distil, quantise, export, measure, choose.

Deep compression (Han et al., https://arxiv.org/abs/1510.00149) with distillation as the training in between, as the
survey's discussion (section 8) describes the two: pruning and quantisation make the network small, the teacher is to
give back what they cost.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.architecture.builders import StudentBuilder
from tutelage.checkpoint import write_json
from tutelage.console import say
from tutelage.deploy.candidates import PRECISIONS, Candidate, Precision, Prune, Shrink
from tutelage.deploy.compressed import FORMAT, Compressed, Point, Skipped
from tutelage.deploy.limits import Limits, choose, front_of
from tutelage.deploy.pipeline import TEACHER, ExportedFile, Pipeline, about_loader
from tutelage.deploy.steps import described
from tutelage.evaluation import Metrics
from tutelage.files import replacing
from tutelage.knowledge.base import Loss
from tutelage.schedule import Stage
from tutelage.tasks import task_of
from tutelage.training import Training

__all__ = ["Compressed", "Limits", "Prune", "Shrink", "compress"]


def compress(
    teacher: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    test: Iterable[Any] | None = None,
    *,
    candidates: Sequence[Candidate],
    limits: Limits,
    out: str | Path,
    precisions: Sequence[Precision] = PRECISIONS,
    losses: Sequence[Loss] | None = None,
    stages: Sequence[Stage] | None = None,
    views: Any = None,
    training: Training | None = None,
    teacher_training: Training | None = None,
    calibration: int = 4,
    runs: int = 100,
    about: Any = None,
    resume: bool = False,
) -> Compressed:
    """Make several small networks of a teacher, measure their files, and choose the best that meets the limits.

    Each candidate is made (derived from the teacher by a builder, or as given), distilled from the teacher, exported as
    an ONNX file in each precision (int8: static quantisation with ranges from training batches), and each file is
    measured: its size; its latency, all files and the teacher's in turn; its own accuracy on the validation data, in
    onnxruntime.

    Of these points the Pareto front is taken, and of the front the best within the limits
    (:func:`tutelage.deploy.limits.choose`): with a limit on size or latency the most accurate, with one on the accuracy
    alone the smallest. The test data are read after the choice, for the chosen file and the teacher's only. The chosen
    file is copied to ``student.onnx``; all others stay in their folders. Where no file meets the limits, none is
    copied, no test data are read, and the result names the nearest and what it lacks.

    Size and latency do not depend on the weights. So with limits on them each candidate is first exported untrained,
    and is left out, with the reason noted, if in every precision it is larger than 1.05 times ``max_size`` or slower
    than twice ``max_latency``.

    Args:
        teacher: the large network. With ``teacher_training`` it is trained, and ends with its best weights.
        train: batches to train on; int8 ranges come from some of them.
        validation: labelled batches to choose by: weights, and then files.
        test: labelled batches to look at once, after the choice.
        candidates: what to try: builders of students (``Prune``, ``LowRank``, ...) and ``Shrink``.
        limits: what the file must keep to.
        out: folder for everything, one folder a candidate inside.
        precisions: of the exported files.
        losses: not bound yet; each candidate learns from a copy of its own. By default 0.1 · task + 0.9 · KD.
        stages: instead of ``losses``.
        views: what each of the two models sees.
        training: the settings of each distillation; by default 10 epochs.
        teacher_training: train the teacher on the labels first, with these settings.
        calibration: how many training batches the int8 ranges are taken from.
        runs: timed calls of each file.
        about: plain values that say what the data are. A resumed run can tell data apart by kind and size only; if they
            were changed in another way, change this, or their steps would be taken for done.
        resume: go on in ``out``. Each step (teacher, student, screening, distillation, export, accuracy, latency, test)
            is kept if it is finished and all that it depends on is the same, and done again otherwise; a distillation
            goes on where it stopped.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed, or torch-pruning if a candidate needs it.
        FileExistsError: ``out`` holds something, and ``resume`` was not given.
        ParityError: an exported file does not say what its network says.
        ValueError: no candidate, two of one name, an unknown precision, or what pruning and distilling refuse.
    """
    _refuse(teacher, candidates, precisions, losses, stages, calibration, runs)
    if (task := task_of(validation)) is not None:
        raise ValueError(f"compress is for classifiers, by their accuracy; these data are for {task.name}")
    out = Path(out)
    _open(out, resume)
    training = training or Training(epochs=10)
    data = {
        "train": about_loader(train),
        "validation": about_loader(validation),
        "views": described(views),
        "about": about,
    }
    work = Pipeline(
        teacher, train, validation, out, tuple(precisions), losses, stages, views, training, calibration, runs, data
    )
    work.prepare_teacher(teacher_training)
    files: list[ExportedFile] = []
    skipped: list[Skipped] = []
    for number, candidate in enumerate(candidates, 1):
        say(f"{number}/{len(candidates)}  {candidate.label}")
        student, about_student = work.student(candidate)
        if reason := work.screened(candidate, student, about_student, limits):
            say(f"    left out: {reason.words}")
            skipped.append(reason)
            continue
        weights = work.distilled(candidate, student)
        files += work.exported(candidate, student, weights, about_student)
    reference, points = work.points(files)
    chosen = choose(points, limits)
    tested: dict[str, Metrics] = {}
    looks: list[str] = []
    if chosen is not None and test is not None:
        tested = work.tested(chosen, reference, test)
        looks = sorted(f.stem for f in (out / "tests").glob("*.json"))
    file = _copied(chosen, out)
    found = Compressed(
        out=out,
        limits=limits,
        teacher=reference,
        points=points,
        front=front_of(points),
        skipped=skipped,
        chosen=chosen,
        file=file,
        test=tested.get("student"),
        teacher_test=tested.get("teacher"),
        looks=looks,
    )
    write_json(out / "compress.json", found.plain())
    return found


def _refuse(
    teacher: Any,
    candidates: Sequence[Candidate],
    precisions: Sequence[str],
    losses: Sequence[Loss] | None,
    stages: Sequence[Stage] | None,
    calibration: int,
    runs: int,
) -> None:
    """Everything that can be known to be wrong before anything is trained."""
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher: expected a network, got {type(teacher).__name__}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("compress runs in one process; start it without torchrun")
    if not candidates:
        raise ValueError("candidates: expected one or more, such as Prune(0.5)")
    labels = [candidate.label for candidate in candidates]
    for label in labels:
        if not re.fullmatch(r"[\w=+-][\w.=+-]*", label) or label in (TEACHER, "tests"):
            raise ValueError(f"candidates: {label!r} cannot be a folder's name here; give it another name")
        if labels.count(label) > 1:
            raise ValueError(f"candidates: two are called {label!r}; give them names")
    if calibration < 1 or runs < 1:
        raise ValueError(f"calibration={calibration}, runs={runs}: expected 1 or more of each")
    for candidate in candidates:
        if isinstance(candidate, StudentBuilder):
            try:
                candidate.check()
            except ValueError as error:
                raise ValueError(f"{candidate.label}: {error}") from None
    if not precisions or len(set(precisions)) < len(precisions) or not set(precisions) <= set(PRECISIONS):
        raise ValueError(f"precisions={list(precisions)}: expected float32, int8 or both")
    for loss in (*(losses or ()), *(loss for stage in stages or () for loss in stage.losses)):
        if loss.pairs:
            raise ValueError(f"losses: {loss.name} was bound to other networks already; give a new one")


def _open(out: Path, resume: bool) -> None:
    """Make the folder, or refuse one that is somebody else's."""
    mark = out / "compress.json"
    if out.is_file():
        raise FileExistsError(f"out: {out} is a file; expected a folder")
    if mark.exists():
        if not resume:
            raise FileExistsError(f"out: {out} holds a compression already; resume it, or choose another folder")
        if "format" not in (_read(mark) or {}):
            raise ValueError(f"resume: {mark} is damaged, or of something else")
        return
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"out: {out} holds other files; choose an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"format": FORMAT, "finished": False})


def _read(mark: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(mark.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None


def _copied(chosen: Point | None, out: Path) -> Path | None:
    """Put the chosen file where it is looked for; an earlier choice that no longer holds goes."""
    target = out / "student.onnx"
    if chosen is None:
        target.unlink(missing_ok=True)
        return None
    with replacing(target) as beside:
        shutil.copyfile(out / chosen.file, beside)
    return target
