"""A comparison as a report: its page, and the networks that it is about."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from tutelage.comparison.cells import Cell, CellResult, trained_paths
from tutelage.comparison.comparing import Compared, plain_comparison
from tutelage.comparison.lines import Line, caution, lines, teachers
from tutelage.comparison.plan import CONTROL, TEACHER, Comparison
from tutelage.deploy.measure import Measurement, measure_together
from tutelage.models import load_weights
from tutelage.plain_yaml import written_yaml
from tutelage.recipe import load, student_network
from tutelage.views import judging

if TYPE_CHECKING:
    from tutelage.deploy.report import Report


def measure_networks(
    comparison: Comparison,
    folder: Path,
    trust: Sequence[str] = (),
    *,
    threads: int | None = None,
    names: Collection[str] | None = None,
) -> dict[str, Measurement]:
    """What the plain networks of a comparison cost, measured together: each student and each teacher by name.

    Args:
        comparison: whose networks.
        folder: of its cells.
        trust: as for :func:`tutelage.recipe.load`.
        threads: of the processor for one operation.
        names: only of these.
    """
    networks: dict[str, nn.Module] = {}
    examples: dict[str, Any] = {}
    for cell in comparison.pairs():
        new = {cell.student, str(cell.teacher)} - networks.keys()
        if not (new if names is None else new & set(names)):
            continue
        keywords = load(trained_paths(cell.fields, folder), trust=trust).keywords
        with torch.random.fork_rng():
            batch = judging(keywords.get("views"))(next(iter(keywords["data"].train)))
        student = student_network(keywords)
        sides = (cell.student, student, batch.student), (cell.teacher, keywords["teacher"], batch.teacher)
        for name, network, inputs in sides:
            if name in new and (names is None or name in names) and isinstance(network, nn.Module):
                networks[name], examples[name] = network, inputs.args or inputs.kwargs
    if not networks:
        return {}
    first = next(iter(examples.values()))
    return dict(measure_together(networks, first, examples=examples, threads=threads))


def report(compared: Compared, *, trust: Sequence[str] = (), command: str = "") -> Report:
    """The page of a comparison. What one student says beside its teacher is shown for the method that validation
    chooses, if its weights are in the comparison's folder."""
    from tutelage.deploy import report as pages
    from tutelage.deploy.analysis import analyse

    found = lines(compared)
    cells = {c.key: c for c in compared.comparison.plan()[0]}
    done = [r for r in compared.results if r.state == "done" and r.method != TEACHER]
    name = _Names(compared)
    rows = []
    for teacher, accuracy in teachers(compared).items():
        if teacher in compared.measurements:
            first = next(r for r in done if r.teacher == teacher and r.teacher_metrics).teacher_metrics
            cost = compared.measurements[teacher]
            rows.append(pages.Row(teacher, "teacher", [accuracy], [], [first["nll"]], [first["ece"]], cost))
    for line in found:
        if line.accuracy and line.student in compared.measurements:
            rows.append(_row(line, compared.measurements[line.student], name))
    curves = []
    for r in done:
        points = [
            (float(n), h["metrics"]["accuracy"]) for n, h in enumerate(r.history, 1) if "accuracy" in h["metrics"]
        ]
        if points:
            curves.append(pages.Curve(name.in_group(r), points, r.student if name.students else ""))
    made = pages.Report(
        "Comparison",
        rows,
        curves,
        notes=[note for note in (_budget(compared), caution(found)) if note],
        environment=done[0].environment if done else {},
        recipe=written_yaml(plain_comparison(compared.comparison)),
        command=command,
        skipped={name(n): n.reason for n in found if n.reason},
        quoted=compared.comparison.quoted,
        target=compared.comparison.target,
    )
    best = made.best()
    winner = next((n for n in found if best is not None and name(n) == best.name), None)
    if winner is not None:
        place = winner.method, winner.student, winner.teacher
        result = next(r for r in done if (r.method, r.student, r.teacher) == place)
        made.history = result.history
        folder = compared.out / "cells" if compared.out else None
        if folder is not None and result.key in cells and _weights_there(cells[result.key], folder):
            student, teaching, data, views = trained_networks(cells[result.key], folder, trust)
            made.analysis = analyse(student, teaching, data, views=views)
    return made


def _weights_there(cell: Cell, folder: Path) -> bool:
    files = [trained_paths(cell.fields, folder).get("teacher_weights"), folder / cell.key / "student.safetensors"]
    return all(Path(file).is_file() for file in files if file is not None)


def trained_networks(
    cell: Cell, folder: Path, trust: Sequence[str] = ()
) -> tuple[nn.Module, nn.Module | None, Any, Any]:
    """The student of a cell that is done with its weights, its teacher, and the data and views to judge them with."""
    keywords = load(trained_paths(cell.fields, folder), trust=trust).keywords
    student, teacher = plain_network(student_network(keywords)), keywords.get("teacher")
    load_weights(student, folder / cell.key / "student.safetensors")
    if not isinstance(teacher, nn.Module):
        teacher = None
    elif keywords.get("teacher_weights"):
        load_weights(teacher, keywords["teacher_weights"])
    data = keywords["data"]
    return student, teacher, data.test if data.test is not None else data.validation, keywords.get("views")


def plain_network(network: nn.Module) -> nn.Module:
    """The network, in place, without parametrisations, as the weights of one that learnt with them are kept."""
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            for tensor in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, tensor)
    return network


def command_line(words: Sequence[str]) -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["tutelage", *words])


class _Names:
    """What lines are called on a page: by their method, and by student and teacher where there are several."""

    def __init__(self, compared: Compared):
        self.students = len(compared.comparison.students) > 1
        self.teachers = len(compared.comparison.teachers) > 1

    def __call__(self, line: Line) -> str:
        return f"{self.in_group(line)}, {line.student}" if self.students else self.in_group(line)

    def in_group(self, of: Line | CellResult) -> str:
        """The name among those of one student; the student alone is the same beside every teacher."""
        return f"{of.method} of {of.teacher}" if self.teachers and of.method != CONTROL else of.method


def _row(line: Line, cost: Measurement, name: _Names) -> Any:
    from tutelage.deploy.report import Row

    return Row(
        name(line),
        "control" if line.method == CONTROL else "student",
        line.accuracy,
        line.agreement,
        line.nll,
        line.ece,
        cost,
        validation=line.validation if len(line.validation) == len(line.accuracy) else [],
        last_accuracy=line.last,
        method=name.in_group(line),
        group=line.student,
        step_ms=1000 * line.time.seconds if line.time else None,
        step_ratio=line.time.ratio if line.time else None,
        training_memory_bytes=line.memory,
        seconds_to_target=line.seconds_to_target,
    )


def _budget(compared: Compared) -> str:
    training = compared.comparison.recipe.get("training") or {}
    said = ", ".join(f"{k} {v}" for k, v in training.items()) or "10 epochs"
    seeds = len(compared.comparison.seeds)
    own = [name for name, fields in compared.comparison.methods.items() if "training" in fields]
    but = f"; {', '.join(own)} had settings of {'their' if len(own) > 1 else 'its'} own" if own else ""
    return f"Every method had the same training ({said}) and {seeds} {'seed' if seeds == 1 else 'seeds'}{but}."
