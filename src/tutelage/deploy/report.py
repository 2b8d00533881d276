"""What a distillation was worth: one table, one page, one file to rebuild them from."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tutelage.comparison.intervals import Interval, mean_interval, paired_interval
from tutelage.deploy.measure import Measurement
from tutelage.files import replacing

Kind = Literal["teacher", "student", "control"]
_FORMAT = 1
_SIDE_BY_SIDE = 4
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

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind of {self.name!r} is {self.kind!r}: expected one of {', '.join(_KINDS)}")
        if not self.accuracy:
            raise ValueError(f"accuracy of {self.name!r} is empty: expected one figure per seed")
        for name in ("accuracy", "agreement", "ece"):
            for value in getattr(self, name):
                if not 0.0 <= value <= 1.0:
                    raise ValueError(f"{name} of {self.name!r} is {value}: expected a share between 0 and 1")


@dataclass(frozen=True)
class Curve:
    """A learning curve: (epoch, accuracy) pairs. Curves that share a label are seeds of one model."""

    label: str
    points: list[tuple[float, float]]


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
    """Teacher, student and control beside each other.

    Attributes:
        title: Heading of the page.
        rows: The models.
        curves: Learning curves, accuracy in [0, 1] by epoch.
        examples: Samples for the gallery; those where teacher and student differ are shown.
        notes: Sentences about how the figures came about.
        files: What was written: a description and a path relative to the page.
        environment: Versions and the like, as :func:`environment` gives them.
        compared: How many samples the examples were picked from, and on how many of these the two differ.
    """

    title: str
    rows: list[Row]
    curves: list[Curve] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    compared: tuple[int, int] | None = None

    def headline(self) -> str:
        """What the figures say, in a sentence or two: the best student against teacher and control."""
        student = self._student()
        if student is None:
            return "No student was measured."
        mean = statistics.fmean(student.accuracy)
        teacher = self._teacher()
        name = "The student" if student.name == "student" else student.name
        students = sum(r.kind == "student" for r in self.rows)
        if students > 1:
            # The best of several looks better than it is: the reader should know that it was chosen.
            name += f", the best of {students} students,"
        if teacher is None:
            first = f"{name} reaches {_percent(mean)} accuracy."
        else:
            goal = statistics.fmean(teacher.accuracy)
            relation = f"{_percent(mean / goal)} of the teacher’s {_percent(goal)}" if goal else "the teacher 0 %"
            first = f"{name} reaches {_percent(mean)} accuracy, {relation}"
            savings = [
                " ".join(_ratio(before, after, *words))
                for before, after, words in (
                    (teacher.measurement.size_bytes, student.measurement.size_bytes, ("smaller", "larger")),
                    (*_latencies(teacher, student), ("faster", "slower")),
                )
                if before and after and not 0.95 < before / after < 1.05
            ]
            first += f"; it is {' and '.join(savings)}." if savings else "."
        control = self._control_of(student)
        if control is None:
            return first
        gain = _gain(student, control)
        same = control.measurement.parameters == student.measurement.parameters is not None
        other = "the same network trained without a teacher" if same else control.name
        points = "percentage points"
        if gain.n == 1 and len(student.accuracy) == 1:
            second = f"Against {other} that is {_signed(gain)} {points}, on one seed: the spread is unknown."
        elif math.isnan(gain.half_width):
            second = f"Against {other} that is {_signed(gain)} {points}; the seeds are not paired."
        elif gain.low > 0:
            second = f"Distillation adds {gain} {points} over {other} ({gain.n} seeds)."
        elif gain.high < 0:
            loss = Interval(-gain.mean, gain.half_width, gain.n)
            second = f"Distillation costs {loss} {points} against {other} ({gain.n} seeds)."
        else:
            second = f"Against {other} that is {_signed(gain)} {points}: no difference that {gain.n} seeds can tell."
        return f"{first} {second}"

    def key_figures(self) -> list[tuple[str, str, str, str]]:
        """The best student in a few figures: name, number, unit or word, and what it was made from."""
        student, teacher = self._student(), self._teacher()
        if student is None:
            return []
        accuracy = mean_interval([100 * a for a in student.accuracy])
        seeds = _plural(accuracy.n, "seed")
        detail = f"{100 * statistics.fmean(teacher.accuracy):.1f} % teacher, {seeds}" if teacher else seeds
        figures = [("Student’s accuracy", str(accuracy), "%", detail)]
        control = self._control_of(student)
        if control is not None:
            alone = f"{100 * statistics.fmean(control.accuracy):.1f} % without a teacher"
            figures.append(("Gain over control", _signed(_gain(student, control)), "points", alone))
        if teacher is None:
            return figures
        a, b = teacher.measurement, student.measurement
        if a.size_bytes and b.size_bytes:
            number, word = _ratio(a.size_bytes, b.size_bytes, "smaller", "larger")
            figures.append(("Size", number, word, f"{_bytes(b.size_bytes)}, teacher {_bytes(a.size_bytes)}"))
        before, after = _latencies(teacher, student)
        if before and after:
            number, word = _ratio(before, after, "faster", "slower")
            figures.append(("Latency", number, word, f"{_ms(after)} ms, teacher {_ms(before)} ms"))
        return figures

    def table(self) -> Table:
        """The table for a terminal; up to four models stand side by side.

        Figures that no model has are left out.
        """
        table = Table(title=self.title, title_justify="left", caption=self.reading(), caption_justify="left")
        columns = self.columns()
        names = [r.name if r.name == (kind := self.kind_of(r)) else f"{r.name}\n{kind}" for r in self.rows]
        if len(self.rows) <= _SIDE_BY_SIDE:
            # A few models fit beside each other in 80 columns; a dozen figures do not.
            table.add_column("")
            for name in names:
                table.add_column(escape(name), justify="right")
            for figure, cells in columns:
                table.add_row(figure, *(escape(cell or "–") for cell in cells))
            return table
        table.add_column("Model")
        for figure, _ in columns:
            table.add_column(figure, justify="right")
        for i, name in enumerate(names):
            table.add_row(escape(name), *(escape(cells[i] or "–") for _, cells in columns))
        return table

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Headline, table and notes as plain text."""
        out = io.StringIO()
        console = Console(
            file=out,
            width=120 if len(self.rows) <= _SIDE_BY_SIDE else 160,
            no_color=True,
            highlight=False,
            markup=False,
        )
        console.print(self.headline(), soft_wrap=True)
        console.print()
        console.print(self.table() if self.rows else self.title)
        for note in self.notes:
            console.print(f"- {note}", soft_wrap=True)
        for name, path in self.files.items():
            console.print(f"{name}: {path}", soft_wrap=True)
        return out.getvalue()

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
        """Read a report that :meth:`save_json` wrote.

        Raises:
            ValueError: The file is no report, or one of another format.
        """
        body = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(body, dict) or body.pop("format", None) != _FORMAT:
            raise ValueError(f"{Path(path).name} is not a report of format {_FORMAT}")
        rows = [Row(**{**r, "measurement": Measurement(**r["measurement"])}) for r in body.pop("rows")]
        curves = [Curve(c["label"], [(x, y) for x, y in c["points"]]) for c in body.pop("curves")]
        examples = [Example(**{**e, "image": _image(e["image"])}) for e in body.pop("examples")]
        compared = tuple(body.pop("compared") or ()) or None
        return cls(rows=rows, curves=curves, examples=examples, compared=compared, **body)

    def _teacher(self) -> Row | None:
        return next((r for r in self.rows if r.kind == "teacher"), None)

    def _student(self) -> Row | None:
        students = [r for r in self.rows if r.kind == "student"]
        return max(students, key=lambda r: statistics.fmean(r.accuracy), default=None)

    def _control_of(self, row: Row) -> Row | None:
        """The control of the same size; the only one where sizes are unknown."""
        controls = [r for r in self.rows if r.kind == "control"]
        same = [r for r in controls if r.measurement.parameters == row.measurement.parameters]
        if same:
            return same[0]
        return controls[0] if len(controls) == 1 else None

    def kind_of(self, row: Row) -> str:
        """The kind of a row, with its precision where that is another than the first row's."""
        precision = row.measurement.precision
        return row.kind if precision == self.rows[0].measurement.precision else f"{row.kind}, {precision}"

    def columns(self) -> list[tuple[str, list[str]]]:
        """Headers with one cell per row, in the order of reading; an empty cell where there is no figure."""
        rows, costs = self.rows, [r.measurement for r in self.rows]
        gains = []
        for r in rows:
            control = self._control_of(r) if r.kind == "student" else None
            gains.append(_signed(_gain(r, control)) if control else "")
        columns = [
            ("Accuracy, %", [_percents(r.accuracy) for r in rows]),
            ("Gain over control, points", gains),
            ("Agrees with teacher, %", [_percents(r.agreement) if r.kind != "teacher" else "" for r in rows]),
            ("NLL", [_nats(r.nll) for r in rows]),
            ("ECE, %", [_percents(r.ece) for r in rows]),
            ("Parameters", [_count(m.parameters) for m in costs]),
            ("Size", [_bytes(m.size_bytes) for m in costs]),
            ("MACs", [_count(m.macs) for m in costs]),
            ("Latency p50 / p95, ms", [f"{_ms(m.latency_p50_ms)} / {_ms(m.latency_p95_ms)}" for m in costs]),
            ("Peak memory", [_bytes(m.peak_memory_bytes) for m in costs]),
        ]
        return [(name, cells) for name, cells in columns if any(cells)]

    def reading(self) -> str:
        """How the table was obtained."""
        seeds = sorted({len(r.accuracy) for r in self.rows})
        words = []
        if any(n > 1 for n in seeds):
            words.append("± is half of the 95 % Student-t interval over seeds; the gain is paired by seed.")
        batches = sorted({r.measurement.batch_size for r in self.rows})
        places = sorted({f"{r.measurement.device}, {_plural(r.measurement.threads, 'thread')}" for r in self.rows})
        if self.rows:
            batch = " or ".join(map(str, batches))
            words.append(f"MACs are for one sample, latency for a batch of {batch} ({'; '.join(places)}).")
        return " ".join(words)


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


