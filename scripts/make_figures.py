"""Write the figures of benchmarks/results into README.md and docs/benchmarks.md: ``python scripts/make_figures.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tutelage.comparison import mean_interval, paired_interval
from tutelage.deploy.report import Report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def percent(values: list[float]) -> str:
    return str(mean_interval([100 * value for value in values]))


def gain(taught: list[float], alone: list[float]) -> str:
    return f"{paired_interval([100 * v for v in taught], [100 * v for v in alone]):+}"


def demo() -> str:
    """The demo's table: teacher, student, control."""
    report = Report.from_json(RESULTS / "demo.json")
    teacher, student, control = report.rows
    lines = [
        "| | teacher | student | the same student without a teacher |",
        "|---|---|---|---|",
        f"| accuracy, % | {percent(teacher.accuracy)} | {percent(student.accuracy)} | {percent(control.accuracy)} |",
        f"| agrees with the teacher, % | | {percent(student.agreement)} | |",
        f"| parameters | {' | '.join(f'{row.measurement.parameters:,}' for row in report.rows)} |",
        f"| file, kB | {' | '.join(f'{row.measurement.size_bytes / 1000:.1f}' for row in report.rows)} |",
        f"| MACs, million | {' | '.join(f'{row.measurement.macs / 1e6:.2f}' for row in report.rows)} |",
    ]
    return "\n".join(lines) + (
        f"\n\nGain {gain(student.accuracy, control.accuracy)} percentage points, paired over {len(student.accuracy)} "
        "seeds. "
        "The teacher had 5,000 labelled images of the packaged Fashion-MNIST subset, the student 5,000 others of which "
        "200 have labels, the control these 200."
    )


def cifar10() -> str:
    """The pretrained ResNet-56 and its two students."""
    body: dict[str, Any] = json.loads((RESULTS / "cifar10_resnet.json").read_text())
    lines = [
        "| student | parameters | with teacher: best, last | alone: best, last | gain (best) | agreement |",
        "|---|---|---|---|---|---|",
    ]
    for row in body["rows"]:
        a, agreement = row["accuracy"], row["agreement"]
        lines.append(
            f"| {row['student']} | {row['parameters']:,} | {percent(a['taught'])}, {percent(a['taught last'])} "
            f"| {percent(a['alone'])}, {percent(a['alone last'])} | {gain(a['taught'], a['alone'])} "
            f"| {percent(agreement['taught'])} (alone {percent(agreement['alone'])}) |"
        )
    settings = body["settings"]
    return "\n".join(lines) + (
        f"\n\nTest accuracy in %, {settings['seeds']} seeds, {settings['epochs']} epochs on 10,000 training images, "
        f"{settings['precision']} autocast; the teacher, trained by others on all 50,000, has "
        f"{100 * body['rows'][0]['teacher_accuracy']:.1f}. Agreement is with the teacher. So short a training is far "
        "from what these students can reach; it compares them on equal terms."
    )


def pages() -> dict[Path, str]:
    """Every page with its figures in place."""
    both = (
        f"`make demo`:\n\n{demo()}\n\nA pretrained CIFAR-10 ResNet-56 (`benchmarks/cifar10_resnet.py`):\n\n{cifar10()}"
    )
    found = {}
    for page, figures in ((ROOT / "README.md", demo()), (ROOT / "docs" / "benchmarks.md", both)):
        text = page.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        found[page] = f"{head}{BEGIN}\n{figures}\n{END}{tail}"
    return found


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
