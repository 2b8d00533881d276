"""The report as one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
import statistics
import urllib.parse
from html import escape

import numpy as np

from tutelage.comparison.intervals import mean_interval
from tutelage.deploy import pictures
from tutelage.deploy.report import Curve, Example, Report, Row, short

_GALLERY = 24

_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1d2126;--soft:#5a626c;--rule:#dfdcd4;
--faint:#efede7;--teacher:#3b5b8c;--student:#b4491a;--control:#6c6a66;--good:#1f6b45;--bad:#a12a2a;
--s0:var(--student);--s1:var(--teacher);--s2:#2f7d6d;--s3:#8a5a9e;--s4:#8a6d12;--s5:var(--control)}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--card:#1c2025;--ink:#e7e5df;--soft:#a3a9b1;--rule:#343a41;
--faint:#262b31;--teacher:#8fb2e6;--student:#f0915f;--control:#b3b0a9;--good:#7fcfa4;--bad:#f19a92;
--s2:#74cbb8;--s3:#cda3e0;--s4:#dcbf62}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:70rem;margin:0 auto;padding:3rem 1.5rem 4rem}
h1{font-size:1rem;font-weight:600;color:var(--soft);margin:0 0 .75rem}
.headline{font:400 clamp(1.3rem,1rem + 1.5vw,1.85rem)/1.4 Georgia,"Iowan Old Style","Times New Roman",serif;
margin:0 0 2rem;max-width:46rem;text-wrap:pretty}
h2{font-size:1.15rem;font-weight:600;line-height:1.3;margin:3rem 0 .9rem}
h3{font-size:1rem;font-weight:600;margin:0 0 .15rem}
p{max-width:46rem}
.small{font-size:.875rem;color:var(--soft);margin:.6rem 0 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));margin:0;
border:1px solid var(--rule);border-radius:6px;background:var(--rule);gap:1px;overflow:hidden}
.tiles div{background:var(--card);padding:1rem 1.1rem}
.tiles dt{font-size:.875rem;color:var(--soft)}
.tiles dd{margin:0}
.tiles .big{font-size:1.75rem;line-height:1.3;font-weight:600;font-variant-numeric:tabular-nums;display:flex;
flex-wrap:wrap;align-items:baseline;column-gap:.4rem}
.tiles .big small{font-size:1rem;font-weight:400;color:var(--soft)}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:6px;background:var(--card)}
.scroll:focus-visible{outline:2px solid var(--teacher);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:.6rem .55rem;text-align:right;vertical-align:top;border-top:1px solid var(--rule);white-space:nowrap}
thead th{border-top:0;font-weight:500;color:var(--soft);white-space:normal;vertical-align:bottom;line-height:1.3;
min-width:4.2rem}
th:first-child{padding-left:.9rem;text-align:left;position:sticky;left:0;background:var(--card);z-index:1}
tbody th{font-weight:600;white-space:normal;min-width:8.5rem;max-width:15rem;overflow-wrap:anywhere}
tbody tr.student th,tbody tr.student td{background:var(--faint)}
.kind{display:flex;align-items:center;gap:.4rem;font-weight:400;font-size:.8125rem;color:var(--soft);
white-space:nowrap}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1.25rem}
figure{margin:0}
.picture{background:var(--card);border:1px solid var(--rule);border-radius:6px;padding:1rem 1.1rem}
.picture figcaption p{margin:0 0 .6rem}
.plot{display:block;width:100%;height:auto}
.plot text{font-size:14px;font-variant-numeric:tabular-nums;paint-order:stroke;stroke:var(--card);stroke-width:4px;
stroke-linejoin:round}
.point.teacher{color:var(--teacher)}.point.student{color:var(--student)}.point.control{color:var(--control);font-size:1.15em}
.keys{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.5rem 0 0;padding:0;list-style:none;font-size:.875rem}
.keys li{display:flex;align-items:center;gap:.45rem}
.key{flex:none}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(13.5rem,1fr));gap:1rem;padding:0;margin:0;
list-style:none}
.gallery li{background:var(--card);border:1px solid var(--rule);border-radius:6px;padding:.9rem;min-width:0}
.gallery img{display:block;width:7rem;height:7rem;object-fit:contain;image-rendering:pixelated;margin:0 auto .7rem}
.gallery blockquote{margin:0 0 .7rem;font-family:Georgia,"Times New Roman",serif;overflow-wrap:anywhere}
.gallery dl{display:grid;grid-template-columns:auto 1fr;gap:.15rem .8rem;margin:0;font-size:.875rem}
.gallery dt{color:var(--soft)}
.gallery dd{margin:0;overflow-wrap:anywhere}
.right{color:var(--good)}.wrong{color:var(--bad)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));gap:0 2rem;margin:0;font-size:.875rem}
.facts div{display:flex;justify-content:space-between;gap:1rem;border-bottom:1px solid var(--rule);padding:.3rem 0}
.facts dt{color:var(--soft)}
.facts dd{margin:0;text-align:right;overflow-wrap:anywhere}
.list{padding-left:1.2rem;margin:0;max-width:46rem}
.list li{margin:.25rem 0;overflow-wrap:anywhere}
a{color:var(--teacher)}
@media(max-width:600px){main{padding:1.75rem 1rem 3rem}.plot text{font-size:17px}
.picture{padding:.9rem .6rem .9rem}.tiles{grid-template-columns:1fr 1fr}.tiles div{padding:.8rem .9rem}
.tiles .big{font-size:1.35rem}.tiles .big small{font-size:.875rem}
.gallery{grid-template-columns:1fr}
.gallery li{display:grid;grid-template-columns:auto 1fr;gap:0 1rem;align-items:center}
.gallery li.words{display:block}.gallery img{width:5rem;height:5rem;margin:0}}
@media print{body{background:none}main{max-width:none;padding:0}.picture,.gallery li,tr{break-inside:avoid}}
"""