def short(value: float) -> str:
    """A count with a metric prefix and three digits.

    >>> short(272474), short(1e6), short(41), short(2.5e9)
    ('272 k', '1 M', '41', '2.5 G')
    """
    for power, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        # 999 600 is 1 M and not 1000 k.
        if value >= 0.9995 * power:
            return f"{float(f'{value / power:.3g}'):g}{prefix}"
    return f"{float(f'{value:.3g}'):g}"


def _gain(student: Row, control: Row) -> Interval:
    """Points over the control: paired by seed, or the bare difference of means where the seeds do not match."""
    ours, theirs = [100 * a for a in student.accuracy], [100 * a for a in control.accuracy]
    if len(ours) == len(theirs):
        return paired_interval(ours, theirs)
    return Interval(statistics.fmean(ours) - statistics.fmean(theirs), math.nan, 1)


def _signed(gain: Interval) -> str:
    return f"{gain:+}".replace("-", "−")


def _latencies(teacher: Row, student: Row) -> tuple[float | None, float | None]:
    a, b = teacher.measurement, student.measurement
    if (a.device, a.threads, a.batch_size) != (b.device, b.threads, b.batch_size):
        return None, None
    return a.latency_p50_ms, b.latency_p50_ms


def _ratio(before: float, after: float, less: str, more: str) -> tuple[str, str]:
    """How many times less or more; a few per cent are no difference worth a word."""
    ratio, word = (before / after, less) if before >= after else (after / before, more)
    if ratio < 1.05:
        return "≈ 1×", "the teacher’s"
    return f"{ratio:.1f}×" if ratio < 99.5 else f"{ratio:.0f}×", word


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _percents(shares: list[float]) -> str:
    return str(mean_interval([100 * s for s in shares])) if shares else ""


def _nats(values: list[float]) -> str:
    # One sure and wrong answer of probability zero is enough for an infinite one.
    if not all(map(math.isfinite, values)):
        return "not finite"
    return format(mean_interval(values), ".3f") if values else ""


def _count(value: int | None) -> str:
    return "" if value is None else short(value)


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{short(value)}B" if value >= 999.5 else f"{value} B"


def _ms(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _plain_data(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "uint8": base64.b64encode(value.tobytes()).decode()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a report holds a {type(value).__name__}, which JSON cannot")


def _image(stored: dict[str, Any] | None) -> np.ndarray | None:
    if stored is None:
        return None
    return np.frombuffer(base64.b64decode(stored["uint8"]), np.uint8).reshape(stored["shape"])
