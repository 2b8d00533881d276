"""What a comparison is: a recipe, and what is laid over it for each student, teacher and method.

.. code-block:: yaml

    recipe: kd                       # a recipe's file, a packaged one, or the fields themselves
    seeds: 3                         # or a list of them
    students:
      small: {student: {class_path: SmallCNN, init_args: {width: 4}}}
      wide: {student: {class_path: SmallCNN, init_args: {width: 12}}, $assistant: {class_path: SmallCNN}}
    teachers:
      big: {teacher: {class_path: SmallCNN, init_args: {width: 32}}}
    methods:
      KD: {}                         # by its name in the catalogue, or its recipe's
      two hints: {losses: [{class_path: TaskLoss}, {class_path: FitNets, init_args: {taps: [stage1, stage2]}}]}
      mutual: {student: {class_path: Cohort, init_args: {peers: [$student, $student]}}, teacher: ...}

``$student`` and ``$teacher`` stand for the pair's own, ``$teacher_training`` for how the teacher is trained, if it is;
other ``$names`` for what the fields of the student or the teacher say. The student alone is in every comparison.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.architecture.builders import StudentBuilder
from tutelage.building import Builder, RecipeError
from tutelage.catalogue import methods as catalogued
from tutelage.comparison.cells import TRAINED, Cell, CellResult
from tutelage.comparison.quoted import Quoted, read_quoted
from tutelage.errors import nearest
from tutelage.recipe import COMPARED, change_field, distil_recipe, packaged_names, read

CONTROL = "alone"
TEACHER = "teacher"
ALONE = {"losses": [{"class_path": "TaskLoss"}]}
_DEFAULT = {  # of a recipe that names no losses
    "losses": [
        {"class_path": "TaskLoss", "init_args": {"weight": 0.1}},
        {"class_path": "KD", "init_args": {"weight": 0.9}},
    ]
}
# What of a recipe is the method; everything else is the setting that all methods share.
METHOD_FIELDS = ("losses", "stages", "source", "procedure")
# What a comparison does itself.
_OURS = ("out", "resume", "overwrite", "control", "seed", "after_epoch")
_NOT_SHARED = (*METHOD_FIELDS, *_OURS, COMPARED)
_FIELDS = ("recipe", "seeds", "students", "teachers", "methods", "target", "quoted")


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
                        patch = method or method_fields(_known_method(name), pair)
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


def read_comparison(
    text: str | Path | dict[str, Any],
    *,
    methods: Iterable[str] = (),
    seeds: int | list[int] | None = None,
    changes: Iterable[str] = (),
) -> Comparison:
    """Read a comparison file, or make a comparison of a recipe.

    Args:
        text: a comparison's file or fields; a recipe's file, packaged name or fields.
        methods: names of the catalogue or of recipes, beside those of the file; by default, where the file names none,
            every method of the catalogue that is a loss, and before them what somebody's own recipe does.
        seeds: how many, from 0 up, or which; 3 by default.
        changes: ``["training.epochs=3"]``, applied over the shared recipe, or over a field of the comparison, such as
            ``"methods.KD.losses.1.init_args.temperature=2"``.

    Raises:
        RecipeError: anything wrong in it.

    >>> comparison = read_comparison("kd", methods=["KD", "rkd"], seeds=2)
    >>> list(comparison.methods), comparison.seeds, list(comparison.students)
    (['alone', 'KD', 'RKD'], [0, 1], ['SmallCNN(width=8)'])
    """
    fields = copy.deepcopy(text) if isinstance(text, dict) else read(text)
    mine = "recipe" not in fields and isinstance(text, str | Path) and Path(text).is_file()
    if "recipe" not in fields:
        fields = {"recipe": fields}
    for name in fields:
        if name not in _FIELDS:
            raise RecipeError(f"{name}: no such field of a comparison{nearest(str(name), _FIELDS)}")
    whole, parts, inside = _parted(changes)
    for change in whole:
        change_field(fields, change)
    base = fields["recipe"]
    if not isinstance(base, dict):
        beside = Path(text).parent / str(base) if isinstance(text, str | Path) else Path(str(base))
        base = read(beside if beside.is_file() else str(base))
    for change in inside:
        change_field(base, change)
    if "student" in (base.get(COMPARED) or ()):
        raise RecipeError("recipe: its method makes the student; take a recipe with a plain one, and name the method")
    shared = {k: v for k, v in base.items() if k not in _NOT_SHARED}
    for name in ("student", "teacher", "data"):
        if shared.get(name) is None and not fields.get(f"{name}s"):
            raise RecipeError(f"recipe: a comparison needs the field {name!r}")
    named = _named(fields.get("methods"), "methods")
    for name in methods:
        named.setdefault(_known_method(name), {})
    if not named:
        named = {m.name: {} for m in catalogued() if m.role == "losses"}
        if mine:  # somebody's own recipe, which is what is to be judged
            own = {k: base[k] for k in METHOD_FIELDS if base.get(k) is not None}
            named = {"the recipe": own or copy.deepcopy(_DEFAULT), **named}
    fields["methods"] = named
    for change in parts:
        _change_part(fields, change, shared)
    for name, patch in named.items():
        if name in (CONTROL, TEACHER):
            raise RecipeError(f"methods.{name}: this name is the {'student alone' if name == CONTROL else name}'s own")
        if not patch:
            _known_method(name)
    students = _models(fields.get("students"), "student", shared)
    teachers = _models(fields.get("teachers"), "teacher", shared)
    _check_fields(shared, "recipe")
    for where, patches in (("methods", named), ("students", students), ("teachers", teachers)):
        for name, patch in patches.items():
            _check_fields(patch, f"{where}.{name}")
    for name, own in students.items():
        if len(teachers) > 1 and _derived(own.get("student", shared.get("student"))):
            raise RecipeError(
                f"students.{name}: it is derived from the teacher, so of {len(teachers)} teachers it is as many "
                "students; make a comparison for each"
            )
    for name in students.keys() & teachers.keys():
        if students[name].get("student", shared.get("student")) != teachers[name].get("teacher", shared.get("teacher")):
            raise RecipeError(f"teachers.{name}: a student that is another network has this name; choose another")
    return Comparison(
        recipe=shared,
        methods=named,
        students=students,
        teachers=teachers,
        seeds=_seeds(fields.get("seeds", 3) if seeds is None else seeds),
        target=_target(fields.get("target")),
        quoted=read_quoted(fields.get("quoted")),
    )


def _parted(changes: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Changes of a whole field of the comparison, of a part of one, and of the shared recipe: all that name none."""
    whole, parts, inside = [], [], []
    for change in changes:
        name = change.partition("=")[0]
        first = name.partition(".")[0]
        if first not in _FIELDS:
            inside.append(change)
        elif first == name:
            whole.append(change)
        elif first == "recipe":
            inside.append(change.removeprefix("recipe."))
        else:
            parts.append(change)
    return whole, parts, inside


