"""Objects from plain values: names from trusted places (:mod:`tutelage.trusted`), values checked against type hints.

A recipe is somebody else's file, so it gets no say in what is imported or called: a name must lie in a trusted place,
an object must be of the type that its field declares, and a function must declare that it returns one.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import sys
import types
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tutelage
from tutelage.errors import nearest
from tutelage.schedule import Stage
from tutelage.training import Training
from tutelage.trusted import TRUSTED, RecipeError, full_name, library_model, named_object, runs_code


class _Mismatch(RecipeError):
    """A value that does not fit the type hint of its field."""

    def __init__(self, where: str, value: Any, hint: Any, note: str = ""):
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        super().__init__(f"{where}={shown}: expected {_described(hint)}{note}")
        self.where = where


class Builder:
    """Builds values that fit type hints.

    Args:
        trust: what the user trusts beyond :data:`TRUSTED`.
    """

    def __init__(self, trust: Iterable[str]):
        self.trusted = (*TRUSTED, *trust)

    def arguments(
        self, target: Callable, given: Any, where: str, later: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments for ``target``, of which the caller will give the first ``later``."""
        if not isinstance(given, dict):
            raise RecipeError(f"{where}={given!r}: expected fields{_of(target, where)}")
        try:
            parameters = inspect.signature(target).parameters
        except ValueError:
            raise RecipeError(f"{where}: the arguments of {_name(target)} are not known to Python") from None
        open_ended = next((p for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
        named = {n: p for n, p in parameters.items() if p is not open_ended}
        for field in given:
            if field not in named and (open_ended is None or not isinstance(field, str)):
                raise RecipeError(f"{_at(where, field)}: no such field{_of(target, where)}{nearest(str(field), named)}")
            if runs_code(field, given[field], field not in named):
                raise RecipeError(f"{_at(where, field)}: not in a recipe, as it may run code from a file or a hub")
        for field in list(named)[later:]:
            p = named[field]
            if field not in given and p.default is p.empty and p.kind is not p.VAR_POSITIONAL:
                raise RecipeError(f"{where or 'recipe'}: the field {field!r}{_of(target, where)} is missing")
        hints = _hints(target)
        positional: tuple[Any, ...] = ()
        keywords: dict[str, Any] = {}
        for field, p in named.items():
            if field not in given:
                continue
            value, hint, place = given[field], hints.get(field, Any), _at(where, field)
            if p.kind is p.VAR_POSITIONAL:
                # Arguments before these would have to be positional too, so they are
                before = [q for q in named.values() if q.kind is q.POSITIONAL_OR_KEYWORD]
                positional = tuple(keywords.pop(q.name, q.default) for q in before)
                positional += tuple(
                    self.fit([value] if isinstance(value, str) else value, types.GenericAlias(list, (hint,)), place)
                )
            else:
                keywords[field] = self.fit(value, hint, place)
        keywords |= {field: self.fit(given[field], Any, _at(where, field)) for field in given if field not in named}
        return positional, keywords

    def fit(self, value: Any, hint: Any, where: str) -> Any:
        """``value`` as the hint wants it."""
        origin, args = get_origin(hint), get_args(hint)
        if isinstance(value, dict) and ("class_path" in value or "init_args" in value):
            return self.build(value, hint, where)
        if _is_union(origin):
            for option in args:
                try:
                    return self.fit(value, option, where)
                except _Mismatch as error:
                    if error.where != where:  # it is the right one, with a mistake inside
                        raise
            raise _Mismatch(where, value, hint, _suggestion(value, args))
        kind = origin or hint
        if kind is Literal:
            if any(value == a and type(value) is type(a) for a in args):
                return value
            raise _Mismatch(where, value, hint, _suggestion(value, (hint,)))
        if kind is Any:
            if isinstance(value, list):
                return [self.fit(v, Any, f"{where}[{n}]") for n, v in enumerate(value)]
            return {k: self.fit(v, Any, f"{where}.{k}") for k, v in value.items()} if isinstance(value, dict) else value
        if kind in (None, type(None), bool, int, str, float, Path):
            return _plain(value, kind, where)
        if kind is collections.abc.Callable:
            if isinstance(value, str):
                return self.build({"class_path": value}, hint, where)
        elif not isinstance(kind, type):
            raise _Mismatch(where, value, hint)
        elif isinstance(value, list) and (issubclass(list, kind) or kind is tuple):
            several = kind is not tuple or args[1:] == (...,) or not args
            if not several and len(value) != len(args):
                raise _Mismatch(where, value, hint)
            inner = [args[0] if args else Any] * len(value) if several else args
            made = [self.fit(v, h, f"{where}[{n}]") for n, (v, h) in enumerate(zip(value, inner, strict=True))]
            return tuple(made) if kind is tuple else made
        elif isinstance(value, dict) and issubclass(dict, kind):
            return {k: self.fit(v, args[1] if args else Any, f"{where}.{k}") for k, v in value.items()}
        elif kind in (Training, Stage):
            if isinstance(value, dict):
                return self.call(kind, value, where, where)
        elif isinstance(value, str) and not issubclass(str, kind) and not issubclass(list, kind):
            return self.build({"class_path": value}, hint, where)
        raise _Mismatch(where, value, hint)

    def build(self, node: dict[str, Any], hint: Any, where: str) -> Any:
        """The object that ``class_path`` and ``init_args`` describe."""
        parts = ("class_path", "init_args")
        for name in node:
            if name not in parts:
                raise RecipeError(
                    f"{_at(where, name)}: expected class_path and init_args{nearest(str(name), parts, 1)}"
                )
        target = self.find(node.get("class_path"), where)
        given = node.get("init_args")
        given = {} if given is None else given
        inside = _at(where, "init_args")
        makes = target if inspect.isclass(target) else _hints(target).get("return", Any)
        role = _accepted(makes, hint, inspect.isclass(target))
        if role == "no":
            said = "is not" if inspect.isclass(target) else "does not declare to return"
            raise _Mismatch(where, node["class_path"], hint, f", which {_name(target)} {said}")
        if role == "yes":
            return self.call(target, given, inside, where)
        if not given:
            return target
        takes = next((get_args(option)[0] for option in _options(hint) if get_args(option)), ...)
        later = len(takes) if isinstance(takes, list) else sys.maxsize
        return functools.partial(target, **self.arguments(target, given, inside, later)[1])

    def call(self, target: Callable, given: Any, inside: str, where: str) -> Any:
        positional, keywords = self.arguments(target, given, inside)
        try:
            return target(*positional, **keywords)
        except Exception as error:  # whatever a constructor refuses is a mistake of the recipe
            raise RecipeError(f"{where}: {_one_line(error)}") from error

    def find(self, name: Any, where: str) -> Any:
        """The class or function of a short or dotted name."""
        if not isinstance(name, str):
            raise RecipeError(f"{_at(where, 'class_path')}={name!r}: expected the name of a class or function")
        try:
            return named_object(full_name(name), self.trusted)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if _is_union(get_origin(hint)) else (hint,)


def _is_union(origin: Any) -> bool:
    return origin is Union or origin is types.UnionType


def _accepted(makes: Any, hint: Any, is_class: bool) -> Literal["yes", "as a function", "no"]:
    """Whether what makes objects of the type ``makes`` may stand in a field: called at once, or as a function itself.

    A function that does not declare a type is never called at once.
    """
    made = get_origin(makes) or makes
    for option in _options(hint):
        kind = get_origin(option) or option
        if kind is collections.abc.Callable:
            result = (get_args(option) or (None, None))[1]
            if not is_class or (isinstance(result, type) and issubclass(made, result)):
                return "as a function"
            if "__call__" in dir(made):
                return "yes"
        elif (kind is Any and is_class) or (
            isinstance(kind, type) and isinstance(made, type) and kind is not object and issubclass(made, kind)
        ):
            return "yes"
    return "no"


def _hints(target: Callable) -> dict[str, Any]:
    """Type hints by argument; ``Any`` where there is none, or where it cannot be resolved."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)  # type: ignore[misc]
    names = {**vars(tutelage), **getattr(function, "__globals__", {})}
    hints = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        if isinstance(hint, str):
            try:
                hint = eval(hint, names)  # the text of a trusted module, and not of the recipe
            except Exception:  # a name that exists for type checkers alone
                hint = Any
        hints[name] = Any if isinstance(hint, str | TypeVar) else hint
    return hints


def _plain(value: Any, kind: Any, where: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and (whole or isinstance(value, float)):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if whole if kind is int else isinstance(value, kind or type(None)):
        return value
    raise _Mismatch(where, value, kind)


PLAIN = {
    None: "nothing",
    type(None): "nothing",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    Any: "anything",
}


def _described(hint: Any) -> str:
    """A type hint in words.

    >>> from tutelage import Loss
    >>> _described(float | None), _described(list[Loss]), _described(Literal["no", "bf16"])
    ('a number or nothing', 'a list of Loss', "'no' or 'bf16'")
    """
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, Hashable) and hint in PLAIN:
        return PLAIN[hint]
    if _is_union(origin):
        return " or ".join(dict.fromkeys(_described(a) for a in args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    kind = origin or hint
    if kind is collections.abc.Callable:
        made = f" that makes {args[1].__name__}" if args and isinstance(args[1], type) else ""
        return f"a function{made} (class_path and init_args)"
    if kind is tuple and args and args[-1] is not ...:
        return f"[{', '.join(_described(a) for a in args)}]"
    if isinstance(kind, type) and (issubclass(list, kind) or kind is tuple):
        inner = args[0].__name__ if args and isinstance(args[0], type) and args[0] not in PLAIN else ""
        return f"a list{f' of {inner}' if inner else ''}"
    if kind in (Training, Stage):
        return f"fields of {_name(kind)}"
    if isinstance(kind, type) and issubclass(dict, kind):
        return "fields"
    return f"{_name(kind)} (class_path and init_args)"


def _suggestion(value: Any, options: Iterable[Any]) -> str:
    names = [a for o in options if get_origin(o) is Literal for a in get_args(o) if isinstance(a, str)]
    return nearest(value, names, 1) if names and isinstance(value, str) else ""


def _name(thing: Any) -> str:
    if thing is library_model:
        return "create"
    return getattr(thing, "__name__", str(thing))


def _of(target: Callable, where: str) -> str:
    return f" of {_name(target)}" if where else ""  # the recipe itself needs no name


def _at(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


def _one_line(error: Exception) -> str:
    text = str(error).split("\nException raised from")[0]  # torch appends where in its own sources
    return " ".join(text.split()) or type(error).__name__
