"""The report's charts, each with its title, a remark and a key."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from html import escape

from tutelage.comparison.intervals import mean_interval
from tutelage.deploy import pictures
from tutelage.deploy.analysis import Analysis, Bin, calibration_error
from tutelage.deploy.pareto import pareto_front
from tutelage.deploy.report import Curve, Report, Row
from tutelage.deploy.tables import measured_alike
from tutelage.deploy.wording import percent, plural, short

_SIGNS = {"teacher": "■", "student": "●", "control": "◆"}
# As many lines as there are colours; of more, only a few are looked at.
_TOLD_APART = 6
_ALL_NAMED = 10
_NAMED_OF_FRONT = 3


def figure(title: str, remark: str, picture: str, keys: list[tuple[str, str]], wide: bool = False) -> str:
    """A card with a picture in it; a key is a sample and what it stands for."""
    items = "".join(f"<li>{key}{escape(label)}</li>" for key, label in keys)
    keyed = f'<ul class="keys">{items}</ul>' if items else ""
    return (
        f'<figure class="picture{" wide" if wide else ""}"><figcaption><h3>{escape(title)}</h3>'
        f'<p class="small">{escape(remark)}</p></figcaption>{picture}{keyed}</figure>'
    )


def kind_key(kind: str) -> str:
    """The marker of a kind of model, as in the pictures."""
    return f'<span class="point {kind}" aria-hidden="true">{_SIGNS[kind]}</span>'


def _line_key(style: int | None) -> str:
    """A sample of a line, as in the picture; None is a muted one."""
    colour, dashes = pictures.style_of(style) if style is not None else ("muted", ())
    return (
        '<svg class="key" viewBox="0 0 36 12" width="36" height="12" aria-hidden="true"><path d="M1 6H35" '
        f'style="stroke:var(--{colour});stroke-width:2.2;stroke-dasharray:{",".join(map(str, dashes)) or "none"}"/>'
        "</svg>"
    )


# accuracy by what a model costs


def fronts(report: Report) -> list[str]:
    """Accuracy by size and by latency."""
    rows = report.rows
    if not rows:
        return []
    # Bytes tell an int8 file from its float original; parameters do not.
    parameters = [r.measurement.parameters for r in rows]
    by_bytes = not all(parameters) or len({r.measurement.precision for r in rows}) > 1
    name = "bytes" if by_bytes else "parameters"
    sizes = [float((r.measurement.size_bytes if by_bytes else r.measurement.parameters) or 1) for r in rows]
    side_by_side = len(set(sizes)) < len(sizes) <= _ALL_NAMED
    remark = "Up is better, left is smaller" + ("; models of one size stand side by side." if side_by_side else ".")
    found = [_front(report, rows, sizes, "sizes", f"{report.heading} by size", f"{name} (logarithmic)", name, remark)]
    timed = measured_alike(rows)
    if len(timed) > 1 and all(r.measurement.latency_p50_ms > 0 for r in timed):
        times = [r.measurement.latency_p50_ms for r in timed]
        batch = timed[0].measurement.batch_size
        what = f"ms for a batch of {batch} (logarithmic)"
        remark = "Up is better, left is faster."
        if len(timed) < len(rows):
            remark += f" {plural(len(rows) - len(timed), 'model')} measured elsewhere or otherwise left out."
        found.append(_front(report, timed, times, "latency", f"{report.heading} by latency", what, "ms", remark))
    return found


def _front(
    report: Report, rows: list[Row], xs: list[float], name: str, title: str, axis: str, unit: str, remark: str
) -> str:
    intervals = [mean_interval([100 * a for a in r.accuracy]) for r in rows]
    front = pareto_front([(x, -i.mean) for x, i in zip(xs, intervals, strict=True)])
    best = report.best()
    kept = sorted(front, key=lambda i: -intervals[i].mean)[:_NAMED_OF_FRONT]
    chosen = {id(r) for r in (report.teacher(), best) if r} | {id(rows[i]) for i in kept}
    several = len({r.group for r in rows if r.group}) > 1
    points = [
        pictures.Point(
            f"{r.name}, {r.group}" if several and not r.name.endswith(r.group) else r.name,
            r.kind,
            x,
            interval.mean,
            interval.half_width,
            front=i in front,
            named=len(rows) <= _ALL_NAMED or id(r) in chosen,
        )
        for i, (r, x, interval) in enumerate(zip(rows, xs, intervals, strict=True))
    ]
    if len(front) > 1:
        remark += " The dotted line is the Pareto front: nothing is both left of it and above it."
    if any(math.isfinite(p.half_width) for p in points):
        remark += " Bars are 95 % intervals over seeds."
    if not all(p.named for p in points):
        remark += " Names of the other points appear under the pointer."
    told = "; ".join(
        f"{p.label} ({p.kind}): {short(p.x)} {unit}, {p.y:.1f} %{', on the front' if p.front else ''}" for p in points
    )
    picture = pictures.point_picture(name, points, axis, title, f"{told}.", sizes=unit != "ms", figure=report.figure)
    kinds = [k for k in _SIGNS if any(p.kind == k for p in points)]
    return figure(title, remark, picture, [(kind_key(k), k) for k in kinds])


# learning curves


def learning_curves(report: Report) -> list[str]:
    """One picture for each student network; the teacher's curve is in all of them."""
    curves = [c for c in report.curves if c.points]
    if not curves:
        return []
    shares = all(0.0 <= y <= 1.0 for c in curves for _, y in c.points)
    groups = list(dict.fromkeys(c.group for c in curves if c.group)) or [""]
    found = []
    for number, group in enumerate(groups, start=1):
        mine = [c for c in curves if c.group in ("", group)]
        name = "curves" if number == 1 else f"curves-{number}"
        found.append(_curves(report, mine, group, name, shares))
    return [f for f in found if f]


