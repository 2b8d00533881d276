"""What a tuning searches: fields of a recipe and the values to try in them."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage import taps
from tutelage.building import Builder
from tutelage.errors import nearest, require
from tutelage.evaluation import evaluating
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.task import TaskLoss
from tutelage.recipe import parse_yaml, student_network
from tutelage.teachers import Frozen, as_teacher
from tutelage.views import SameView

if TYPE_CHECKING:
    import optuna

SHORTCUTS = ("temperature", "weights", "layers")
STAGES = 8  # of each network that ``layers`` pairs: 8 × 8 choices
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})(?P<kinds>(?::\w*)*)")
_FIXED = {
    "seed": "the best of several seeds is luck and no setting",
    "control": "trials train no control",
    "out": "trials have no folders",
    "resume": "trials have no folders",
    "overwrite": "trials have no folders",
    "training.monitor": "trials are compared by it",
}


@dataclass(frozen=True)
class Search:
    """One field of a recipe and the values to try in it: a range, or choices.

    Args:
        field: as for ``--set``: ``losses.1.init_args.temperature``.
        low, high: the range, both ends included.
        whole: only whole numbers.
        log: draw the logarithm evenly.
        choices: instead of a range; plain values.

    Raises:
        ValueError: neither a range nor two different choices or more.

    >>> Search.parse("losses.1.init_args.temperature=1..10:log")
    Search(field='losses.1.init_args.temperature', low=1.0, high=10.0, whole=False, log=True, choices=())
    >>> Search.parse("losses[1].init_args.taps=[[layer2], [layer3]]").choices
    (['layer2'], ['layer3'])
    >>> Search.parse("losses.1.init_args.temperature=10..1")
    Traceback (most recent call last):
    ...
    ValueError: search losses.1.init_args.temperature=10..1: expected the lower end first
    """

    field: str
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.choices:
            if len({json.dumps(choice) for choice in self.choices}) < max(len(self.choices), 2):
                raise ValueError(f"search {self}: expected two or more different choices")
        elif not self.low < self.high:
            raise ValueError(f"search {self}: expected the lower end first")
        elif self.log and self.low <= 0:
            raise ValueError(f"search {self}: a logarithm needs numbers above 0")
        elif self.whole and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise ValueError(f"search {self}: expected whole numbers at both ends")

    @classmethod
    def parse(cls, text: str) -> Search:
        """A search as on the command line: ``field=1..8``, ``=1..8:int``, ``=0.1..10:log`` or ``=[choice, choice]``."""
        name, mark, values = text.partition("=")
        path = name.strip().replace("[", ".").replace("]", "")
        values = values.strip()
        if not mark or not all(path.split(".")):
            raise ValueError(
                f"search {text!r}: expected FIELD=LOW..HIGH, FIELD=[CHOICE, CHOICE] or one of {', '.join(SHORTCUTS)}"
                f"{nearest(text, SHORTCUTS, 1)}"
            )
        if values.startswith("["):
            choices = parse_yaml(values, f"search {path}")
            if not isinstance(choices, list) or len(choices) < 2:
                raise ValueError(f"search {text}: expected two or more different choices")
            return cls(path, choices=tuple(choices))
        found = _RANGE.fullmatch(values)
        if not found:
            raise ValueError(f"search {text}: expected {path}=LOW..HIGH (with :int or :log after it) or {path}=[...]")
        kinds = found["kinds"].split(":")[1:]
        for kind in kinds:
            if kind not in ("int", "log"):
                raise ValueError(f"search {text}: expected :int or :log{nearest(kind, ('int', 'log'), 1)}")
        return cls(path, float(found["low"]), float(found["high"]), "int" in kinds, "log" in kinds)

    def __str__(self) -> str:
        if self.choices:
            return f"{self.field}={json.dumps(self.choices)}"
        kinds = (":int" if self.whole else "") + (":log" if self.log else "")
        return f"{self.field}={self.low:g}..{self.high:g}{kinds}"

    @property
    def label(self) -> str:
        """The field, short enough for a table."""
        return self.field.replace(".init_args", "")

    @property
    def ends(self) -> tuple[Any, Any]:
        """The first and the last value, as Optuna knows them."""
        if self.choices:
            return json.dumps(self.choices[0]), json.dumps(self.choices[-1])
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """What Optuna draws from; choices are their JSON, as its storage keeps no lists."""
        kinds = require("optuna", extra="tune").distributions
        if self.choices:
            return kinds.CategoricalDistribution([json.dumps(choice) for choice in self.choices])
        kind = kinds.IntDistribution if self.whole else kinds.FloatDistribution
        return kind(*self.ends, log=self.log)

    def value(self, drawn: Any) -> Any:
        """The field's value, of what Optuna drew."""
        return json.loads(drawn) if self.choices else drawn

    def change(self, drawn: Any) -> str:
        """The value as a change to the recipe."""
        return f"{self.field}={drawn if self.choices else json.dumps(drawn)}"


