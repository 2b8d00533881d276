"""Recipes: the Python signatures as YAML.

A recipe's fields are the arguments of :func:`distil_recipe`. Whatever is an object is written as ``class_path`` (a
class or function by its name in tutelage, or by a dotted path) and ``init_args``, or as the name alone. Everything is
checked by :mod:`tutelage.building` against the signature of what is named before it is called; no other schema exists.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.resources
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from tutelage import procedures
from tutelage.architecture.builders import StudentBuilder, derived
from tutelage.building import Builder, RecipeError
from tutelage.data.loaders import Loaders
from tutelage.distilling import Result, distill
from tutelage.errors import nearest
from tutelage.knowledge.base import Loss
from tutelage.knowledge.feature.route_constrained import RouteConstrained
from tutelage.models import load_weights
from tutelage.plain_yaml import MOST_BYTES, parse_yaml
from tutelage.run import Epoch
from tutelage.schedule import Stage
from tutelage.teachers import Frozen, Teacher
from tutelage.training import Training
from tutelage.views import Batch


@runtime_checkable
class Source(Protocol):
    """The data role of a recipe: batches that are made while the student learns."""

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


def distil_recipe(
    student: nn.Module | StudentBuilder,
    data: Loaders,
    teacher: nn.Module | Teacher | None = None,
    losses: list[Loss] | None = None,
    stages: list[Stage] | None = None,
    views: Callable[[Any], Batch] | None = None,
    source: Source | None = None,
    procedure: Callable[..., list[Result]] | None = None,
    training: Training | None = None,
    teacher_training: Training | None = None,
    student_weights: str | None = None,
    teacher_weights: str | None = None,
    control: bool = False,
    seed: int = 0,
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    after_epoch: Callable[[Epoch], None] | None = None,
) -> Result:
    """Distil as a recipe says.

    Args:
        student: the model that learns, or a builder that makes it of the teacher when that is trained and loaded.
        data: training, validation and test batches.
        teacher: the model that teaches; none trains the student alone.
        losses: what is transferred; by default 0.1 · task + 0.9 · KD.
        stages: instead of losses, several trainings one after the other.
        views: what each of the two models sees of a batch.
        source: makes the training batches instead of the data's own (data-free methods).
        procedure: instead of one training several, one after the other (:mod:`tutelage.procedures`), whose last result
            counts; such as ``teacher_assistant`` with its own arguments.
        training: length, optimiser, precision and the like; its seed is the recipe's.
        teacher_training: train the teacher on the labels first, with these settings; a ``RouteConstrained`` teacher
            without anchors takes them from it.
        student_weights: file to start the student from.
        teacher_weights: file of the teacher's weights.
        control: train the same student without the teacher as well.
        seed: of initial weights, data order and everything else that is random.
        out: the run's folder; with ``teacher_training`` the runs are in its ``teacher`` and ``student``.
        resume: go on with the run in out.
        overwrite: replace the run in out.
        after_epoch: called with each epoch's line of the student's training; for callers in Python.
    """
    training = dataclasses.replace(training or Training(epochs=10), seed=seed)

    def network(field: str) -> nn.Module:
        found = teacher.module if isinstance(teacher, Frozen) else teacher
        if not isinstance(found, nn.Module):
            raise RecipeError(f"{field}: the recipe has no teacher network for it")
        return found

    if procedure and control:
        raise RecipeError("control: not with a procedure; run the student alone as a recipe without a teacher")
    if isinstance(student, StudentBuilder):
        student.check()
        network("student")
    if teacher_weights:
        load_weights(network("teacher_weights"), teacher_weights)
    folders: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
    main = out
    if teacher_training is not None:
        if out and (Path(out) / "run.json").exists():
            raise FileExistsError(f"out: {out} holds a run without the training of a teacher; choose another folder")
        settings = dataclasses.replace(teacher_training, seed=seed)
        where = str(Path(out) / "teacher") if out else None
        taught = network("teacher_training")
        routed = isinstance(teacher, RouteConstrained) and teacher.anchors is None
        if routed and settings.keep_every is None:
            settings = dataclasses.replace(settings, keep_every=math.ceil((settings.epochs or 1) / 4))
        learned = distill(taught, None, data.train, data.validation, training=settings, out=where, **folders)
        if isinstance(teacher, RouteConstrained) and routed:
            teacher.follow(learned.runs[-1])
        main = str(Path(out) / "student") if out and procedure is None else out
    if isinstance(student, StudentBuilder):
        student = derived(student, network("student"), data.train, views, seed)
    if student_weights:
        load_weights(student, student_weights)
    common: dict[str, Any] = {"test": data.test, "views": views, "training": training, "out": main, **folders}
    common["after_epoch"] = after_epoch
    common |= {"losses": losses, "stages": stages}
    train = source if source is not None else data.train
    if procedure:
        return procedure(student=student, teacher=teacher, train=train, validation=data.validation, **common)[-1]
    return distill(student, teacher, train, data.validation, control=control, **common)


def load(
    text: str | Path | dict[str, Any], changes: Iterable[str] = (), trust: Iterable[str] = ()
) -> functools.partial[Result]:
    """Read a recipe and build everything in it, in the order of :func:`distil_recipe`'s arguments, from its seed.

    Args:
        text: a file, the name of a packaged recipe (``kd`` or ``kd.yaml``), or the fields themselves.
        changes: ``["training.epochs=3", "losses.1.init_args.weight=0.5"]``, applied over the file.
        trust: further packages or modules whose classes and functions the recipe may name.

    Returns:
        A function without arguments that runs it; its ``keywords`` are what was built.

    Raises:
        RecipeError: anything wrong in it.
    """
    fields = changed(text, changes)
    seed = fields.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise RecipeError(f"seed={seed!r}: expected a whole number from 0 to 4294967295")
    for name in ("training", "teacher_training"):
        if isinstance(fields.get(name), dict) and "seed" in fields[name]:
            raise RecipeError(f"{name}.seed: a recipe has one seed, its own field")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        _, keywords = Builder(trust).arguments(distil_recipe, fields, "")
    except RecursionError:
        what = "fields" if isinstance(text, dict) else text
        raise RecipeError(f"recipe {what}: a part of it contains itself, or it is nested too deeply") from None
    if keywords.get("procedure") is not None:
        _check_procedure(keywords)
    return functools.partial(distil_recipe, **keywords)


def student_network(keywords: dict[str, Any]) -> nn.Module:
    """The network that learns, of a recipe's built fields: a builder's student is of the teacher with its weights."""
    student, teacher = keywords["student"], keywords.get("teacher")
    if not isinstance(student, StudentBuilder):
        return student
    teacher = teacher.module if isinstance(teacher, Frozen) else teacher
    if not isinstance(teacher, nn.Module):
        raise RecipeError("student: the recipe has no teacher network for it")
    if keywords.get("teacher_weights"):
        load_weights(teacher, keywords["teacher_weights"])
    return derived(student, teacher, keywords["data"].train, keywords.get("views"), keywords.get("seed", 0))


def _check_procedure(keywords: dict[str, Any]) -> None:
    """Refuse a procedure's arguments now, and not when a teacher was trained for it."""
    try:
        procedures.check(keywords["procedure"])
        if isinstance(keywords["student"], nn.Module):  # it may be made of the trained teacher
            procedures.lay_out(keywords["procedure"], procedures.setting_of(keywords))
    except ValueError as error:
        text = str(error)
        raise RecipeError(text if text.startswith("procedure") else f"procedure: {text}") from None