def _curves(report: Report, curves: list[Curve], group: str, name: str, shares: bool) -> str:
    factor = 100.0 if shares else 1.0
    labels = list(dict.fromkeys(c.label for c in curves))
    series = [_mean(label, [c for c in curves if c.label == label], factor) for label in labels]
    series = [s for s in series if s.x]
    if not series:
        return ""
    rows = [r for r in report.rows if r.kind == "teacher" or not group or r.group in ("", group)]
    several = sum(len([c for c in curves if c.label == s.label]) > 1 for s in series) > 0
    remark = "Lines are means, bands reach from the lowest to the highest seed." if several else "One seed each."
    muted = 0
    if len(series) > _TOLD_APART:
        looked_at = _looked_at(report, rows, series, group)
        others = [dataclasses.replace(s, muted=True) for s in series if s.label not in looked_at]
        series = [s for s in series if s.label in looked_at]
        muted = len(others)
        remark += " The grey lines’ names appear under the pointer."
    else:
        others = []
    series = [dataclasses.replace(s, style=i) for s, i in zip(series, _styles(series, rows), strict=True)]
    title = (f"{report.heading} by epoch" if shares else "Learning curves") + (f", {group}" if group else "")
    told = "; ".join(f"{s.label}: from {s.mean[0]:.1f} to {s.mean[-1]:.1f}" for s in (*series, *others))
    axis = f"{report.figure}, %" if shares else "value"
    picture = pictures.line_picture(name, [*others, *series], axis, title, f"{told}.")
    keys = [(_line_key(s.style), s.label) for s in series]
    if muted:
        keys.append((_line_key(None), plural(muted, "other")))
    return figure(title, remark, picture, keys)


def _mean(label: str, curves: list[Curve], factor: float) -> pictures.Series:
    at: dict[float, list[float]] = {}
    for x, y in (point for c in curves for point in c.points):
        if math.isfinite(y):
            at.setdefault(x, []).append(factor * y)
    xs = sorted(at)
    means = [statistics.fmean(at[x]) for x in xs]
    return pictures.Series(label, xs, means, [min(at[x]) for x in xs], [max(at[x]) for x in xs])


def _looked_at(report: Report, rows: list[Row], series: list[pictures.Series], group: str) -> set[str]:
    """The best student's line, the control's and the teacher's."""
    best = report.best(group if group in {r.group for r in report.students()} else None)
    control = report.control_of(best) if best else None
    labels = {s.label for s in series}
    found = {label for r in (best, control) if r for label in _labels(r) & labels}
    found |= {r.name for r in rows if r.kind == "teacher"} & labels
    # Curves need not be of rows: then the one that ends highest is looked at.
    if best is None or not _labels(best) & labels:
        found.add(max(series, key=lambda s: s.mean[-1]).label)
    return found


