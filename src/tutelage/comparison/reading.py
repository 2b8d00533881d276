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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tutelage.architecture.builders import StudentBuilder
from tutelage.building import Builder, RecipeError
from tutelage.catalogue import methods as catalogued
from tutelage.comparison.methods import METHOD_FIELDS, known_method, method_fields, plain_name
from tutelage.comparison.plan import CONTROL, TEACHER, Comparison
from tutelage.comparison.quoted import read_quoted
from tutelage.errors import nearest
from tutelage.recipe import COMPARED, change_field, distil_recipe, read

_DEFAULT = {  # of a recipe that names no losses
    "losses": [
        {"class_path": "TaskLoss", "init_args": {"weight": 0.1}},
        {"class_path": "KD", "init_args": {"weight": 0.9}},
    ]
}
# What a comparison does itself.
_OURS = ("out", "resume", "overwrite", "control", "seed", "after_epoch")
_NOT_SHARED = (*METHOD_FIELDS, *_OURS, COMPARED)
_FIELDS = ("recipe", "seeds", "students", "teachers", "methods", "target", "quoted")


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
        named.setdefault(known_method(name), {})
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
            known_method(name)
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
            known = next((n for n in entries if plain_name(n) == plain_name(entry)), None)
        if known is None:
            raise RecipeError(f"--set {name}: there is no {entry!r} among the {first}{nearest(entry, entries)}")
        if first == "methods" and not entries[known]:
            entries[known] = method_fields(known_method(known), shared)
        change = f"{first}.{known}.{change.removeprefix(f'{first}.{entry}.')}"
    change_field(fields, change)


def _check_fields(patch: dict[str, Any], where: str) -> None:
    known = [n for n in inspect.signature(distil_recipe).parameters if n not in _OURS]
    for name in patch:
        if name in _OURS:
            raise RecipeError(f"{where}.{name}: a comparison sets it itself")
        if name not in known and not str(name).startswith("$"):
            raise RecipeError(f"{where}.{name}: no such field of a recipe{nearest(str(name), known)}")


def _named(value: Any, where: str) -> dict[str, dict[str, Any]]:
    """Name → fields, from such a mapping or a list of names."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = {known_method(name): {} for name in value}
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
