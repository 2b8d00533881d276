"""Recipes: the Python signatures as YAML, read with jsonargparse, from trusted packages only."""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import importlib.util
import inspect
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import nn

from tutelage.architecture.teacher_assistant import teacher_assistant
from tutelage.data.loaders import Loaders
from tutelage.distilling import Result, distill
from tutelage.errors import nearest
from tutelage.knowledge.base import Loss
from tutelage.models import load_weights
from tutelage.schedule import Stage
from tutelage.teachers import Teacher
from tutelage.training import Training
from tutelage.views import Batch

TRUSTED = ("tutelage", "torch", "torchvision", "timm", "transformers", "datasets", "torchao", "torchmetrics")


class RecipeError(ValueError):
    """A mistake in a recipe: which field, what was wrong, and the nearest right name."""


class Source(Protocol):
    """The data role of a recipe: batches that are made while the student learns."""

    def attach(self, student: nn.Module, teacher: nn.Module) -> None: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


def distil_recipe(
    student: nn.Module,
    data: Loaders,
    teacher: nn.Module | Teacher | None = None,
    losses: list[Loss] | None = None,
    stages: list[Stage] | None = None,
    views: Callable[[Any], Batch] | None = None,
    source: Source | None = None,
    assistants: list[nn.Module] | None = None,
    training: Training | None = None,
    teacher_training: Training | None = None,
    student_weights: str | None = None,
    teacher_weights: str | None = None,
    control: bool = False,
    seed: int = 0,
    out: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Distil as a recipe says.

    Args:
        student: the model that learns.
        data: training, validation and test batches.
        teacher: the model that teaches; none trains the student alone.
        losses: what is transferred; by default 0.1 · task + 0.9 · KD.
        stages: instead of losses, several trainings one after the other.
        views: what each of the two models sees of a batch.
        source: makes the training batches instead of the data's own (data-free methods).
        assistants: models between teacher and student, largest first (teacher-assistant chain).
        training: length, optimiser, precision and the like; its seed is the recipe's.
        teacher_training: train the teacher on the labels first, with these settings.
        student_weights: file to start the student from.
        teacher_weights: file of the teacher's weights.
        control: train the same student without the teacher as well.
        seed: of initial weights, data order and everything else that is random.
        out: the run's folder.
        resume: go on with the run in out.
        overwrite: replace the run in out.
    """
    training = training or Training(epochs=10)
    training.seed = seed
    if student_weights:
        load_weights(student, student_weights)
    if teacher_weights:
        if not isinstance(teacher, nn.Module):
            raise RecipeError("teacher_weights: the recipe has no teacher network to load them into")
        load_weights(teacher, teacher_weights)
    folders: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
    if teacher_training is not None:
        if not isinstance(teacher, nn.Module):
            raise RecipeError("teacher_training: the recipe has no teacher network to train")
        teacher_training.seed = seed
        where = str(Path(out) / "teacher") if out else None
        distill(teacher, None, data.train, data.validation, training=teacher_training, out=where, **folders)
    main = str(Path(out) / "student") if out and teacher_training is not None else out
    common: dict[str, Any] = {"test": data.test, "views": views, "training": training, "out": main, **folders}
    train = source if source is not None else data.train
    if assistants:
        if not isinstance(teacher, nn.Module):
            raise RecipeError("assistants: the recipe has no teacher network for them")
        legs = teacher_assistant(student, assistants, teacher, train, data.validation, losses=losses, **common)
        return legs[-1]
    return distill(student, teacher, train, data.validation, losses=losses, stages=stages, control=control, **common)


def load(text: str | Path, changes: Iterable[str] = (), trust: Iterable[str] = ()) -> Callable[[], Result]:
    """Read a recipe and build everything in it.

    Args:
        text: a file, or the name of a packaged recipe (``kd`` or ``kd.yaml``).
        changes: ``["training.epochs=3", "out=runs/a"]``, applied over the file.
        trust: further packages that the recipe may import from.

    Returns:
        A function that runs it.

    Raises:
        RecipeError: anything wrong in it.
    """
    fields = read(text)
    for change in changes:
        _change(fields, change)
    trusted = (*TRUSTED, *trust)
    taps: dict[str, Any] = {}
    _check(fields, distil_recipe, "", trusted, taps)
    seed = fields.get("seed", 0)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(distil_recipe)
    try:
        built = parser.instantiate_classes(parser.parse_object(fields))
    except Exception as error:  # whatever a constructor refuses becomes a recipe's mistake
        raise RecipeError(f"recipe: {_plain(error)}") from error
    _place_taps(built, taps)
    return functools.partial(distil_recipe, **vars(built))


def read(text: str | Path) -> dict[str, Any]:
    """The fields of a recipe file, or of a packaged recipe by name.

    >>> read("kd")["losses"][1]["class_path"]
    'KD'
    """
    path = Path(text)
    if not path.is_file():
        name = path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"
        packaged = importlib.resources.files("tutelage") / "recipes" / name
        if len(path.parts) > 1 or not packaged.is_file():
            raise RecipeError(
                f"no recipe {str(text)!r}: neither a file nor packaged{nearest(path.stem, packaged_names())}"
            )
        content = packaged.read_text()
    else:
        content = path.read_text()
    try:
        fields = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {text}: not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"recipe {text}: expected fields such as student, teacher, data; got {type(fields).__name__}")
    return fields


def packaged_names() -> list[str]:
    """The names of the recipes inside the package."""
    folder = importlib.resources.files("tutelage") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def named_object(path: str, trusted: Iterable[str]) -> Any:
    """The class or function that a dotted path names, if it belongs to a trusted package.

    Raises:
        RecipeError: another package, or no such name.

    >>> named_object("tutelage.KD", TRUSTED).__name__
    'KD'
    >>> named_object("os.system", TRUSTED)
    Traceback (most recent call last):
    ...
    tutelage.recipe.RecipeError: 'os.system': 'os' is not a trusted package (tutelage, torch, torchvision, timm, \
transformers, datasets, torchao, torchmetrics); trust it with --trust os if you know what it does
    """
    root = path.split(".")[0]
    trusted = tuple(trusted)
    refusal = f"is not a trusted package ({', '.join(trusted)}); trust it with --trust {{0}} if you know what it does"
    if root not in trusted:
        raise RecipeError(f"{path!r}: {root!r} {refusal.format(root)}")
    found: Any = None
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            if importlib.util.find_spec(module) is None:
                continue
        except ModuleNotFoundError:
            continue
        found = importlib.import_module(module)
        for name in parts[cut:]:
            if not hasattr(found, name):
                raise RecipeError(f"{path!r}: no {name!r} in {module}{nearest(name, dir(found))}")
            found = getattr(found, name)
        break
    if found is None:
        raise RecipeError(f"{path!r}: cannot import it; is the package {root!r} installed?")
    # torch.os.system is reached through a trusted package and belongs to another
    home = (getattr(found, "__module__", None) or root).split(".")[0].lstrip("_")
    if home not in trusted:
        raise RecipeError(f"{path!r}: it belongs to {home!r}, which {refusal.format(home)}")
    return found


def _check(value: Any, target: Callable, where: str, trusted: tuple[str, ...], taps: dict[str, Any]) -> None:
    """Unknown fields, unknown and untrusted names; positional taps are taken out for :func:`_place_taps`."""
    parameters = inspect.signature(target).parameters
    known = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in list(value):
        if name not in known and not anything:
            raise RecipeError(f"{_at(where, name)}: no such field{_of(target)}{nearest(str(name), known)}")
        parameter = parameters.get(name)
        if parameter is not None and parameter.kind is parameter.VAR_POSITIONAL:
            taps[where] = value.pop(name)
            continue
        _check_value(value[name], _at(where, name), trusted, taps)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [n for n in needed if n not in value]:
        raise RecipeError(f"{where or 'recipe'}: the field {missing[0]!r} is missing{_of(target)}")


def _check_value(value: Any, where: str, trusted: tuple[str, ...], taps: dict[str, Any]) -> None:
    if isinstance(value, list):
        for number, item in enumerate(value):
            _check_value(item, f"{where}[{number}]", trusted, taps)
    elif isinstance(value, dict) and "class_path" in value:
        for name in value:
            if name not in ("class_path", "init_args"):
                raise RecipeError(
                    f"{where}.{name}: expected class_path and init_args{nearest(str(name), ['init_args'])}"
                )
        target = named_object(_full(value["class_path"], where), trusted)
        value["class_path"] = _full(value["class_path"], where)
        arguments = value.setdefault("init_args", {})
        if isinstance(target, type) and issubclass(target, torch.optim.Optimizer):
            return
        # what jsonargparse leaves open, such as an optimiser's parameters, it fills itself
        _check(arguments, target, where, trusted, taps)
    elif isinstance(value, dict):
        nested = {"training": Training, "teacher_training": Training}.get(where)
        if nested is not None:
            _check(value, nested, where, trusted, taps)
        elif re.fullmatch(r"stages\[\d+\]", where):
            _check(value, Stage, where, trusted, taps)
        else:
            for name, item in value.items():
                _check_value(item, _at(where, name), trusted, taps)
    elif isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value):
        root = value.split(".")[0]
        if root not in trusted and "/" not in value and importlib.util.find_spec(root) is not None:
            named_object(value, trusted)


def _full(class_path: Any, where: str) -> str:
    """``KD`` is short for ``tutelage.KD``, ``resnet20`` for ``tutelage.models.resnet20``."""
    if not isinstance(class_path, str):
        raise RecipeError(f"{where}.class_path: expected a name, got {class_path!r}")
    if "." in class_path:
        return class_path
    import tutelage
    from tutelage import data, models

    for package in (tutelage, models, data):
        if hasattr(package, class_path):
            return f"{package.__name__}.{class_path}"
    choices = [*tutelage.__all__, *models.__all__, *data.__all__]
    raise RecipeError(f"{where}: no {class_path!r} in tutelage, its models or its data{nearest(class_path, choices)}")


def _place_taps(built: Namespace, taps: dict[str, Any]) -> None:
    for where, addresses in taps.items():
        found: Any = built
        for name, index in re.findall(r"(\w+)|\[(\d+)\]", where):
            if name == "init_args":
                continue
            found = found[int(index)] if index else getattr(found, name)
        if isinstance(addresses, str):
            addresses = [addresses]
        found.at(*(tuple(a) if isinstance(a, list) else a for a in addresses))


def _change(fields: dict[str, Any], change: str) -> None:
    name, mark, text = change.partition("=")
    if not mark:
        raise RecipeError(f"--set {change!r}: expected field=value, such as training.epochs=3")
    *path, last = name.split(".")
    for part in path:
        fields = fields[int(part)] if isinstance(fields, list) else fields.setdefault(part, {})
        if not isinstance(fields, dict | list):
            raise RecipeError(f"--set {name}: {part!r} holds a value and no fields")
    fields[int(last) if isinstance(fields, list) else last] = yaml.safe_load(text)


def _at(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


def _of(target: Callable) -> str:
    return "" if target is distil_recipe else f" of {getattr(target, '__name__', target)}"


def _plain(error: Exception) -> str:
    """The cause of a jsonargparse error without its frames."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)