def page(report: Report) -> str:
    """The whole page of a report; every text in it is escaped."""
    sections = [
        _tiles(report),
        _table(report),
        _pictures(report),
        _gallery(report.examples, report.compared),
        _list("Notes", [escape(note) for note in report.notes]),
        _list("Files", [_file(name, path) for name, path in report.files.items()]),
        _facts(report.environment),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';style-src 'unsafe-inline';img-src data:">
<title>{escape(report.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(report.title)}</h1>
<p class="headline">{escape(report.headline())}</p>
{"".join(sections)}</main>
</body>
</html>
"""


def _tiles(report: Report) -> str:
    tiles = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="big">{escape(big)}<small> {escape(unit)}</small></dd>'
        f'<dd class="small">{escape(detail)}</dd></div>'
        for name, big, unit, detail in report.key_figures()
    )
    return f'<dl class="tiles">{tiles}</dl>\n' if tiles else ""


def _table(report: Report) -> str:
    if not report.rows:
        return ""
    columns = report.columns()
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in columns)
    body = ""
    for i, row in enumerate(report.rows):
        cells = "".join(f"<td>{escape(cells[i]) or '–'}</td>" for _, cells in columns)
        kind = report.kind_of(row)
        body += (
            f'<tr class="{escape(row.kind)}"><th scope="row">{escape(row.name)}'
            f'<span class="kind">{_kind_key(row.kind)}{escape(kind)}</span></th>{cells}</tr>'
        )
    return (
        '<section aria-labelledby="models"><h2 id="models">Models</h2>'
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="models"><table>'
        f"<caption>Accuracy and cost of each model</caption><thead><tr><th scope='col'>Model</th>{head}</tr></thead>"
        f'<tbody>{body}</tbody></table></div><p class="small">{escape(report.reading())}</p></section>\n'
    )


def _pictures(report: Report) -> str:
    figures = [f for f in (_sizes(report.rows), _curves(report.curves, report.rows)) if f]
    if not figures:
        return ""
    return (
        '<section aria-labelledby="pictures"><h2 id="pictures">Accuracy, size and training</h2>'
        f'<div class="pictures">{"".join(figures)}</div></section>\n'
    )


def _figure(title: str, remark: str, picture: str, keys: list[tuple[str, str]]) -> str:
    items = "".join(f"<li>{key}{escape(label)}</li>" for key, label in keys)
    return (
        f'<figure class="picture"><figcaption><h3>{escape(title)}</h3>'
        f'<p class="small">{escape(remark)}</p></figcaption>{picture}<ul class="keys">{items}</ul></figure>'
    )


def _sizes(rows: list[Row]) -> str:
    if not rows:
        return ""
    # Bytes tell an int8 file from its float original; parameters do not.
    parameters = [r.measurement.parameters for r in rows]
    by_bytes = not all(parameters) or len({r.measurement.precision for r in rows}) > 1
    points = []
    for r in rows:
        interval = mean_interval([100 * a for a in r.accuracy])
        x = r.measurement.size_bytes if by_bytes else r.measurement.parameters
        points.append(pictures.Point(r.name, r.kind, float(x or 1), interval.mean, interval.half_width))
    name = "bytes" if by_bytes else "parameters"
    told = "; ".join(f"{p.label} ({p.kind}): {short(p.x)} {name}, {p.y:.1f} %" for p in points)
    seeds = any(math.isfinite(p.half_width) for p in points)
    picture = pictures.point_picture("sizes", points, f"{name} (logarithmic)", "Accuracy by size", f"{told}.")
    remark = "Up is better, left is smaller; models of one size stand side by side."
    if seeds:
        remark += " Bars are 95 % intervals over seeds."
    kinds = [k for k in ("teacher", "student", "control") if any(p.kind == k for p in points)]
    return _figure("Accuracy by size", remark, picture, [(_kind_key(k), k) for k in kinds])


def _curves(curves: list[Curve], rows: list[Row]) -> str:
    curves = [c for c in curves if c.points]
    if not curves:
        return ""
    shares = all(0.0 <= y <= 1.0 for c in curves for _, y in c.points)
    factor = 100.0 if shares else 1.0
    groups: dict[str, dict[float, list[float]]] = {}
    seeds: dict[str, int] = {}
    for c in curves:
        seeds[c.label] = seeds.get(c.label, 0) + 1
        group = groups.setdefault(c.label, {})
        for x, y in c.points:
            if math.isfinite(y):
                group.setdefault(x, []).append(factor * y)
    series = [
        pictures.Series(
            label,
            sorted(group),
            [statistics.fmean(group[x]) for x in sorted(group)],
            [min(group[x]) for x in sorted(group)],
            [max(group[x]) for x in sorted(group)],
        )
        for label, group in groups.items()
        if group
    ]
    series = [dataclasses.replace(s, style=i) for s, i in zip(series, _styles(series, rows), strict=True)]
    if not series:
        return ""
    title = "Accuracy by epoch" if shares else "Learning curves"
    told = "; ".join(f"{s.label}: from {s.mean[0]:.1f} to {s.mean[-1]:.1f}" for s in series)
    picture = pictures.line_picture("curves", series, "accuracy, %" if shares else "value", title, f"{told}.")
    banded = any(n > 1 for n in seeds.values())
    remark = "Lines are means, bands reach from the lowest to the highest seed." if banded else "One seed each."
    return _figure(title, remark, picture, [(_line_key(s.style), s.label) for s in series])


def _kind_key(kind: str) -> str:
    """The marker of a kind of model, as in the picture."""
    sign = {"teacher": "■", "student": "●", "control": "◆"}[kind]
    return f'<span class="point {kind}" aria-hidden="true">{sign}</span>'


def _line_key(style: int) -> str:
    """A sample of a line, as in the picture."""
    colour, dashes = pictures.style_of(style)
    return (
        '<svg class="key" viewBox="0 0 36 12" width="36" height="12" aria-hidden="true"><path d="M1 6H35" '
        f'style="stroke:var(--{colour});stroke-width:2.2;stroke-dasharray:{",".join(map(str, dashes)) or "none"}"/>'
        "</svg>"
    )


def _styles(series: list[pictures.Series], rows: list[Row]) -> list[int]:
    """A style for each line: its model's colour where a row has its name and it is the first of its kind."""
    kinds = {r.name: {"student": 0, "teacher": 1, "control": 5}[r.kind] for r in rows}
    chosen: list[int | None] = []
    for s in series:
        wanted = kinds.get(s.label)
        chosen.append(wanted if wanted not in chosen else None)
    others = (i for i in itertools.chain((0, 2, 3, 4, 1, 5), itertools.count(6)) if i not in chosen)
    return [next(others) if c is None else c for c in chosen]


def _gallery(examples: list[Example], compared: tuple[int, int] | None) -> str:
    if not examples:
        return ""
    differ = [e for e in examples if e.teacher != e.student]
    samples, differing = compared or (len(examples), len(differ))
    count = f"{differing:,} of the {samples:,} samples looked at"
    if not differ:
        text = f"Teacher and student say the same of all {samples:,} samples looked at."
    elif differing > len(differ) or len(differ) > _GALLERY:
        text = f"They differ on {count}; {min(len(differ), _GALLERY)} are shown."
    else:
        text = f"They differ on {count}."
    items = "".join(_example(i, e) for i, e in enumerate(differ[:_GALLERY], start=1))
    return (
        '<section aria-labelledby="differ"><h2 id="differ">Where teacher and student differ</h2>'
        f"<p>{text}</p>" + (f'<ul class="gallery">{items}</ul>' if items else "") + "</section>\n"
    )


def _example(number: int, e: Example) -> str:
    shown = ""
    if e.image is not None:
        data = base64.b64encode(pictures.png(_upscaled(e.image))).decode()
        alt = f"Sample {number}, labelled {e.label}"
        shown = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
    if e.text is not None:
        shown += f"<blockquote>{escape(e.text)}</blockquote>"
    said = "".join(
        f"<dt>{who}</dt><dd>{_verdict(what == e.label)} {escape(what)}, {100 * sure:.0f}&nbsp;%</dd>"
        for who, what, sure in (
            ("Teacher", e.teacher, e.teacher_confidence),
            ("Student", e.student, e.student_confidence),
        )
    )
    words = "" if e.text is None else ' class="words"'
    return f"<li{words}>{shown}<dl><dt>Label</dt><dd>{escape(e.label)}</dd>{said}</dl></li>"


def _verdict(right: bool) -> str:
    word, sign = ("right", "✓") if right else ("wrong", "✗")
    return f'<span class="{word}" role="img" aria-label="{word}">{sign}</span>'


def _upscaled(image: np.ndarray) -> np.ndarray:
    """Whole-number enlargement, so that pixels stay crisp wherever the style is not applied."""
    factor = max(1, 112 // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _list(title: str, items: list[str]) -> str:
    if not items:
        return ""
    name = title.lower()
    body = "".join(f"<li>{item}</li>" for item in items)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2><ul class="list">{body}</ul></section>\n'


def _file(name: str, path: str) -> str:
    # Quoting the colon as well keeps the link a relative path, whatever the text is.
    return f'{escape(name)}: <a href="{escape(urllib.parse.quote(path))}">{escape(path)}</a>'


def _facts(facts: dict[str, str]) -> str:
    if not facts:
        return ""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return (
        '<section aria-labelledby="environment"><h2 id="environment">Environment</h2>'
        f'<dl class="facts">{items}</dl></section>\n'
    )
