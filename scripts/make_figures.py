"""Write the figures of benchmarks/results into README.md, docs/benchmarks.md and docs/speed.md:
``python scripts/make_figures.py``."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

from tutelage.comparison import mean_interval, paired_interval
from tutelage.comparison.comparing import Compared
from tutelage.comparison.lines import caution, lines, teachers, verdicts
from tutelage.comparison.tables import markdown
from tutelage.deploy.report import Report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

RECORD = """\
Every method on two CIFAR-10 pairs on equal terms (`benchmarks/record.yaml`): 5,000 training images, 6 epochs,
batches of 64, SGD with a one-cycle learning rate up to 0.05, crops and flips, bf16 autocast, three seeds; one
thread for each process. 1,000 other training images choose the weights, and the 10,000 test images are looked
at once in each cell. The teacher was trained by others on all 50,000 images. So short a training is far from
what these students can reach: it compares the methods where data and time are short, and says nothing of long
trainings. **Nothing was tuned for any method here**: weights and temperatures are the packaged recipes', which are
published ones where such could be found (each method's page says what could not be checked; of two that SemCKD's
authors give, the one that did better in one short trial on Fashion-MNIST), and the layers are chosen automatically.
First stages (hints, paraphrasers, boundaries, flows) are part of the six epochs. A method that does not help here may
do so with other weights or more time (`tutelage tune`).

*Gain* is paired by seed, in percentage points; ± is half of the 95 % Student-t interval. *÷ alone* is the time
of a training step divided by that of the student alone, timed in turn; *memory* is what the process held at
most beyond the imported libraries, with the data; *to target* is the training time until 40 % on validation:
steps times the time of a step. The assistant's own training (ResNet-20 for ResNet-8, ResNet-32 for ResNet-20)
is in neither. ECE is high where soft targets weigh most: after so few epochs these students are far less sure
than they are right.

Schemes without a teacher stand in the same table. Their budget is another: two peers (DeepMutualLearning, KDCL) or
three branches (ONE) learn in the six epochs, of which the first is judged; ClassWise sees a second batch in each step;
born_again trains three networks of six epochs each and teacher_free_self two, of which the last is judged. *Step* is
that of the last training.

The cells of this edition ran beside other work, so the time that a whole cell took (`cell_seconds`) is no
figure to compare; the steps were timed afterwards with nothing else running. To save time the teacher's outputs
for the test images were kept from one cell to the next in those of the first edition; they are the same in all. The
cells of teacher_assistant are the first edition's too: its recipe is spelled otherwise now, and the two cells that were
run again gave the same accuracies. The twenty best-known losses are here, and eight schemes; methods that need a
budget or networks of their own (ensembles, few bits, other modalities, no data) and the less known ones are not."""

MEMORY = """\
What a loss alone costs: forward and backward to the student's tensor, one thread, float32, for a batch of 256 maps of
512×7×7 (embeddings of 512, and for CRD 16,384 negatives from a bank of 50,000). *Peak* is what the process held beyond
inputs and libraries, as a multiple of the two inputs, in one process each; *time* is a multiple of ours, of {rounds}
rounds in turn (of RKD's angles on whole maps, one pass); other work ran beside it, so the milliseconds are no claim.
torchdistill's correlation congruence was seen to take 127 times its inputs in other runs, and as much as ours in some.
*Straightforward* is the formula as it stands, which gives our value on a small input. torchdistill {version} is beside
it where it has the method; its FSP and correlation congruence take norms where ours are squares, and its similarity
normalises by another norm. Forms whose largest tensor alone would take more than 3 GB were not run;
its size stands in their place. The rows of FSP and CRD are from before both took their gradient with their value."""


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


def record() -> str:
    """The run of record: a table for each pair, and what it says."""
    compared = Compared.from_json(RESULTS / "record.json")
    found, masters = lines(compared), teachers(compared)
    parts = []
    for student, teacher in dict.fromkeys((n.student, n.teacher) for n in found):
        rows = [n for n in found if (n.student, n.teacher) == (student, teacher)]
        cost = compared.measurements.get(student)
        size = f", {cost.parameters:,} parameters" if cost and cost.parameters else ""
        parts.append(f"### {teacher} ({masters[teacher or '']:.1%}) teaches {student}{size}\n\n{markdown(rows)}")
        for word in ("better", "worse", "not distinguishable"):
            parts.append(f"- {word}: {', '.join(n.method for n in rows if n.verdict == word) or 'none'}")
    parts.append("\n".join(f"- {sentence}" for sentence in (*verdicts(found), caution(found)) if sentence))
    return "\n\n".join(parts)


def memory() -> str:
    """What the relation losses hold and take, beside the formula as it stands and torchdistill."""
    body: dict[str, Any] = json.loads((RESULTS / "loss_memory.json").read_text())
    lines = [
        "| Loss | inputs, MB | ours: peak | ours: ms | straightforward: peak | time | torchdistill: peak | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in body["methods"]:
        ours = row["forms"]["tutelage"]
        cells = [row["method"], f"{row['inputs_bytes'] / 1e6:.1f}"]
        cells += [f"{ours['peak_over_inputs']:.2f}×", f"{1000 * ours['seconds']:.0f}"]
        for form in ("straightforward", "torchdistill"):
            found = row["forms"].get(form)
            bytes_needed = row["not_run"].get(form)
            missing = f"a tensor of {bytes_needed / 1e9:.1f} GB" if bytes_needed else "–"
            cells += (
                [f"{found['peak_over_inputs']:.2f}×", f"{found['time_over_ours']:.2f}×"] if found else [missing, ""]
            )
        lines.append(f"| {' | '.join(cells)} |")
    text = MEMORY.format(rounds=body["rounds"], version=body["environment"]["torchdistill"])
    return text + "\n\n" + "\n".join(lines)


def pages() -> dict[Path, str]:
    """Every page with its figures in place."""
    both = (
        f"## The run of record\n\n{RECORD}\n\n{record()}\n\n## The demo\n\n`make demo`:\n\n{demo()}\n\n"
        f"## Memory and time of the losses\n\n`benchmarks/loss_memory.py`:\n\n{memory()}\n\n"
        f"## Longer training\n\nA pretrained CIFAR-10 ResNet-56 (`benchmarks/cifar10_resnet.py`):\n\n{cifar10()}"
    )
    found = {}
    for page, figures in ((ROOT / "README.md", demo()), (ROOT / "docs" / "benchmarks.md", both)):
        text = page.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        found[page] = f"{head}{BEGIN}\n{figures}\n{END}{tail}"
    speed = ROOT / "docs" / "speed.md"
    tables = runpy.run_path(str(Path(__file__).with_name("speed_figures.py")))

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{tables[match[2]]()}\n\n{END}"

    # each part of that page names the file that it shows
    part = rf"(<!-- figures: (?!end)(\w+) -->).*?{re.escape(END)}"
    found[speed] = re.sub(part, filled, speed.read_text(encoding="utf-8"), flags=re.DOTALL)
    return found


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