def expand(
    fields: dict[str, Any], space: Iterable[Search | str], built: dict[str, Any], trust: Iterable[str] = ()
) -> list[Search]:
    """The searches that ``space`` asks for, its short words written out for a recipe.

    Args:
        fields: of the recipe. Losses that are only a name in it get fields of their own.
        space: as for :func:`tune`.
        built: the same recipe's parts, which are the ``keywords`` of what :func:`tutelage.recipe.load` returns.
        trust: as for :func:`tutelage.recipe.load`.

    Raises:
        ValueError: an unknown word, a word that finds nothing, a field that may not be searched, two searches of one.
    """
    space = list(space)
    if not space:
        raise ValueError("search: nothing to search; give at least one field, or one of " + ", ".join(SHORTCUTS))
    nodes = list(_losses(fields))
    found = [s if isinstance(s, Search) else Search.parse(s) for s in space if s not in SHORTCUTS]
    asked = {s.field for s in found}
    finders: dict[str, Callable[[], list[Search]]] = {
        "temperature": lambda: _temperatures(nodes, Builder(trust)),
        "weights": lambda: _weights(nodes, Builder(trust)),
        "layers": lambda: _layers(nodes, built),
    }
    for word in dict.fromkeys(s for s in space if isinstance(s, str) and s in SHORTCUTS):
        if not nodes:
            raise ValueError(f"search {word}: the recipe names no losses; write them into it")
        several = finders[word]()
        if not several:
            raise ValueError(f"search {word}: no loss of the recipe has any")
        found += [s for s in several if s.field not in asked]
    for n, search in enumerate(found):
        _permit(search, fields)
        for other in found[:n]:
            short, long = sorted((search.field, other.field), key=len)
            if f"{long}.".startswith(f"{short}."):
                raise ValueError(f"search {long}: {'given twice' if short == long else f'{short} is searched as well'}")
    return found


def _permit(search: Search, fields: dict[str, Any]) -> None:
    for name, why in _FIXED.items():
        if f"{search.field}.".startswith(f"{name}."):
            raise ValueError(f"search {search.field}: not to be searched: {why}")
    if fields.get("teacher_training") and search.field.split(".")[0].startswith("teacher"):
        raise ValueError(
            f"search {search.field}: not to be searched: the teacher is trained once, before the trials; train it in a "
            "recipe of its own and give teacher_weights"
        )


def _losses(fields: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each loss of the recipe and its place, such as ``losses.1``."""
    lists: list[tuple[str, Any]] = [("losses", fields.get("losses"))]
    lists += [(f"stages.{n}.losses", stage.get("losses")) for n, stage in enumerate(fields.get("stages") or ())]
    for where, losses in lists:
        for n, node in enumerate(losses or ()):
            if isinstance(node, str):  # without arguments the name alone is enough
                losses[n] = node = {"class_path": node}
            yield f"{where}.{n}", node


def _argument(node: dict[str, Any], target: Callable, name: str) -> Any:
    """What the recipe gives, or else the default; ``None`` where there is neither."""
    parameter = inspect.signature(target).parameters.get(name)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return (node.get("init_args") or {}).get(name, default)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _temperatures(nodes: list[tuple[str, dict[str, Any]]], builder: Builder) -> list[Search]:
    found = []
    for place, node in nodes:
        value = _argument(node, builder.find(node["class_path"], place), "temperature")
        if _positive(value):
            # a contrastive loss's is far below 1
            low, high = (1.0, 10.0) if 1 <= value <= 10 else (value / 10, value * 10)
            found.append(Search(f"{place}.init_args.temperature", low, high, log=True))
    return found


def _weights(nodes: list[tuple[str, dict[str, Any]]], builder: Builder) -> list[Search]:
    found = []
    for place, node in nodes:
        target = builder.find(node["class_path"], place)
        if inspect.isclass(target) and issubclass(target, TaskLoss):
            continue
        name, value = f"{place}.init_args.weight", _argument(node, target, "weight")
        if isinstance(value, dict) and _positive((value.get("init_args") or {}).get("weight")):  # a schedule's
            name, value = f"{name}.init_args.weight", value["init_args"]["weight"]
        if _positive(value):
            found.append(Search(name, value / 10, value * 10, log=True))
    return found


def _layers(nodes: list[tuple[str, dict[str, Any]]], built: dict[str, Any]) -> list[Search]:
    role = as_teacher(built.get("teacher"))
    if not isinstance(role, Frozen):
        raise ValueError("search layers: the recipe has no teacher network whose layers could be paired")
    student, teacher = student_network(built), role.module
    batch = (built.get("views") or SameView())(next(iter(built["data"].train)))
    found = []
    with evaluating(student, teacher):
        for place, _ in nodes:
            loss: Loss = copy.deepcopy(_part(built, place))
            if not loss.needs_teacher or "stage" not in loss.default_reads:
                continue
            mine, theirs = (
                _spread([t.address for t in taps.stages(model, inputs)])
                for model, inputs in ((student, batch.student), (teacher, batch.teacher))
            )
            pairs = [[s] if s == t else [[s, t]] for s in mine for t in theirs]
            given = [tap if isinstance(tap, str) else list(tap) for tap in loss.taps]
            choices: dict[str, list[Any]] = {}  # by what is read in the end
            for candidate in (given, [], *pairs):
                loss.at(*candidate).resolve(student, teacher, batch)
                choices.setdefault(str(loss.pairs), candidate)
            if len(choices) > 1:
                found.append(Search(f"{place}.init_args.taps", choices=tuple(choices.values())))
    return found


def _spread(addresses: list[str]) -> list[str]:
    """At most :data:`STAGES` of them, evenly spaced, with the last."""
    count = min(len(addresses), STAGES)
    return [addresses[len(addresses) * (n + 1) // count - 1] for n in range(count)]


def _part(built: dict[str, Any], place: str) -> Any:
    here: Any = built
    for name in place.split("."):
        here = here[int(name)] if name.isdecimal() else here[name] if isinstance(here, dict) else getattr(here, name)
    return here
