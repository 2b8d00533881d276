"""The tables of docs/speed.md, from the files in benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MIB = 2**20


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns after the first are figures."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def machine(body: dict[str, Any]) -> str:
    here = body["environment"]
    return (
        f"{here['platform']}, {here['CPU count']} cores with {here['CPU capability']}, {here['threads']} thread(s), "
        f"Python {here['python']}, torch {here['torch']}"
    )


def ratio(form: dict[str, float] | None) -> str:
    return f"{form['ratio']:.3f} ({form['low']:.3f}–{form['high']:.3f})" if form else "–"


def step_time() -> str:
    """A step of each method ÷ the bare limit, on both pairs."""
    body = read("step_time")
    head = ["Method", "target", "tutelage", "by hand", "torchdistill", "memory above the limit, MiB"]
    parts = []
    for pair in dict.fromkeys(row["pair"] for row in body["rows"]):
        rows = [row for row in body["rows"] if row["pair"] == pair]
        lines = []
        for row in rows:
            forms = row["forms"]
            above = forms["tutelage"]["peak_above_limit"] / MIB
            target = f"≤ {row['target']:.2f}" if row["target"] else "–"
            slow = row["one_step_only"]
            cells = [
                f"{slow[form]:.1f}, one step" if form in slow else ratio(forms.get(form))
                for form in ("tutelage", "by hand", "torchdistill")
            ]
            lines.append([row["method"], target, *cells, f"{above:+.1f}"])
        limit = rows[0]["forms"]["limit"]
        missed = [r["method"] for r in rows if r["target"] and r["forms"]["tutelage"]["ratio"] > r["target"]]
        judged = sum(bool(row["target"]) for row in rows)
        verdict = f"Within its target: {judged - len(missed)} of {judged}"
        parts.append(
            f"### {pair}, batches of {body['batch'][pair]}\n\n{table(head, lines)}\n\n"
            f"{verdict}{'; not: ' + ', '.join(missed) if missed else ''}. The limit took {limit['seconds']:.3f} s and "
            f"held {limit['peak_bytes'] / MIB:.0f} MiB."
        )
    return "\n\n".join(parts) + f"\n\n{machine(body)}, torchdistill {body['torchdistill']}."


def growth() -> str:
    """Exponents of time and memory."""
    body = read("growth")
    rows = [
        [
            row["loss"],
            row["axis"],
            f"{row['sizes'][0]:,}–{row['sizes'][-1]:,}",
            str(row["largest_expected"]),
            f"{row['time_exponent']:.2f}",
            f"{row['memory_exponent']:.2f}",
        ]
        for row in body["rows"]
    ]
    return table(["Loss", "grows with", "sizes", "its mathematics", "time", "memory"], rows) + f"\n\n{machine(body)}."


def vocabulary() -> str:
    """Chunks beside all logits at once."""
    body = read("vocabulary")
    rows = []
    for row in body["rows"]:
        peaks = [row["forms"][form]["peak_bytes"] / 1e9 for form in ("in chunks", "direct")]
        rows.append(
            [
                row["divergence"],
                f"{row['vocabulary']:,}",
                f"{row['positions']:,}",
                f"{peaks[0]:.2f}",
                f"{peaks[1]:.2f}",
                f"{100 * row['peak_over_direct']:.0f} %",
                f"{row['time_over_direct']:.2f}×",
            ]
        )
    head = ["Divergence", "vocabulary", "positions", "in chunks, GB", "direct, GB", "peak", "time"]
    worst = max(body["distance_from_float64"].values())
    return (
        f"{table(head, rows)}\n\nMedians of {body['rounds']} rounds; states of "
        f"{body['states']['student']} (student) and "
        f"{body['states']['teacher']} (teacher). The largest relative distance of a value or gradient from float64 is "
        f"{worst:.0e}. {machine(body)}."
    )


def cache() -> str:
    """Epochs, sizes and accuracies with a cache."""
    body = read("cache")
    times = [
        [name, *(f"{line['over_alone'][form]:.2f}×" for form in ("live", "cached"))]
        for name, line in body["epochs"].items()
    ]
    sizes = [
        [
            logits,
            " ".join(str(v) for v in line["codec"].values() if v is not None),
            f"{100 * line['of_float32']:.1f} %",
            f"{line['nats']:.2g}",
        ]
        for logits, lines in body["codecs"].items()
        for line in lines
    ]
    found = body["accuracy"]
    accuracies = [
        [name, found["mean"][name], found["minus_live"].get(name, "")] for name in ("live", *found["minus_live"])
    ]
    return "\n\n".join(
        (
            table(["Epoch ÷ the student's alone", "live teacher", "cached"], times),
            table(["Logits", "codec", "of float32's size", "error, nats"], sizes),
            table(["Teacher", "student's accuracy, %", "minus live, points"], accuracies),
            f"Accuracy: {body['settings']['seeds']} seeds, {body['settings']['epochs']} epochs of the packaged images, "
            f"{body['settings']['views']} views of each. {machine(body)}.",
        )
    )


def teacher_speed() -> str:
    """Accelerated teachers beside the plain one."""
    body = read("teacher_speed")
    parts = []
    for teacher in body["teachers"]:
        rows = []
        for form in teacher["forms"]:
            if "left_out" in form:
                rows.append([form["form"], "could not be made", "", "", ""])
                continue
            time = form["time"]
            rows.append(
                [
                    form["form"],
                    f"{1 / time['value']:.2f}×",
                    f"{form['kl_nats']:.1e}",
                    f"{100 * form['agreement']:.1f} %",
                    f"{form['made_seconds']:.1f}",
                ]
            )
        head = ["Form", "faster", "KL, nats", "same class", "seconds to make"]
        title = f"### {teacher['teacher']}, {teacher['weights']} weights, batches of {teacher['batch_size']}"
        parts.append(f"{title}\n\n{table(head, rows)}")
    return "\n\n".join(parts) + f"\n\n{machine(body)}."


def start_up() -> str:
    """Seconds until something is there."""
    body = read("start_up")
    rows = [[f"`{r['line']}`", f"{r['seconds']:.2f}", f"{r['beyond_torch']:+.2f}"] for r in body["rows"]]
    return table(["", "seconds", "beyond torch's import"], rows) + f"\n\nMedians of {body['rounds']} rounds."


def long_run() -> str:
    """Whether a long run grows."""
    body = read("long_run")
    return (
        f"{body['steps']:,} steps of a small student with six losses, taps, a memory bank, a critic, views and "
        f"checkpoints. From step {body['from_step']:,} to {body['to_step']:,} the resident memory grew by "
        f"{body['rss_mb_growth']:.1f} MiB ({body['rss_bytes_per_step']:.0f} bytes a step), Python's by "
        f"{body['python_mb_growth']:.2f} MiB; live tensors by {body['tensors_growth']:.0f}, hooks by "
        f"{body['hooks_growth']:.0f}."
    )
