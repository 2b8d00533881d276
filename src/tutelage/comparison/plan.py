"""What a comparison is, and the cells that it comes to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tutelage.building import RecipeError
from tutelage.comparison.cells import TRAINED, Cell, CellResult
from tutelage.comparison.methods import known_method, method_fields
from tutelage.comparison.quoted import Quoted

CONTROL = "alone"
TEACHER = "teacher"
ALONE = {"losses": [{"class_path": "TaskLoss"}]}


@dataclass
class Comparison:
    """Methods × students × teachers × seeds on one setting.

    Args:
        recipe: the fields of a recipe that every cell shares.
        methods: name → fields laid over the recipe; ``{}`` for a method of the catalogue. The student alone is added.
        students, teachers: name → fields laid over it.
        seeds: of the recipe, one cell each.
        target: a validation accuracy, to see how long each method needs to reach it.
        quoted: figures of papers, to stand beside.
    """

    recipe: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    students: dict[str, dict[str, Any]]
    teachers: dict[str, dict[str, Any]]
    seeds: list[int]
    target: float | None = None
    quoted: list[Quoted] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.methods = {CONTROL: copy.deepcopy(ALONE), **self.methods}

    def plan(self) -> tuple[list[Cell], list[CellResult]]:
        """The cells, in an order in which what they need comes first, and what is skipped before it begins."""
        trained = [cell for _, _, _, cell in self._taught() if cell is not None]
        cells, skipped = [], []
        # Seed by seed, so that a comparison that is stopped early has something to say of every method.
        for seed in self.seeds:
            alone = set()
            for student, teacher, fields, names in self._pairs():
                for name, method in self.methods.items():
                    if name == CONTROL:
                        if student in alone:
                            continue  # it is the same beside every teacher
                        alone.add(student)
                    pair = {**fields, "seed": seed}
                    try:
                        patch = method or method_fields(known_method(name), pair)
                        cells.append(Cell(name, student, teacher, seed, _cell_fields(pair, patch, names)))
                    except RecipeError as error:
                        skipped.append(CellResult("", name, student, teacher, seed, "skipped", str(error)))
        return [*trained, *cells], skipped

    def pairs(self) -> list[Cell]:
        """The student alone beside each of its teachers, with the first seed: to load and measure the networks of."""
        return [
            Cell(CONTROL, student, teacher, self.seeds[0], _cell_fields({**f, "seed": self.seeds[0]}, ALONE, names))
            for student, teacher, f, names in self._pairs()
        ]

    def _pairs(self) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
        """Each student with each teacher: their names, their fields and their $names."""
        taught = list(self._taught())
        for student, own in self.students.items():
            for teacher, fields, names, _ in taught:
                pair, more = _laid_over(fields, own)
                yield student, teacher, pair, names | more

    def _taught(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], Cell | None]]:
        """Each teacher: its name, the recipe with its fields, its $names, and the cell that trains it, if one does."""
        for name, patch in self.teachers.items():
            fields, names = _laid_over(self.recipe, patch)
            training, cell = fields.pop("teacher_training", None), None
            if training is not None and fields.get("teacher_weights") is None:
                cell = _teacher_cell(name, fields, training)
                fields["teacher_weights"] = TRAINED + cell.key
                names = {"$teacher_training": training, **names}
            yield name, fields, names, cell


def _teacher_cell(name: str, fields: dict[str, Any], training: dict[str, Any]) -> Cell:
    # without the views, whose student may see less than the teacher; a recipe's own teacher_training has none either
    alone = {"data": fields.get("data"), "student": fields["teacher"], "training": training, "seed": 0}
    return Cell(TEACHER, name, None, 0, alone)


def _cell_fields(pair: dict[str, Any], method: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    own = {f"${part}": pair.get(part) for part in ("student", "teacher", "data")}
    fields, _ = _laid_over(pair, method)
    return {k: v for k, v in _filled(fields, own | names).items() if v is not None}


def _laid_over(base: dict[str, Any], patch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields over fields, settings of a training one by one; and the patch's $names."""
    fields = {**base, **{k: v for k, v in patch.items() if not k.startswith("$")}}
    if isinstance(base.get("training"), dict) and isinstance(patch.get("training"), dict):
        fields["training"] = {**base["training"], **patch["training"]}
    return copy.deepcopy(fields), {k: v for k, v in patch.items() if k.startswith("$")}


def _filled(value: Any, names: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {k: _filled(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, names) for v in value]
    if isinstance(value, str) and value.startswith("$"):
        if names.get(value) is None:
            raise RecipeError(f"it needs {value}, which neither the student's nor the teacher's fields give")
        return copy.deepcopy(names[value])
    return value