def _change_part(fields: dict[str, Any], change: str, shared: dict[str, Any]) -> None:
    """Apply ``methods.KD.losses.1.init_args.weight=2``; a method without fields of its own gets those it stands for."""
    name = change.partition("=")[0]
    first, _, rest = name.partition(".")
    entry, _, inner = rest.partition(".")
    if first in ("methods", "students", "teachers") and inner:
        entries = fields.get(first) or {}
        known = next((n for n in entries if n == entry), None)
        if first == "methods" and known is None:
            known = next((n for n in entries if _plain(n) == _plain(entry)), None)
        if known is None:
            raise RecipeError(f"--set {name}: there is no {entry!r} among the {first}{nearest(entry, entries)}")
        if first == "methods" and not entries[known]:
            entries[known] = method_fields(_known_method(known), shared)
        change = f"{first}.{known}.{change.removeprefix(f'{first}.{entry}.')}"
    change_field(fields, change)


def _check_fields(patch: dict[str, Any], where: str) -> None:
    known = [n for n in inspect.signature(distil_recipe).parameters if n not in _OURS]
    for name in patch:
        if name in _OURS:
            raise RecipeError(f"{where}.{name}: a comparison sets it itself")
        if name not in known and not str(name).startswith("$"):
            raise RecipeError(f"{where}.{name}: no such field of a recipe{nearest(str(name), known)}")


def method_fields(name: str, shared: dict[str, Any] | None = None) -> dict[str, Any]:
    """What makes a method on any pair: the losses of its packaged recipe without that recipe's addresses.

    Each loss then reads the best-matching stages. A recipe whose method needs more than losses says what in its field
    ``in_comparison``. Stages are scaled to the epochs and the learning rate of the ``shared`` recipe, so that together
    they are as long as every other method's training.

    Raises:
        RecipeError: no such method, one that needs fields of its own, or one with more stages than there are epochs.

    >>> method_fields("AttentionTransfer")["losses"][1]
    {'class_path': 'AttentionTransfer'}
    """
    method = next((m for m in catalogued() if m.name == name), None)
    recipe = read(method.recipe if method else name)
    if COMPARED in recipe:
        return recipe[COMPARED]
    unusual = [f for f in ("source", "procedure", "views") if recipe.get(f) is not None]
    if unusual or (method is not None and method.role not in ("losses", "schedule")):
        what = " and ".join(unusual) or (method.role if method else "")
        raise RecipeError(f"{name}: it changes the {what}; give the fields that make it on your pair under methods")
    found = {k: copy.deepcopy(recipe[k]) for k in METHOD_FIELDS if recipe.get(k) is not None}
    for loss in (*found.get("losses", ()), *(loss for s in found.get("stages", ()) for loss in s["losses"])):
        _without_taps(loss)
    stages = found.get("stages", [])
    epochs = _epochs(shared or {})
    if stages and epochs:
        if epochs < len(stages):
            raise RecipeError(f"{name}: it has {len(stages)} stages, and training.epochs={epochs}")
        for stage, part in zip(stages, _shares([stage["epochs"] for stage in stages], epochs), strict=True):
            stage["epochs"] = part
    base, own = (shared or {}).get("training") or {}, recipe.get("training") or {}
    for stage in stages:
        if "lr" in stage:  # as a part of the whole run's
            stage["lr"] = stage["lr"] * base.get("lr", 0.05) / own.get("lr", 0.05)
    return found


