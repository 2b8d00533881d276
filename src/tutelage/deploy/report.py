"""What a distillation was worth: the figures that a table, a page and a file are made from."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tutelage.comparison.quoted import Quoted
from tutelage.deploy.measure import Measurement
from tutelage.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

    from tutelage.deploy.analysis import Analysis

Kind = Literal["teacher", "student", "control"]
_FORMAT = 2
# Whatever later formats added has a default.
_READABLE = (1, 2)
_KINDS = ("teacher", "student", "control")


@dataclass(frozen=True)
class Row:
    """One model of the report; lists hold one figure per seed, shares are in [0, 1].

    Attributes:
        name: What to call it.
        kind: ``"teacher"``, ``"student"``, or ``"control"``: the student's network trained without a teacher.
        accuracy: Share of right predictions.
        agreement: Share of the teacher's predictions that it shares; may be empty.
        nll: Negative log-likelihood per sample, in nats; may be empty.
        ece: Expected calibration error; may be empty.
        measurement: What the model costs.
        validation: Accuracy on the data that weights and methods are chosen by; may be empty.
        last_accuracy: ``accuracy`` of the last weights instead of the best on validation; may be empty.
        method: How it was taught.
        group: The student network, where there are several: a student is compared with the control of its group.
        step_ms: Time of one training step.
        step_ratio: That time divided by the control's; by default it is calculated where both are known.
        training_memory_bytes: The most that training held.
        seconds_to_target: Training time until the report's ``target`` was reached; None if it never was.

    Raises:
        ValueError: An unknown kind, no accuracy, or a share outside [0, 1].
    """

    name: str
    kind: Kind
    accuracy: list[float]
    agreement: list[float]
    nll: list[float]
    ece: list[float]
    measurement: Measurement
    validation: list[float] = field(default_factory=list)
    last_accuracy: list[float] = field(default_factory=list)
    method: str = ""
    group: str = ""
    step_ms: float | None = None
    step_ratio: float | None = None
    training_memory_bytes: int | None = None
    seconds_to_target: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind of {self.name!r} is {self.kind!r}: expected one of {', '.join(_KINDS)}")
        if not self.accuracy:
            raise ValueError(f"accuracy of {self.name!r} is empty: expected one figure per seed")
        for name in ("accuracy", "agreement", "ece", "validation", "last_accuracy"):
            for value in getattr(self, name):
                if not 0.0 <= value <= 1.0:
                    raise ValueError(f"{name} of {self.name!r} is {value}: expected a share between 0 and 1")

    @property
    def mean(self) -> float:
        """Accuracy averaged over seeds."""
        return statistics.fmean(self.accuracy)


@dataclass(frozen=True)
class Curve:
    """A learning curve: (epoch, accuracy) pairs. Curves that share label and group are seeds of one model.

    ``group`` is the student network, as a row's; curves of different groups are drawn beside each other.
    """

    label: str
    points: list[tuple[float, float]]
    group: str = ""


@dataclass(frozen=True, eq=False)
class Example:
    """One sample with what teacher and student said; an image (uint8, H × W or H × W × 3) or a text.

    Raises:
        ValueError: The image has another shape or type.
    """

    image: np.ndarray | None
    text: str | None
    label: str
    teacher: str
    student: str
    teacher_confidence: float
    student_confidence: float

    def __post_init__(self) -> None:
        i = self.image
        if i is not None and (
            i.dtype != np.uint8 or i.ndim not in (2, 3) or (i.ndim == 3 and i.shape[2] not in (1, 3))
        ):
            raise ValueError(f"image is {i.dtype} of shape {i.shape}: expected uint8 of H × W or H × W × 3")


@dataclass
class Report:
    """Teachers, students and controls beside each other.

    Attributes:
        title: Heading of the page.
        rows: The models.
        curves: Learning curves, accuracy in [0, 1] by epoch.
        examples: Samples for the gallery instead of the analysis's; those where teacher and student differ are shown.
        notes: Sentences about how the figures came about.
        files: What was written: a description and a path relative to the page.
        environment: Versions and the like, as :func:`environment` gives them.
        compared: How many samples the examples were picked from, and on how many of these the two differ.
        history: Training of the student that is shown: plain lines with ``losses`` and ``shares`` by term, as
            ``Result.history`` gives them; lines are numbered through, whatever their ``epoch``.
        analysis: What one student and its teacher say of the same samples (:func:`tutelage.deploy.analysis.analyse`).
        recipe: The settings, as text.
        command: What to type to get the same again.
        skipped: Methods that were not run, and why.
        quoted: Figures from papers.
        target: The accuracy that rows' ``seconds_to_target`` are about.
        chosen: Index of the row that somebody chose, by limits for example; otherwise the best student is shown.
        figure: What the rows' ``accuracy`` is called, where it is the main figure of another task.
    """

    title: str
    rows: list[Row]
    curves: list[Curve] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    compared: tuple[int, int] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    analysis: Analysis | None = None
    recipe: str = ""
    command: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    quoted: list[Quoted] = field(default_factory=list)
    target: float | None = None
    chosen: int | None = None
    figure: str = "accuracy"

    @property
    def heading(self) -> str:
        """``figure`` with a capital."""
        return self.figure[0].upper() + self.figure[1:]

    def headline(self) -> str:
        """What the figures say, in a sentence or two: the best student against teacher and control."""
        from tutelage.deploy.wording import headline

        return headline(self)

    def table(self) -> Table:
        """The table for a terminal; up to four models stand side by side.

        Figures that no model has are left out, and of many models all but the most important.
        """
        from tutelage.deploy.tables import terminal_table

        return terminal_table(self)

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Headline, table and notes as plain text."""
        from tutelage.deploy.tables import as_text

        return as_text(self)

    def html(self, path: str | Path) -> Path:
        """Write the page: one file that needs nothing else, in light and dark, for wide and narrow screens.

        Raises:
            ImportError: matplotlib, which draws the pictures, is not installed.
        """
        from tutelage.deploy.page import page

        with replacing(path) as beside:
            beside.write_text(page(self), encoding="utf-8")
        return Path(path)

    def save_json(self, path: str | Path) -> Path:
        """Write everything the page is made from; :meth:`from_json` reads it back."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        with replacing(path) as beside:
            beside.write_text(
                json.dumps({"format": _FORMAT, **body}, default=_plain_data, ensure_ascii=False, indent=1),
                encoding="utf-8",
            )
        return Path(path)

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read a report that :meth:`save_json` wrote, now or in an earlier format.

        Raises:
            ValueError: The file is no report, or one of a later format.
        """
        from tutelage.deploy.analysis import Analysis

        body = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(body, dict) or body.pop("format", None) not in _READABLE:
            raise ValueError(f"{Path(path).name} is not a report of format {_FORMAT} or before")
        rows = [Row(**{**r, "measurement": Measurement(**r["measurement"])}) for r in body.pop("rows")]
        curves = [Curve(**{**c, "points": [(x, y) for x, y in c["points"]]}) for c in body.pop("curves")]
        examples = [example_of(e) for e in body.pop("examples")]
        compared = tuple(body.pop("compared") or ()) or None
        found = body.pop("analysis", None)
        analysis = Analysis.from_plain(found) if found else None
        quoted = [Quoted(**q) for q in body.pop("quoted", [])]
        return cls(
            rows=rows,
            curves=curves,
            examples=examples,
            compared=compared,
            analysis=analysis,
            quoted=quoted,
            **body,
        )

    def teacher(self) -> Row | None:
        """The first teacher's row."""
        return next((r for r in self.rows if r.kind == "teacher"), None)

    def students(self) -> list[Row]:
        """The rows of everything that was taught."""
        return [r for r in self.rows if r.kind == "student"]

    def chosen_by_validation(self) -> bool:
        """Whether the best student can be chosen without looking at the accuracy that is reported."""
        return all(r.validation for r in self.students())

    def best(self, group: str | None = None) -> Row | None:
        """The chosen row, or the best student (of a group): by validation accuracy if every student has it, by
        ``accuracy`` otherwise."""
        if group is None and self.chosen is not None:
            return self.rows[self.chosen]
        students = [r for r in self.students() if group is None or r.group == group]
        by_validation = self.chosen_by_validation()
        key = (lambda r: statistics.fmean(r.validation)) if by_validation else (lambda r: r.mean)
        return max(students, key=key, default=None)

    def control_of(self, row: Row) -> Row | None:
        """The control of the row's group, else the one of the same size, else the only one there is."""
        controls = [
            r for r in self.rows if r.kind == "control" and (r.group == row.group or not (r.group and row.group))
        ]
        own = [r for r in controls if row.group and r.group == row.group]
        same = [r for r in controls if r.measurement.parameters == row.measurement.parameters]
        for found in (own, same):
            if found:
                return found[0]
        return controls[0] if len(controls) == 1 else None

    def kind_of(self, row: Row) -> str:
        """The kind of a row, with its precision where that is another than the first row's."""
        precision = row.measurement.precision
        return row.kind if precision == self.rows[0].measurement.precision else f"{row.kind}, {precision}"


def environment() -> dict[str, str]:
    """Versions and resources that figures depend on, without the machine's name or paths.

    >>> {"python", "torch", "threads"} <= environment().keys()
    True
    """
    found = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "CPU count": str(os.cpu_count()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    for name in (
        "tutelage", "torch", "accelerate", "safetensors", "numpy", "rich", "torchmetrics",
        "torchvision", "timm", "transformers", "datasets", "onnx", "onnxscript", "onnxruntime", "torchao",
    ):  # fmt: skip
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def example_of(stored: Mapping[str, Any]) -> Example:
    """An :class:`Example` as it stands in a report's file."""
    image = stored["image"]
    if image is not None:
        image = np.frombuffer(base64.b64decode(image["uint8"]), np.uint8).reshape(image["shape"])
    return Example(**{**stored, "image": image})


def _plain_data(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "uint8": base64.b64encode(value.tobytes()).decode()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a report holds a {type(value).__name__}, which JSON cannot")
