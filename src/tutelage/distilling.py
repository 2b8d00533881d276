"""Everything done for you: train, choose, test once, report, export."""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tutelage.checkpoint import RunFolder, plain_state, write_json, write_weights
from tutelage.distillation import Distillation
from tutelage.engine import fit
from tutelage.evaluation import Metrics, evaluate, evaluate_together, evaluating
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.task import TaskLoss
from tutelage.run import Epoch, Run
from tutelage.schedule import Stage
from tutelage.tasks import Figures, task_of
from tutelage.teachers import Frozen, NoTeacher, Teacher, as_teacher
from tutelage.training import Training
from tutelage.views import Batch, Inputs, judging

if TYPE_CHECKING:
    from tutelage.deploy.export import Exported
    from tutelage.deploy.report import Report


@dataclass
class Result:
    """A finished distillation.

    Args:
        student: with its best weights on validation, or its last without validation.
        teacher: the network that taught, if there was one.
        runs: one for each stage.
        metrics: of ``student`` on the test data (or the validation data, if there was no test data):
            :class:`tutelage.Metrics`, or what the data's own task gives.
        last_metrics: the same of the last weights.
        teacher_metrics: the same of the teacher.
        control: the same student trained without a teacher, if asked for.
        example: the inputs of one sample, to measure and export with.
        out: the run's folder.
        teacher_example: the same sample as the teacher sees it.
        batch: the student's inputs of the batch that it comes from, to calibrate an int8 file with.
        views: what each of the two models sees of a batch.
    """

    student: nn.Module
    teacher: nn.Module | None
    runs: list[Run]
    example: Inputs
    metrics: Figures | None = None
    last_metrics: Figures | None = None
    teacher_metrics: Figures | None = None
    control: Result | None = None
    out: Path | None = None
    teacher_example: Inputs | None = None
    batch: Inputs | None = None
    views: Callable[[Any], Batch] | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every epoch of every stage, as plain values."""
        return [asdict(line) for run in self.runs for line in run.history]

    def report(
        self,
        title: str = "Distillation",
        *,
        data: Iterable[Any] | None = None,
        classes: Sequence[str] | None = None,
        recipe: str = "",
        command: str = "",
    ) -> Report:
        """Teacher, student and (if it was trained) the student alone: accuracy, size, MACs, latency, agreement.

        ``print(result.report())`` for the terminal, ``.html(path)`` for a page.

        Args:
            title: heading.
            data: batches (validation or test) to compare student and teacher on once more, for calibration,
                confusion, disagreements and the similarity of layers; without it nothing is run but the timing.
            classes: names of the classes; by default those that the data know.
            recipe: the settings, as text for the page.
            command: what to type to get the same again.
        """
        from tutelage.deploy import report as pages
        from tutelage.deploy.analysis import analyse
        from tutelage.deploy.measure import measure

        rows, curves = [], []
        kinds: list[tuple[str, pages.Kind, nn.Module | None, Figures | None, Result | None]] = [
            ("teacher", "teacher", self.teacher, self.teacher_metrics, None),
            ("student", "student", self.student, self.metrics, self),
        ]
        if self.control:
            kinds.append(
                ("student without a teacher", "control", self.control.student, self.control.metrics, self.control)
            )
        for name, kind, model, metrics, trained in kinds:
            if model is None or metrics is None:
                continue
            agreement = [metrics.agreement] if metrics.agreement is not None else []
            inputs = self.teacher_example if kind == "teacher" and self.teacher_example else self.example
            example = inputs.args or inputs.kwargs
            nll, ece = ([metrics.nll], [metrics.ece]) if isinstance(metrics, Metrics) else ([], [])
            row = pages.Row(name, kind, [metrics.value], agreement, nll, ece, measure(model, example))
            if trained is not None:
                last, best = trained.last_metrics, trained.validation_accuracy
                row = dataclasses.replace(
                    row,
                    last_accuracy=[last.value] if last is not None else [],
                    validation=[best] if best is not None else [],
                    step_ms=trained.step_ms,
                )
            rows.append(row)
        main = self.metrics.main if self.metrics is not None else Metrics.main
        for name, result in (("student", self), ("student without a teacher", self.control)):
            lines = result.history if result else []
            points = [(h["epoch"] + 1.0, h["metrics"][main]) for h in lines if main in h["metrics"]]
            if points:
                curves.append(pages.Curve(name, points))
        return pages.Report(
            title,
            rows,
            curves,
            environment=pages.environment(),
            history=self.history,
            analysis=None
            if data is None or task_of(data) is not None  # it is about choices between classes
            else analyse(self.student, self.teacher, data, views=self.views, classes=classes),
            recipe=recipe,
            command=command,
            figure=self.metrics.title if self.metrics is not None else Metrics.title,
        )

    @property
    def validation_accuracy(self) -> float | None:
        """Of the weights that were kept (or the main figure of another task); None without validation."""
        run, main = self.runs[-1], self.metrics.main if self.metrics is not None else Metrics.main
        return None if run.best_epoch is None else run.history[run.best_epoch].metrics.get(main)

    @property
    def step_ms(self) -> float | None:
        """Milliseconds of a training step with the data it needs, the median of the last stage's epochs."""
        history = self.runs[-1].history
        steps = [line.step - before for line, before in zip(history, [0, *(h.step for h in history)], strict=False)]
        times = [1000 * line.seconds / n for line, n in zip(history, steps, strict=True) if n > 0]
        return statistics.median(times) if times else None

    def export(self, path: str | Path, quantize: Literal["int8"] | None = None, **options: Any) -> Exported:
        """Write the student as a file whose outputs were checked: .onnx, .pt2, .pte or .xml.

        See :func:`tutelage.deploy.export`. Unless ``data=`` is given, the file is compared with PyTorch on the first
        validation batch (or training batch); unless ``calibration=`` is, an int8 file is calibrated with it.
        """
        from tutelage.deploy.export import export

        if self.batch is not None:
            inputs = self.batch.args or self.batch.kwargs
            options.setdefault("data", [inputs])
            if quantize:
                options.setdefault("calibration", [inputs])
        return export(self.student, self.example.args or self.example.kwargs, path, quantize=quantize, **options)