def _labels(row: Row) -> set[str]:
    """What a row's curve may be called: the network need not be in the label, as its picture has it."""
    return {row.name, row.method} - {""}


def _styles(series: list[pictures.Series], rows: list[Row]) -> list[int]:
    """A style for each line: its model's colour where a row has its name and it is the first of its kind."""
    kinds = {label: {"student": 0, "teacher": 1, "control": 5}[r.kind] for r in rows for label in _labels(r)}
    chosen: list[int | None] = []
    for s in series:
        wanted = kinds.get(s.label)
        chosen.append(wanted if wanted not in chosen else None)
    others = (i for i in itertools.chain((0, 2, 3, 4, 1, 5), itertools.count(6)) if i not in chosen)
    return [next(others) if c is None else c for c in chosen]


# the student's training


def training_terms(report: Report) -> list[str]:
    """The loss terms and their shares of the gradient, by epoch."""
    found = []
    losses = _by_term(report, "losses")
    if losses:
        values = [y for s in losses for y in s.mean]
        apart = min(values) > 0 and max(values) / min(values) > 30
        remark = "Means over the epoch. Terms are shown before their weights."
        remark += " “loss” is the weighted sum." if any(s.label == "loss" for s in losses) else ""
        remark += " The axis is logarithmic." if apart else ""
        found.append(_terms("losses", "Loss terms by epoch", remark, losses, "loss", apart, not apart))
    shares = [dataclasses.replace(s, mean=[100 * y for y in s.mean]) for s in _by_term(report, "shares")]
    shares = [dataclasses.replace(s, low=s.mean, high=s.mean) for s in shares]
    if shares:
        remark = "How strongly each weighted term pulls at the student: the norm of its gradient, of all terms’ norms."
        found.append(_terms("shares", "Gradient shares by epoch", remark, shares, "share, %", False, True))
    return found


def _by_term(report: Report, field: str) -> list[pictures.Series]:
    names = list(dict.fromkeys(name for line in report.history for name in line.get(field) or {}))
    found = []
    for style, name in enumerate(names):
        at = [
            (float(number), float(line[field][name]))
            for number, line in enumerate(report.history, start=1)
            if name in (line.get(field) or {}) and math.isfinite(line[field][name])
        ]
        ys = [y for _, y in at]
        if at:
            found.append(pictures.Series(name, [x for x, _ in at], ys, ys, ys, style))
    return found


def _terms(
    name: str, title: str, remark: str, series: list[pictures.Series], axis: str, logarithmic: bool, from_zero: bool
) -> str:
    told = "; ".join(f"{s.label}: from {s.mean[0]:.3g} to {s.mean[-1]:.3g}" for s in series)
    from_zero = from_zero and all(y >= 0 for s in series for y in s.mean)
    picture = pictures.line_picture(
        name, series, axis, title, f"{told}.", logarithmic=logarithmic, y_from_zero=from_zero
    )
    return figure(title, remark, picture, [(_line_key(s.style), s.label) for s in series])


# calibration


def reliability(analysis: Analysis) -> str:
    """How often student and teacher are right by how sure they are."""
    sides = [("student", analysis.student_bins, 0), ("teacher", analysis.teacher_bins, 1)]
    known = [(who, bins, style) for who, bins, style in sides if bins]
    if not known:
        return ""
    series = [_calibrated(who, bins, style) for who, bins, style in known]
    keys = [(_line_key(s), f"{who}, ECE {percent(calibration_error(bins))}") for who, bins, s in known]
    told = "; ".join(f"{who}: expected calibration error {percent(calibration_error(bins))}" for who, bins, _ in known)
    remark = (
        "Below the dotted diagonal a model is surer than it should be. Larger points stand for more answers; "
        f"{sum(b.count for b in known[0][1]):,} samples."
    )
    title = "Reliability: how often right by how sure"
    return figure(title, remark, pictures.reliability_picture("reliability", series, title, f"{told}."), keys)


def _calibrated(label: str, bins: list[Bin], style: int) -> pictures.Series:
    full = [b for b in bins if b.count]
    total = sum(b.count for b in full)
    shares = [b.count / total for b in full]
    x, y = [100 * b.confidence for b in full], [100 * b.accuracy for b in full]
    return pictures.Series(label, x, y, shares, shares, style)
