"""Every method with its survey section and paper; the command line, the docs' table and the tests read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Thing = TypeVar("Thing", bound=Callable)


@dataclass(frozen=True)
class Method:
    """One method of the survey.

    Args:
        name: as in the catalogue, which is the class's or function's name.
        section: of the survey (arXiv 2006.05525), such as ``"2.1"``; ``"+"`` at its end marks later work.
        role: which of the six roles it replaces: student, teacher, views, data, losses, schedule, or ``procedure``.
        paper: authors and title.
        year: of publication.
        link: to the paper.
        thing: the class or function.
    """

    name: str
    section: str
    role: str
    paper: str
    year: int
    link: str
    thing: Callable

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.thing) or "").split("\n")[0]

    @property
    def defaults(self) -> dict[str, Any]:
        """The default values of its arguments."""
        parameters = inspect.signature(self.thing).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    @property
    def recipe(self) -> str:
        """The file name of its packaged recipe."""
        return "".join(f"_{c.lower()}" if new else c.lower() for c, new in _words(self.name)).strip("_") + ".yaml"


def _words(name: str) -> list[tuple[str, bool]]:
    """Letters with a mark where a new word begins: FitNets → fit_nets, KD → kd, CRD → crd."""
    return [
        (
            c,
            c.isupper() and i > 0 and (name[i - 1].islower() or (i + 1 < len(name) and name[i + 1].islower())),
        )
        for i, c in enumerate(name)
    ]


_METHODS: dict[str, Method] = {}
ROLES = ("student", "teacher", "views", "data", "losses", "schedule", "procedure")


def method(*, section: str, role: str, paper: str, year: int, link: str) -> Callable[[Thing], Thing]:
    """Class or function decorator that enters a method into the catalogue."""
    if role not in ROLES:
        raise ValueError(f"role={role!r}: expected one of {ROLES}")

    def enter(thing: Thing) -> Thing:
        name = thing.__name__
        known = _METHODS.get(name)
        if known is not None and known.thing.__module__ != thing.__module__:
            raise ValueError(f"two methods are called {name!r}: {known.thing.__module__} and {thing.__module__}")
        _METHODS[name] = Method(name, section, role, paper, year, link, thing)
        return thing

    return enter


def methods() -> list[Method]:
    """Every method, in the order of the survey.

    >>> any(m.name == "KD" and m.year == 2015 for m in methods())
    True
    """
    import tutelage  # noqa: F401  (the methods enter themselves when they are imported)

    own = [m for m in _METHODS.values() if m.thing.__module__.startswith("tutelage.")]
    return sorted(own, key=lambda m: (m.section, m.year, m.name))
