"""The report in words: numbers with units, and the sentences that say what they come to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tutelage.comparison.intervals import Interval, mean_interval, paired_interval
from tutelage.deploy.report import Report, Row

MINUS = "−"


def headline(report: Report) -> str:
    """What the figures say, in a sentence or two: the best student against teacher and control.

    A gain is claimed only where the interval over seeds leaves 0 out, and the best of several is called that: it was
    chosen, so it looks better than it is.
    """
    student = report.best()
    if student is None:
        return "No student was measured."
    teacher = report.teacher()
    name = ("The student" if student.name == "student" else student.name) + _chosen(report, student)
    first = f"{name} reaches {percent(student.mean)} {report.figure}"
    if teacher is not None:
        goal = teacher.mean
        first += f", {percent(student.mean / goal)} of the teacher’s {percent(goal)}" if goal else ", the teacher 0 %"
        savings = [
            " ".join(ratio(before, after, *words))
            for before, after, words in (
                (teacher.measurement.size_bytes, student.measurement.size_bytes, ("smaller", "larger")),
                (*latencies(teacher, student), ("faster", "slower")),
            )
            if before and after and not 0.95 < before / after < 1.05
        ]
        first += f"; it is {' and '.join(savings)}" if savings else ""
    control = report.control_of(student)
    return f"{first}." if control is None else f"{first}. {_against(student, control)}"


def _chosen(report: Report, student: Row) -> str:
    """How the student was picked from several."""
    students = report.students()
    if len(students) == 1:
        return ""
    if report.chosen is not None:
        return f", chosen from {len(students)},"
    several = len({s.group for s in students}) > 1 and not student.name.endswith(student.group)
    where = f" on {student.group}" if several else ""
    by = f"validation {report.figure}" if report.chosen_by_validation() else f"the {report.figure} shown"
    return f"{where}, the best of {len(students)} students by {by},"


def _against(student: Row, control: Row) -> str:
    gain = gain_over(student, control)
    same = control.measurement.parameters == student.measurement.parameters is not None
    same = same or bool(student.group and student.group == control.group)
    other = "the same network trained without a teacher" if same else control.name
    points = "percentage points"
    if gain.n == 1 and len(student.accuracy) == 1:
        return f"Against {other} that is {signed(gain)} {points}, on one seed: the spread is unknown."
    if math.isnan(gain.half_width):
        return f"Against {other} that is {signed(gain)} {points}; the seeds are not paired."
    if gain.low > 0:
        return f"Distillation adds {gain} {points} over {other} ({gain.n} seeds)."
    if gain.high < 0:
        loss = Interval(-gain.mean, gain.half_width, gain.n)
        return f"Distillation costs {loss} {points} against {other} ({gain.n} seeds)."
    alone = "the student alone" if same else control.name
    return f"With {signed(gain)} {points} over {gain.n} seeds it is not distinguishable from {alone}."


def key_figures(report: Report) -> list[tuple[str, str, str, str]]:
    """The best student in a few figures: name, number, unit or word, and what it was made from."""
    student, teacher = report.best(), report.teacher()
    if student is None:
        return []
    accuracy = mean_interval([100 * a for a in student.accuracy])
    seeds = plural(accuracy.n, "seed")
    detail = f"{100 * teacher.mean:.1f} % teacher, {seeds}" if teacher else seeds
    figures = [(f"Student’s {report.figure}", str(accuracy), "%", detail)]
    control = report.control_of(student)
    if control is not None:
        alone = f"{100 * control.mean:.1f} % without a teacher"
        figures.append(("Gain over control", signed(gain_over(student, control)), "points", alone))
    if teacher is None:
        return figures
    a, b = teacher.measurement, student.measurement
    if a.size_bytes and b.size_bytes:
        number, word = ratio(a.size_bytes, b.size_bytes, "smaller", "larger")
        figures.append(("Size", number, word, f"{in_bytes(b.size_bytes)}, teacher {in_bytes(a.size_bytes)}"))
    before, after = latencies(teacher, student)
    if before and after:
        number, word = ratio(before, after, "faster", "slower")
        figures.append(("Latency", number, word, f"{digits(after)} ms, teacher {digits(before)} ms"))
    return figures


def gain_over(student: Row, control: Row) -> Interval:
    """Points over the control: paired by seed, or the bare difference of means where the seeds do not match."""
    ours, theirs = [100 * a for a in student.accuracy], [100 * a for a in control.accuracy]
    if len(ours) == len(theirs):
        return paired_interval(ours, theirs)
    return Interval(statistics.fmean(ours) - statistics.fmean(theirs), math.nan, 1)


def latencies(teacher: Row, student: Row) -> tuple[float | None, float | None]:
    """Median times of both, if they were taken under the same conditions."""
    a, b = teacher.measurement, student.measurement
    if (a.device, a.threads, a.batch_size) != (b.device, b.threads, b.batch_size):
        return None, None
    return a.latency_p50_ms, b.latency_p50_ms


def ratio(before: float, after: float, less: str, more: str) -> tuple[str, str]:
    """How many times less or more; a few per cent are no difference worth a word.

    >>> ratio(80, 20, "smaller", "larger"), ratio(100, 99, "smaller", "larger")
    (('4.0×', 'smaller'), ('≈ 1×', 'the teacher’s'))
    """
    times, word = (before / after, less) if before >= after else (after / before, more)
    if times < 1.05:
        return "≈ 1×", "the teacher’s"
    return f"{times:.1f}×" if times < 99.5 else f"{times:.0f}×", word


def signed(gain: Interval) -> str:
    """With the sign of its mean.

    >>> signed(Interval(-1.25, 0.5, 3))
    '−1.2 ± 0.5'
    """
    return f"{gain:+}".replace("-", MINUS)


def percent(share: float) -> str:
    """A share in per cent.

    >>> percent(0.9144)
    '91.4 %'
    """
    return f"{100 * share:.1f} %"


def percents(shares: Sequence[float]) -> str:
    """Mean and interval of shares over seeds, in per cent without the sign; empty if there are none."""
    return str(mean_interval([100 * s for s in shares])) if shares else ""


def nats(values: Sequence[float]) -> str:
    """Mean and interval with three decimals; empty if there are none."""
    # One sure and wrong answer of probability zero is enough for an infinite one.
    if not all(map(math.isfinite, values)):
        return "not finite"
    return format(mean_interval(values), ".3f") if values else ""


def short(value: float) -> str:
    """A count with a metric prefix and three digits.

    >>> short(272474), short(1e6), short(41), short(2.5e9)
    ('272 k', '1 M', '41', '2.5 G')
    """
    for power, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        # 999 600 is 1 M and not 1000 k.
        if value >= 0.9995 * power:
            return f"{float(f'{value / power:.3g}'):g}{prefix}"
    return digits(value)


def in_bytes(value: float) -> str:
    """Bytes with a metric prefix.

    >>> in_bytes(3462112), in_bytes(12)
    ('3.46 MB', '12 B')
    """
    return f"{short(value)}B" if value >= 999.5 else f"{value:g} B"


def digits(value: float) -> str:
    """Three significant digits, without an exponent where it can be avoided.

    >>> digits(0.12345), digits(2.0), digits(12345.6)
    ('0.123', '2', '12300')
    """
    return f"{float(f'{value:.3g}'):g}"


def plural(count: int, word: str) -> str:
    """A count with its noun.

    >>> plural(1, "seed"), plural(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
