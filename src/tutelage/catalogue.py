"""Every method with its survey section and paper; the command line, the docs' table and the tests read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tutelage.errors import nearest

Thing = TypeVar("Thing", bound=Callable)
ROLES = ("student", "teacher", "views", "data", "losses", "schedule", "procedure")
NEEDS = ("labels", "ids", "several layers", "extra memory", "extra stages", "other models")


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
        needs: what it cannot do without, as its defaults are: ``"labels"``; ``"ids"``, a number for each sample;
            ``"several layers"`` to read, not one; ``"extra memory"``, more than a frozen teacher beside the student
            takes; ``"extra stages"``, more than one training; ``"other models"`` than one teacher and one student.
        use: when to use it, in one line.
    """

    name: str
    section: str
    role: str
    paper: str
    year: int
    link: str
    thing: Callable
    needs: tuple[str, ...] = ()
    use: str = ""

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
    def reads(self) -> str | None:
        """What a loss reads if nobody says where, such as ``"logits"`` or ``"stages"``; nothing for the other roles."""
        return getattr(self.thing, "default_reads", None)

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


def method(
    *, section: str, role: str, paper: str, year: int, link: str, needs: Sequence[str] = (), use: str = ""
) -> Callable[[Thing], Thing]:
    """Class or function decorator that enters a method into the catalogue; its arguments are those of :class:`Method`.

    What a loss's class attributes say (``needs_labels``, ``needs_ids``, ``default_reads = "stages"``) need not be
    repeated in ``needs``.

    Raises:
        ValueError: an unknown role or need, or a second method of the same name.
    """
    if role not in ROLES:
        raise ValueError(f"role={role!r}: expected one of {ROLES}")
    if isinstance(needs, str):
        raise ValueError(f"needs={needs!r}: expected a tuple of names from {NEEDS}")
    for need in needs:
        if need not in NEEDS:
            raise ValueError(f"needs: {need!r} is none of {NEEDS}{nearest(need, NEEDS)}")

    def enter(thing: Thing) -> Thing:
        name = thing.__name__
        known = _METHODS.get(name)
        if known is not None and known.thing.__module__ != thing.__module__:
            raise ValueError(f"two methods are called {name!r}: {known.thing.__module__} and {thing.__module__}")
        found = {*needs, *_derived(thing)}
        ordered = tuple(need for need in NEEDS if need in found)
        _METHODS[name] = Method(name, section, role, paper, year, link, thing, ordered, use)
        return thing

    return enter


def _derived(thing: Callable) -> set[str]:
    """The needs that a loss's class states anyway."""
    stated = {
        "labels": getattr(thing, "needs_labels", False),
        "ids": getattr(thing, "needs_ids", False),
        "several layers": getattr(thing, "default_reads", None) == "stages",
    }
    return {need for need, needed in stated.items() if needed}


def methods() -> list[Method]:
    """Every method, in the order of the survey.

    >>> any(m.name == "KD" and m.year == 2015 for m in methods())
    True
    """
    import tutelage

    for name in tutelage.__all__:  # methods enter themselves when they are imported
        getattr(tutelage, name)
    own = [m for m in _METHODS.values() if m.thing.__module__.startswith("tutelage.")]
    return sorted(own, key=lambda m: (m.section, m.year, m.name))
