"""The report's tables: which figures there are, in which order, for the page and for the terminal."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tutelage.comparison.intervals import Interval
from tutelage.deploy.measure import Measurement
from tutelage.deploy.report import Report, Row
from tutelage.deploy.wording import digits, gain_over, in_bytes, nats, percents, plural, short, signed

Part = Literal["quality", "use", "training"]
_SIDE_BY_SIDE = 4
_NOT_IN_TERMINAL = ("Validation, %", "Last weights, %", "Latency p99, ms", "Throughput, samples/s")
_OF_MANY = (
    "Gain over control, points",
    "Agrees with teacher, %",
    "Parameters",
    "Size",
    "Latency p50, ms",
)


@dataclass(frozen=True)
class Column:
    """One figure of every row.

    Attributes:
        title: Its name and unit.
        part: Which of the page's tables it belongs to.
        texts: What is shown, a cell for each row; empty where there is no figure.
        values: What is sorted by; None where there is no figure.
        best_first: Whether sorting begins with the largest value.
        explained: What the figure is, where its name does not say it.
    """

    title: str
    part: Part
    texts: list[str]
    values: list[float | None]
    best_first: bool = False
    explained: str = ""


def ordered(report: Report) -> list[Row]:
    """Teachers first, then student network by student network, the most accurate first, the control at its rank."""
    groups = list(dict.fromkeys(r.group for r in report.rows if r.kind != "teacher"))
    teachers = [r for r in report.rows if r.kind == "teacher"]
    others = [r for r in report.rows if r.kind != "teacher"]
    return teachers + sorted(others, key=lambda r: (groups.index(r.group), -r.mean))


def columns(report: Report, rows: list[Row] | None = None) -> list[Column]:
    """Every figure that at least one of the rows has, in the order of reading.

    Args:
        report: Whose controls the rows are compared with.
        rows: In which order; the report's own by default.
    """
    rows = report.rows if rows is None else rows
    costs = [r.measurement for r in rows]
    gains: list[Interval | None] = []
    for r in rows:
        control = report.control_of(r) if r.kind == "student" else None
        gains.append(gain_over(r, control) if control else None)
    target = "" if report.target is None else f" {100 * report.target:g} %"

    def over_seeds(title: str, values: Callable[[Row], list[float]], explained: str, best_first: bool = True) -> Column:
        found = [values(r) for r in rows]
        show = nats if title == "NLL" else percents
        means = [statistics.fmean(v) if v else None for v in found]
        return Column(title, "quality", [show(v) for v in found], means, best_first, explained)

    def cost(
        title: str, part: Part, values: list[float | None], show: Callable[[float], str], explained: str = "",
        best_first: bool = False,
    ) -> Column:  # fmt: skip
        return Column(title, part, ["" if v is None else show(v) for v in values], values, best_first, explained)

    def measured(name: str) -> list[float | None]:
        return [getattr(m, name, None) for m in costs]

    found = [
        over_seeds(
            f"{report.heading}, %",
            lambda r: r.accuracy,
            "Share of right predictions" if report.figure == "accuracy" else "",
        ),
        Column(
            "Gain over control, points",
            "quality",
            [signed(g) if g else "" for g in gains],
            [g.mean if g else None for g in gains],
            True,
            f"{report.heading} minus that of the same network without a teacher",
        ),
        over_seeds(
            "Validation, %", lambda r: r.validation, f"{report.heading} on the data that weights were chosen by"
        ),
        over_seeds(
            "Last weights, %", lambda r: r.last_accuracy, f"{report.heading} of the weights after the last epoch"
        ),
        over_seeds(
            "Agrees with teacher, %",
            lambda r: r.agreement if r.kind != "teacher" else [],
            "Share of the teacher’s first choices that are its own too",
        ),
        over_seeds("NLL", lambda r: r.nll, "Negative log-likelihood of the labels, nats", False),
        over_seeds("ECE, %", lambda r: r.ece, "Expected calibration error", False),
        cost("Parameters", "use", measured("parameters"), short),
        cost("Size", "use", measured("size_bytes"), in_bytes, "Bytes of the file"),
        cost("MACs", "use", measured("macs"), short, "Multiply-accumulate operations of one sample"),
        cost("Latency p50, ms", "use", measured("latency_p50_ms"), digits, "Median time of a call"),
        cost("Latency p95, ms", "use", measured("latency_p95_ms"), digits, "95 of 100 calls are faster"),
        cost("Latency p99, ms", "use", measured("latency_p99_ms"), digits, "99 of 100 calls are faster"),
        cost("Throughput, samples/s", "use", measured("throughput"), short, "", True),
        cost("Energy, J a sample", "use", measured("energy_j"), digits),
        cost("Peak memory", "use", measured("peak_memory_bytes"), in_bytes),
        cost("Step, ms", "training", [r.step_ms for r in rows], digits, "Time of one training step"),
        cost("Step ÷ control’s", "training", [_ratio(report, r) for r in rows], lambda v: f"{digits(v)}×"),
        cost("Memory", "training", [r.training_memory_bytes for r in rows], in_bytes, "The most that training held"),
        cost(f"Time to{target or ' target'}, s", "training", [r.seconds_to_target for r in rows], digits),
    ]
    return [c for c in found if any(c.texts)]


def _ratio(report: Report, row: Row) -> float | None:
    if row.step_ratio is not None or row.step_ms is None or row.kind != "student":
        return row.step_ratio
    control = report.control_of(row)
    return row.step_ms / control.step_ms if control and control.step_ms else None


def reading(report: Report, part: Part | None = None) -> str:
    """How the figures of the tables (or of one) were obtained."""
    words = []
    rows = report.rows
    if part in ("quality", None) and any(len(r.accuracy) > 1 for r in rows):
        words.append("± is half of the 95 % Student-t interval over seeds; the gain is paired by seed.")
    if part in ("use", None) and rows:
        batch = " or ".join(map(str, sorted({r.measurement.batch_size for r in rows})))
        places = sorted({f"{r.measurement.device}, {plural(r.measurement.threads, 'thread')}" for r in rows})
        words.append(f"MACs are for one sample, latency for a batch of {batch} ({'; '.join(places)}).")
    if part == "training" and any(r.seconds_to_target is None for r in rows) and report.target is not None:
        words.append(f"No time where {100 * report.target:g} % were never reached.")
    return " ".join(words)


def terminal_table(report: Report) -> Table:
    """Up to four models beside each other with all figures; more below each other with a few."""
    table = Table(title=report.title, title_justify="left", caption=reading(report), caption_justify="left")
    if len(report.rows) <= _SIDE_BY_SIDE:
        # A few models fit beside each other in 80 columns; a dozen figures do not.
        table.add_column("")
        for row in report.rows:
            table.add_column(escape(_name(report, row)), justify="right")
        for column in columns(report):
            if column.part != "training" and column.title not in _NOT_IN_TERMINAL:
                table.add_row(column.title, *(escape(cell or "–") for cell in column.texts))
        return table
    rows = ordered(report)
    chosen = [c for c in columns(report, rows) if c.title in (f"{report.heading}, %", *_OF_MANY)]
    table.add_column("Model")
    grouped = len({r.group for r in rows if r.group}) > 1
    if grouped:
        table.add_column("Network")
    for column in chosen:
        table.add_column(column.title, justify="right")
    for i, row in enumerate(rows):
        name = [escape(_name(report, row)), *([escape(row.group)] if grouped else [])]
        table.add_row(*name, *(escape(c.texts[i] or "–") for c in chosen))
    return table


def _name(report: Report, row: Row) -> str:
    kind = report.kind_of(row)
    return row.name if row.name == kind else f"{row.name}\n{kind}"


def as_text(report: Report) -> str:
    """Headline, table, notes and files, without colour."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=120 if len(report.rows) <= _SIDE_BY_SIDE else 160,
        no_color=True,
        highlight=False,
        markup=False,
    )
    console.print(report.headline(), soft_wrap=True)
    console.print()
    console.print(report.table() if report.rows else report.title)
    if report.skipped:
        console.print(f"Not run: {', '.join(report.skipped)}", soft_wrap=True)
    for note in report.notes:
        console.print(f"- {note}", soft_wrap=True)
    for name, path in report.files.items():
        console.print(f"{name}: {path}", soft_wrap=True)
    return out.getvalue()


def measured_alike(rows: list[Row]) -> list[Row]:
    """The rows whose latency was taken under the first row's conditions: the others cannot be compared with it."""

    def conditions(m: Measurement) -> tuple[str, int, int]:
        return m.device, m.threads, m.batch_size

    return [r for r in rows if conditions(r.measurement) == conditions(rows[0].measurement)]