def distill(
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    test: Iterable[Any] | None = None,
    losses: Sequence[Loss] | None = None,
    stages: Sequence[Stage] | None = None,
    views: Callable[[Any], Batch] | None = None,
    control: bool = False,
    training: Training | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    after_epoch: Callable[[Epoch], None] | None = None,
    **settings: Any,
) -> Result:
    """Teach a student: train it, keep its best weights on validation, and look at the test data once.

    Args:
        student: learns; it ends with its best weights.
        teacher: frozen; ``None`` trains the student alone.
        train: batches (see :func:`tutelage.views.read_batch`).
        validation: labelled batches to choose the best weights by.
        test: labelled batches that are looked at once, at the end; by default the validation data.
        losses: what is transferred; by default 0.1 · task + 0.9 · KD, or without a teacher the loss of the data's task.
        stages: instead of ``losses``, several trainings one after the other, each with losses of its own. A term that
            the stage before had too (same name and class) goes on with what it learned there.
        views: what each of the two models sees.
        control: train a copy of the student without the teacher as well, with the same settings and data, as long as
            all stages together.
        training: the settings, or give them one by one as further arguments (``epochs=30, lr=0.1``).
        out: the run's folder.
        resume: go on with the run in ``out``.
        overwrite: replace the run in ``out``.
        after_epoch: called with each epoch's line of the student's (last) training; what it raises ends the run.
        **settings: fields of :class:`tutelage.Training`.

    Raises:
        ValueError: what binding refuses, an empty loader, or FSDP, under which :func:`tutelage.engine.fit` trains.
        FileExistsError: ``out`` holds a run.
        BlockingIOError: another process is at work in ``out``.

    >>> import torch, tutelage as tl
    >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    >>> result = tl.distill(nn.Linear(8, 3), nn.Linear(8, 3), data, data, epochs=2, progress=False)
    >>> result.metrics.samples, len(result.history)
    (16, 2)
    """
    if losses is not None and stages is not None:
        raise ValueError("losses and stages: give one of them")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise ValueError(
            "distill: under FSDP the student stays in shards, which it cannot test and measure; train with "
            "tutelage.engine.fit and load the whole student from student-best.safetensors in the run's folder"
        )
    if training is not None and settings:
        raise ValueError(f"training and {', '.join(settings)}: give the settings in one place")
    if training is None and stages is not None:
        settings.setdefault("epochs", sum(stage.epochs for stage in stages))
    training = training or Training.of(**settings)
    role = as_teacher(teacher)
    task = task_of(train)
    if task is not None and losses is None and stages is None:
        if not isinstance(role, NoTeacher):
            raise ValueError(f"losses: the data are for {task.name}, which has no default with a teacher: name them")
        losses = [task.loss()]
    alone = copy.deepcopy(student) if control else None
    where = Path(out) if out else None
    plan: list[tuple[Stage | None, str]] = [
        (stage, f"stage-{n + 1}" + (f"-{stage.name}" if stage.name else "")) for n, stage in enumerate(stages or [])
    ]
    main = os.environ.get("RANK", "0") == "0"
    runs = []
    earlier: Distillation | None = None
    with ExitStack() as ending:
        if where and plan and main:  # each stage has a folder of its own in it
            about = {**Distillation(student, role, losses, views).description(), "losses": [name for _, name in plan]}
            ending.enter_context(RunFolder(where, about, resume, overwrite))
        for stage, name in plan or [(None, "")]:
            d = Distillation(student, role, stage.losses if stage else losses, views)
            if earlier is not None:
                d.continue_from(earlier)
            earlier = d
            part = dataclasses.replace(training, epochs=stage.epochs, lr=stage.lr or training.lr) if stage else training
            final = stage is None or stage is plan[-1][0]
            runs.append(
                fit(
                    d,
                    train,
                    validation if final else None,
                    training=part,
                    out=where / name if where else None,
                    resume=resume,
                    overwrite=overwrite,
                    after_epoch=after_epoch if final else None,
                )
            )
    network = role.module if isinstance(role, Frozen) else None
    mine, theirs, several = _example(student, network, validation if validation is not None else train, views)
    result = Result(student, network, runs, mine, out=where, teacher_example=theirs, batch=several, views=views)
    judge = test if test is not None else validation
    last = runs[-1]
    best = last.best is not None and last.best_epoch != len(last.history) - 1
    chosen = copy.deepcopy(student) if best and judge is not None else student
    if last.best is not None:
        chosen.load_state_dict(last.best)
    if judge is not None:
        judged = {"last": student, **({"best": chosen} if chosen is not student else {})}
        found = evaluate_together(judged, judge, network, views=views)
        result.last_metrics, result.teacher_metrics = found["last"], found.get("teacher")
        result.metrics = found.get("best", found["last"])
    if last.best is not None:
        student.load_state_dict(last.best)
    if where and main:
        write_weights(where / "student.safetensors", plain_state(student))
        figures = {"best": result.metrics, "last": result.last_metrics, "teacher": result.teacher_metrics}
        write_json(where / "result.json", {k: m.known() for k, m in figures.items() if m is not None})
    if alone is not None:
        whole = dataclasses.replace(training, epochs=sum(s.epochs for s in stages), steps=None) if stages else training
        result.control = distill(
            alone,
            None,
            train,
            validation,
            test=test,
            losses=[task.loss() if task is not None else TaskLoss()],
            views=views,
            training=whole,
            out=where / "control" if where else None,
            resume=resume,
            overwrite=overwrite,
        )
        if network is not None and judge is not None:
            result.control.metrics = evaluate(alone, judge, network, views=views)
    return result


