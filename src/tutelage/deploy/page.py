"""The report as one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import base64
import math
import re
import urllib.parse
from collections.abc import Sequence
from html import escape

import numpy as np

from tutelage.deploy import page_figures, pictures
from tutelage.deploy.analysis import Analysis
from tutelage.deploy.page_figures import kind_key
from tutelage.deploy.page_style import SCRIPT, STYLE, policy
from tutelage.deploy.report import Example, Report, Row
from tutelage.deploy.tables import Column, Part, columns, ordered, reading
from tutelage.deploy.wording import key_figures

_GALLERY = 24
_CLASSES = 20
# So strong may a cell's colour be that the number in it stays legible.
_STRONGEST = 42


def page(report: Report) -> str:
    """The whole page of a report; every text in it is escaped, and what has no data is left out."""
    rows = ordered(report)
    curves = page_figures.learning_curves(report)
    found = [
        ("models", "Models", _models(report, rows, "quality", f"{report.heading} of each model")),
        ("training", "Training", _cards(curves + page_figures.training_terms(report))),
        ("costs", f"{report.heading} against cost", _cards(page_figures.fronts(report))),
        ("use", "What they cost in use", _models(report, rows, "use", "Cost of each model in use")),
        ("effort", "What training them cost", _models(report, rows, "training", "Cost of training each model")),
        ("answers", "What student and teacher answer", _answers(report.analysis)),
        ("differ", "Where teacher and student differ", _gallery(report)),
        ("layers", "Which layers are alike", _layers(report.analysis)),
        ("quoted", "Quoted from papers, not measured here", _quoted(report)),
        ("skipped", "Methods that were not run", _skipped(report.skipped)),
        ("notes", "Notes", _list([escape(note) for note in report.notes])),
        ("files", "Files", _list([_file(name, path) for name, path in report.files.items()])),
        ("again", "Reproduce", _again(report)),
        ("environment", "Environment", _facts(report.environment)),
    ]
    sections = [(name, escape(title), body) for name, title, body in found if body]
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{body}</section>\n'
        for name, title, body in sections
    )
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy()}">
<title>{escape(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(report.title)}</h1>
<p class="headline">{_unbroken(report.headline())}</p>
{_tiles(report)}{f'<nav aria-label="On this page">{links}</nav>' if len(sections) > 3 else ""}
{body}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _unbroken(text: str) -> str:
    """Escaped, with numbers and their units or widths on one line."""
    return re.sub(r" (?=[%±])|(?<=±) ", "\u00a0", escape(text))


def _tiles(report: Report) -> str:
    tiles = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="big">{escape(big)}<small> {escape(unit)}</small></dd>'
        f'<dd class="small">{escape(detail)}</dd></div>'
        for name, big, unit, detail in key_figures(report)
    )
    return f'<dl class="tiles">{tiles}</dl>\n' if tiles else ""


def _cards(figures: list[str]) -> str:
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


# tables


def _models(report: Report, rows: list[Row], part: Part, caption: str) -> str:
    every = columns(report, rows)
    shown = [c for c in every if c.part == part]
    if not shown:
        return ""
    if part != "quality":
        # What a cost buys belongs beside it.
        shown = [c for c in every if c.title == f"{report.heading}, %"] + shown
    grouped = len({r.group for r in rows if r.group}) > 1
    head = '<th scope="col">Model</th>' + ('<th scope="col" class="text">Network</th>' if grouped else "")
    head += "".join(_head(c) for c in shown)
    best = report.best()
    body = ""
    for i, row in enumerate(rows):
        chosen = ' class="best"' if row is best else ""
        best_of = ", best" if row is best and len(report.students()) > 1 else ""
        kind = f"{kind_key(row.kind)}{escape(report.kind_of(row))}{best_of}"
        name = f'<th scope="row" data-v="{escape(row.name)}">{escape(row.name)} <span class="kind">{kind}</span></th>'
        group = _words(row.group)
        body += f"<tr{chosen}>{name}{group if grouped else ''}"
        body += "".join(_cell(c.texts[i], c.values[i]) for c in shown) + "</tr>"
    told = reading(report, part)
    remark = f'<p class="small">{escape(told)}</p>' if told else ""
    return _table(caption, head, body, len(rows)) + remark


def _head(column: Column) -> str:
    first = "descending" if column.best_first else "ascending"
    title = f' title="{escape(column.explained)}"' if column.explained else ""
    return f'<th scope="col" data-sort="number" data-first="{first}"{title}>{_unbroken(column.title)}</th>'


def _cell(text: str, value: float | None = None) -> str:
    if not text:
        return '<td class="none">–</td>'
    known = value is not None and math.isfinite(value)
    return f'<td data-v="{float(value or 0)!r}">{escape(text)}</td>' if known else f"<td>{escape(text)}</td>"


def _words(text: str) -> str:
    return f'<td class="text" data-v="{escape(text)}">{escape(text)}</td>' if text else '<td class="text none">–</td>'


def _table(caption: str, head: str, body: str, rows: int, kind: str = "") -> str:
    tall = " tall" if rows > 12 else ""
    return (
        f'<div class="scroll{tall}{kind}" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _quoted(report: Report) -> str:
    if not report.quoted:
        return ""
    head = "".join(f'<th scope="col" class="text">{name}</th>' for name in ("Method", "Teacher", "Student"))
    head += '<th scope="col" data-sort="number" data-first="descending">Accuracy, % (quoted)</th>'
    described = any(q.setting for q in report.quoted)
    head += "".join(f'<th scope="col" class="text">{n}</th>' for n in (["Setting"] if described else []) + ["Source"])
    body = ""
    for q in report.quoted:
        source = escape(q.source)
        linked = f'<a href="{escape(q.link)}" rel="noreferrer">{source}</a>' if q.link else source
        names = _words(q.teacher) + _words(q.student)
        setting = _words(q.setting) if described else ""
        body += (
            f'<tr><th scope="row" data-v="{escape(q.method)}">{escape(q.method)}</th>{names}'
            f"{_cell(f'{100 * q.accuracy:.2f}', q.accuracy)}{setting}"
            f'<td class="text" data-v="{source}">{linked}</td></tr>'
        )
    remark = (
        '<p class="small">Others published these figures, with other code, data preparation and lengths of training. '
        "They are here for orientation; a difference from the measured ones above is not a result.</p>"
    )
    return _table("Figures quoted from papers", head, body, len(report.quoted), " quoted") + remark


def _skipped(skipped: dict[str, str]) -> str:
    if not skipped:
        return ""
    head = '<th scope="col">Method</th><th scope="col" class="text">Why not</th>'
    body = "".join(
        f'<tr><th scope="row" data-v="{escape(name)}">{escape(name)}</th>{_words(why)}</tr>'
        for name, why in skipped.items()
    )
    return _table("Methods that were not run, and why", head, body, len(skipped))


# one student and its teacher


def _answers(analysis: Analysis | None) -> str:
    if analysis is None:
        return ""
    return _cards([f for f in (page_figures.reliability(analysis), _confusion(analysis)) if f])


def _confusion(analysis: Analysis) -> str:
    if not analysis.confusion:
        return ""
    shown = analysis.most_confused(_CLASSES)
    known = max(len(analysis.classes), len({c for t, s, _ in analysis.confusion for c in (t, s)}))
    counts = {(t, s): n for t, s, n in analysis.confusion}
    agree = max((counts.get((c, c), 0) for c in shown), default=0) or 1
    differ = max((counts.get((t, s), 0) for t in shown for s in shown if t != s), default=0) or 1
    cells = []
    for t in shown:
        line = []
        for s in shown:
            n = counts.get((t, s), 0)
            strength = n / (agree if t == s else differ)
            line.append((f"{n:,}" if n else "", strength, t != s))
        cells.append(line)
    names = [_cut(analysis.name_of(c)) for c in shown]
    remark = f"{analysis.samples:,} samples; blue where both choose the same, orange where they differ."
    if known > len(shown):
        remark += f" Only the {len(shown)} classes on which they differ most are shown, of {known}."
    heat = _heat(("teacher ↓", "student →"), names, names, cells, "Choices of the student by choices of the teacher")
    return page_figures.figure("Student’s choice by teacher’s choice", remark, heat, [], wide=len(shown) > 10)


def _layers(analysis: Analysis | None) -> str:
    if analysis is None or not analysis.similarity:
        return ""
    cells = [[(f"{v:.2f}", v, False) for v in line] for line in analysis.similarity]
    # Addresses differ at their ends.
    mine, theirs = ([_cut(a, False) for a in side] for side in (analysis.student_stages, analysis.teacher_stages))
    caption = "Linear CKA of the student’s layers (rows) with the teacher’s (columns)"
    heat = _heat(("student ↓", "teacher →"), mine, theirs, cells, caption)
    remark = (
        f"Linear CKA of {analysis.similarity_samples:,} samples’ features, by address: at 1 they are the same but for "
        "a rotation and a scale."
    )
    return _cards([page_figures.figure("Similarity of layers", remark, heat, [])])


def _heat(
    corner: tuple[str, str],
    rows: Sequence[str],
    across: Sequence[str],
    cells: list[list[tuple[str, float, bool]]],
    caption: str,
) -> str:
    """A table whose cells are coloured by their strength, from 0 to 1; those that are ``off`` in another colour."""
    head = "".join(f'<th scope="col"><span>{escape(n)}</span></th>' for n in across)
    body = ""
    for name, line in zip(rows, cells, strict=True):
        body += f'<tr><th scope="row">{escape(name)}</th>'
        for text, strength, off in line:
            kind = ' class="off"' if off else ""
            body += f'<td{kind} style="--h:{_STRONGEST * strength:.0f}%">{escape(text)}</td>'
        body += "</tr>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="heat">'
        f"<caption>{escape(caption)}</caption><thead><tr><td>{'<br>'.join(corner)}</td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cut(name: str, at_end: bool = True, length: int = 22) -> str:
    if len(name) <= length:
        return name
    return f"{name[: length - 1]}…" if at_end else f"…{name[1 - length :]}"


def _gallery(report: Report) -> str:
    analysis = report.analysis
    examples, compared = report.examples, report.compared
    if not examples and analysis is not None and analysis.differing is not None:
        examples, compared = analysis.worst, (analysis.samples, analysis.differing)
    if not examples and not compared:
        return ""
    differ = [e for e in examples if e.teacher != e.student]
    samples, differing = compared or (len(examples), len(differ))
    count = f"{differing:,} of the {samples:,} samples looked at"
    if not differing:
        text = f"Teacher and student say the same of all {samples:,} samples looked at."
    elif differing > len(differ) or len(differ) > _GALLERY:
        text = f"They differ on {count}; the {min(len(differ), _GALLERY)} of which both are surest are shown."
        if examples is report.examples:
            text = f"They differ on {count}; {min(len(differ), _GALLERY)} are shown."
    else:
        text = f"They differ on {count}."
    items = "".join(_example(i, e) for i, e in enumerate(differ[:_GALLERY], start=1))
    return f"<p>{text}</p>" + (f'<ul class="gallery">{items}</ul>' if items else "")


def _example(number: int, e: Example) -> str:
    shown = ""
    if e.image is not None:
        data = base64.b64encode(pictures.png(_upscaled(e.image))).decode()
        alt = f"Sample {number}, labelled {e.label}" if e.label else f"Sample {number}"
        shown = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
    if e.text is not None:
        shown += f"<blockquote>{escape(e.text)}</blockquote>"
    said = f"<dt>Label</dt><dd>{escape(e.label)}</dd>" if e.label else ""
    said += "".join(
        f"<dt>{who}</dt><dd>{_verdict(what == e.label) if e.label else ''} {escape(what)}, {100 * sure:.0f}&nbsp;%</dd>"
        for who, what, sure in (
            ("Teacher", e.teacher, e.teacher_confidence),
            ("Student", e.student, e.student_confidence),
        )
    )
    words = "" if e.image is not None and e.text is None else ' class="words"'
    return f"<li{words}>{shown}<dl>{said}</dl></li>"


def _verdict(right: bool) -> str:
    word, sign = ("right", "✓") if right else ("wrong", "✗")
    return f'<span class="{word}" role="img" aria-label="{word}">{sign}</span>'


def _upscaled(image: np.ndarray) -> np.ndarray:
    """Whole-number enlargement, so that pixels stay crisp wherever the style is not applied."""
    factor = max(1, 112 // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


# how it came about


def _list(items: list[str]) -> str:
    return f'<ul class="list">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def _file(name: str, path: str) -> str:
    # Quoting the colon as well keeps the link a relative path, whatever the text is.
    return f'{escape(name)}: <a href="{escape(urllib.parse.quote(path))}">{escape(path)}</a>'


def _again(report: Report) -> str:
    found = ""
    if report.command:
        found += f'<pre class="code wrap"><code id="command">{escape(report.command)}</code></pre>'
        found += _copying("command", "Copy the command")
    if report.recipe:
        found += "<details><summary>The recipe</summary>" + (
            f'<pre class="code" tabindex="0"><code id="recipe">{escape(report.recipe)}</code></pre>'
            f"{_copying('recipe', 'Copy the recipe')}</details>"
        )
    return found


def _copying(name: str, title: str) -> str:
    # Hidden until the script shows it: without one it could do nothing.
    return (
        f'<div class="copying"><button type="button" class="copy" data-copy="{name}" hidden>{title}</button>'
        '<span role="status" class="small"></span></div>'
    )


def _facts(facts: dict[str, str]) -> str:
    if not facts:
        return ""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'