def _shares(parts: list[int], whole: int) -> list[int]:
    """Whole numbers of that sum in about these proportions, none of them 0; of equal remainders the first is raised.

    >>> _shares([2, 6], 6), _shares([2, 6], 2), _shares([1, 98, 1], 10)
    ([2, 4], [1, 1], [1, 8, 1])
    """
    exact = [part * whole / sum(parts) for part in parts]
    found = [max(1, int(e)) for e in exact]
    while (lack := whole - sum(found)) != 0:
        away = [e - f for e, f in zip(exact, found, strict=True)]
        place = away.index(max(away)) if lack > 0 else min((a, n) for n, a in enumerate(away) if found[n] > 1)[1]
        found[place] += 1 if lack > 0 else -1
    return found


def label(spec: Any) -> str:
    """A model's name for people.

    >>> label({"class_path": "SmallCNN", "init_args": {"width": 8}}), label({"class_path": "resnet8"})
    ('SmallCNN(width=8)', 'resnet8')
    """
    if not isinstance(spec, dict) or "class_path" not in spec:
        return str(spec)
    given = spec.get("init_args") or {}
    plain = [f"{k}={v}" for k, v in given.items() if isinstance(v, int | float | str)]
    return spec["class_path"].rpartition(".")[2] + (f"({', '.join(plain)})" if plain else "")


def _teacher_cell(name: str, fields: dict[str, Any], training: dict[str, Any]) -> Cell:
    # without the views, whose student may see less than the teacher; a recipe's own teacher_training has none either
    alone = {"data": fields.get("data"), "student": fields["teacher"], "training": training, "seed": 0}
    return Cell(TEACHER, name, None, 0, alone)


def _cell_fields(pair: dict[str, Any], method: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    own = {f"${part}": pair.get(part) for part in ("student", "teacher", "data")}
    names = {**own, **names}
    fields, _ = _laid_over(pair, method)
    return {k: v for k, v in _filled(fields, names).items() if v is not None}


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


def _without_taps(loss: Any) -> None:
    if not isinstance(loss, dict):  # a name alone
        return
    arguments = loss.get("init_args") or {}
    arguments.pop("taps", None)
    if not arguments:
        loss.pop("init_args", None)


def _known_method(name: str) -> str:
    """The catalogue's name of a method, or a recipe's, however it is written."""
    known = {_plain(m.recipe): m.name for m in catalogued()} | {_plain(m.name): m.name for m in catalogued()}
    known = {_plain(r): r for r in packaged_names()} | known
    if _plain(name) in known:
        return known[_plain(name)]
    choices = [m.name for m in catalogued()]
    raise RecipeError(f"methods: {name!r} is no method of the catalogue and has no fields{nearest(name, choices)}")


def _plain(name: str) -> str:
    return name.lower().removesuffix(".yaml").replace("_", "").replace("-", "")


def _named(value: Any, where: str) -> dict[str, dict[str, Any]]:
    """Name → fields, from such a mapping or a list of names."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = {_known_method(name): {} for name in value}
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, dict | None) for v in value.values()):
        raise RecipeError(f"{where}: expected names with fields, such as {{KD: {{}}}}, or a list of names")
    return {str(name): fields or {} for name, fields in value.items()}


def _models(value: Any, role: str, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if value is None:
        return {label(shared[role]): {}}
    if not isinstance(value, dict) or not value:
        raise RecipeError(f"{role}s: expected names with fields, such as {{small: {{{role}: ...}}}}")
    found = {}
    for name, fields in value.items():
        if isinstance(fields, str) or (isinstance(fields, dict) and "class_path" in fields):
            fields = {role: fields}
        if not isinstance(fields, dict) or (role not in fields and shared.get(role) is None):
            raise RecipeError(f"{role}s.{name}={fields!r}: expected fields of a recipe with {role!r} among them")
        found[str(name)] = fields
    return found


def _derived(spec: Any) -> bool:
    """Whether a student is a builder of ours, by its name."""
    try:
        target = Builder(()).find(spec.get("class_path") if isinstance(spec, dict) else spec, "")
    except RecipeError:  # of a module that is not known here to be trusted
        return False
    return isinstance(target, type) and issubclass(target, StudentBuilder)


def _seeds(value: Any) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return list(range(value))
    whole = isinstance(value, list) and value and all(isinstance(v, int) and 0 <= v < 2**32 for v in value)
    if whole and len(set(value)) == len(value):
        return value
    raise RecipeError(f"seeds={value!r}: expected how many, 1 or more, or a list of different ones")


def _target(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and 0 < value < 1):
        return value
    raise RecipeError(f"target={value!r}: expected a validation accuracy between 0 and 1")


def _epochs(fields: dict[str, Any]) -> int | None:
    training = fields.get("training")
    return training.get("epochs", None) if isinstance(training, dict) else 10