def _example(
    student: nn.Module, teacher: nn.Module | None, data: Any, views: Any
) -> tuple[Inputs, Inputs | None, Inputs]:
    """What student and teacher are called with for one sample, and the student for a batch, without touching the
    random numbers."""
    device = next(student.parameters()).device

    def first(value: Any) -> Any:
        return value[:1].to(device) if isinstance(value, torch.Tensor) else value

    def taken(model: nn.Module, inputs: Inputs) -> Inputs:
        caught: list[Inputs] = []  # of a batch's named fields a model takes those that it knows
        handle = model.register_forward_pre_hook(lambda _, *given: caught.append(Inputs(*given)), with_kwargs=True)
        try:
            with evaluating(model):
                Inputs(tuple(map(first, inputs.args)), {k: first(v) for k, v in inputs.kwargs.items()}).call(model)
        finally:
            handle.remove()
        return caught[0]

    with torch.random.fork_rng():
        batch = judging(views)(next(iter(data)))
        mine, theirs = taken(student, batch.student), taken(teacher, batch.teacher) if teacher is not None else None
        # a single named input that the student does not know is given by position
        args = batch.student.args or (tuple(batch.student.kwargs.values()) if mine.args else ())
        return mine, theirs, Inputs(args, {k: batch.student.kwargs[k] for k in mine.kwargs})