COMPARED = "in_comparison"  # a field for :mod:`tutelage.comparison`: what of a recipe makes the method on another pair


def changed(text: str | Path | dict[str, Any], changes: Iterable[str] = ()) -> dict[str, Any]:
    """A recipe's fields as :func:`load` builds them: a copy, with the changes in it.

    >>> changed("kd", ["losses.1.init_args.temperature=2"])["losses"][1]["init_args"]["temperature"]
    2
    """
    fields = copy.deepcopy(text) if isinstance(text, dict) else read(text)
    fields.pop(COMPARED, None)
    for change in changes:
        change_field(fields, change)
    return fields


def read(text: str | Path) -> dict[str, Any]:
    """The fields of a recipe file, or of a packaged recipe by name.

    >>> read("kd")["losses"][1]["class_path"]
    'KD'
    """
    path = Path(text)
    if path.is_file():
        if path.stat().st_size > MOST_BYTES:
            raise RecipeError(f"recipe {text}: {path.stat().st_size:,} bytes: expected {MOST_BYTES:,} at most")
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise RecipeError(f"recipe {text}: not a text file in UTF-8") from None
    else:
        name = path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"
        packaged = importlib.resources.files("tutelage") / "recipes" / name
        if len(path.parts) != 1 or not packaged.is_file():
            raise RecipeError(
                f"no recipe {str(text)!r}: neither a file nor packaged{nearest(path.stem, packaged_names())}"
            )
        content = packaged.read_text(encoding="utf-8")
    fields = parse_yaml(content, f"recipe {text}")
    if not isinstance(fields, dict):
        raise RecipeError(f"recipe {text}: expected fields such as student, teacher, data; got {type(fields).__name__}")
    return fields


def packaged_names() -> list[str]:
    """The names of the recipes inside the package."""
    folder = importlib.resources.files("tutelage") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def change_field(fields: dict[str, Any], change: str) -> None:
    """Apply ``training.epochs=3`` or ``losses.1.init_args.weight=0.5`` to a recipe's fields."""
    name, mark, text = change.partition("=")
    path: list[Any] = name.replace("[", ".").replace("]", "").split(".")
    if not mark or not all(path):
        raise RecipeError(f"--set {change!r}: expected field=value, such as training.epochs=3")
    value = parse_yaml(text, f"--set {name}")
    here: Any = fields
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise RecipeError(f"--set {name}: {part!r} is no item of a list of {len(here)} (the first is 0)")
            part = int(part)
        elif not isinstance(here, dict):
            raise RecipeError(f"--set {name}: {path[depth - 1]!r} holds {here!r} and no fields")
        elif not last and here.get(part) is None:
            here[part] = {}
        if last:
            here[part] = value
        here = here[part]
