"""Which assistants: the path from teacher to student that is best on validation data, within a number of trainings."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from torch import nn

from tutelage.distilling import Result, distill
from tutelage.evaluation import evaluate
from tutelage.knowledge.base import Loss
from tutelage.procedures import refuse_bound, seed_of

Search = Literal["exhaustive", "best copies", "mean accuracy"]
Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Tried:
    """A path that was trained: its assistants' names, largest first, and the student's figure on validation."""

    assistants: tuple[str, ...]
    accuracy: float


@dataclass
class AssistantPath:
    """What a search found.

    Args:
        best: the chosen path.
        tried: every path to the student that was trained, best first; of equals the shorter one first.
        alone: where the search has looked at it, each network's figure when it learns from the labels alone.
        search: how it was searched.
        trainings: how many that took.
        student: as it is after the best path.
        assistants: the networks of the best path.
    """

    best: Tried
    tried: list[Tried]
    alone: dict[str, float]
    search: Search
    trainings: int
    student: nn.Module
    assistants: list[nn.Module]


def trainings_needed(candidates: int, search: Search, longest: int | None = None) -> int:
    """How many trainings a search takes at most.

    Exhaustive: each of the Σ_k C(n, k) paths trains a student and, unless it is the direct one, its last assistant.
    Best
    copies: each network from everybody above it. Mean accuracy: everybody but the teacher alone, then one chain.

    >>> [trainings_needed(3, search) for search in ("exhaustive", "best copies", "mean accuracy")]
    [15, 10, 6]
    >>> trainings_needed(3, "exhaustive", longest=1)
    7
    """
    if search == "mean accuracy":
        return candidates + 3
    if search == "best copies":
        return (candidates + 1) * (candidates + 2) // 2
    most = candidates if longest is None else min(longest, candidates)
    return 2 * sum(math.comb(candidates, k) for k in range(most + 1)) - 1


def choose_assistants(
    student: Make,
    candidates: Mapping[str, Make],
    teacher: nn.Module,
    train: Iterable[Any],
    validation: Iterable[Any],
    *,
    search: Search | None = None,
    longest: int | None = None,
    budget: int | None = None,
    losses: Sequence[Loss] | None = None,
    views: Any = None,
    **training: Any,
) -> AssistantPath:
    """Choose how many assistants stand between a teacher and a student, and which, by what students learn from them.

    - ``"exhaustive"``: every path, as in the paper's figure 5: 2ⁿ of n candidates. A network that stands at the end of
      the same beginning of several paths is trained once. With ``longest=1`` it is the paper's search for the best
      size.
    - ``"best copies"``, greedy and ours: from the largest to the smallest, each network is taught by everybody above
      it, of whom only the copy that was best on validation stays. It finds the best path where a better copy teaches
      better.
    - ``"mean accuracy"``, the paper's rule of thumb: everybody learns alone from the labels, and the one assistant is
      the candidate whose accuracy is nearest to the mean of the teacher's and the student's (not the one of middle
      size).

    The paper finds that every path beats direct distillation and that the longest is best, if its cost does not count.
    What its appendix says of the best path under a constraint was not at hand.

    The figure is the validation's, so the chosen path's is too good; judge the student on test data. Every network of a
    name starts from the same first weights on every path.

    Args:
        student: makes the student: a function without arguments, such as ``lambda: SmallCNN(width=4)``.
        candidates: name → function that makes an assistant, from the largest to the smallest; of a builder by size
            ``{str(w): partial(SmallCNN, width=w) for w in (24, 16, 8)}``.
        teacher: a trained network.
        train, validation: as in :func:`tutelage.distill`.
        search: by default the first of the three, in this order, that takes no more than ``budget`` trainings.
        longest: the greatest number of assistants in a path.
        budget: the greatest number of trainings.
        losses: as for :func:`tutelage.teacher_assistant`; each training has a copy of its own.
        views: as in :func:`tutelage.distill`.
        **training: settings, such as ``epochs=10``.

    Raises:
        ValueError: no candidates, an unknown search, or one that takes more trainings than there are; the message says
            how many.

    Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh 2020, "Improved Knowledge Distillation via Teacher
    Assistant",
    https://arxiv.org/abs/1902.03393

    >>> from functools import partial
    >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    >>> def net(w): return nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 3))
    >>> family = {str(w): partial(net, w) for w in (16, 8)}
    >>> found = choose_assistants(partial(net, 4), family, net(64), data, data, epochs=1, progress=False)
    >>> sorted(path.assistants for path in found.tried), found.trainings
    ([(), ('16',), ('16', '8'), ('8',)], 7)
    """
    count = len(candidates)
    if not count:
        raise ValueError("candidates: expected one network or more between teacher and student")
    if _STUDENT in candidates:
        raise ValueError(f"candidates: {_STUDENT!r} is the student's own name; choose another")
    if longest is not None and longest < 1:
        raise ValueError(f"longest={longest}: expected a whole number, 1 or more")
    if search is not None and search not in get_args(Search):
        raise ValueError(f"search={search!r}: expected one of {get_args(Search)}")
    refuse_bound(*(losses or ()))
    costs = {s: trainings_needed(count, s, longest) for s in get_args(Search) if search in (None, s)}
    chosen = next((s for s, cost in costs.items() if budget is None or cost <= budget), None)
    if chosen is None:
        needed = ", ".join(f"{s} takes {cost}" for s, cost in costs.items())
        raise ValueError(f"budget={budget} trainings: of {count} candidates {needed}")
    make = {**candidates, _STUDENT: student}
    tree = _Tree(make, teacher, train, validation, {"losses": losses, "views": views, **training})
    names, alone = list(candidates), {}
    if chosen == "exhaustive":
        most = count if longest is None else min(longest, count)
        paths = [path for k in range(most + 1) for path in combinations(names, k)]
    elif chosen == "best copies":
        paths = tree.best_copies(names, count if longest is None else longest)
    else:
        alone = {name: tree.figure(tree.trained(name, None)) for name in make}
        taught = evaluate(teacher, validation, views=views).value
        middle = (taught + alone[_STUDENT]) / 2
        paths = [(min(names, key=lambda name: abs(alone[name] - middle)),)]
    tried = [Tried(path, tree.figure(tree.result((*path, _STUDENT)))) for path in paths]
    tried.sort(key=lambda t: (-t.accuracy, len(t.assistants)))
    best = tried[0].assistants
    assistants = [tree.result(best[: n + 1]).student for n in range(len(best))]
    network = tree.result((*best, _STUDENT)).student
    return AssistantPath(tried[0], tried, alone, chosen, tree.trainings, network, assistants)


_STUDENT = "student"


@dataclass
class _Tree:
    """The networks that were trained, by the path from the teacher to them."""

    make: dict[str, Make]
    teacher: nn.Module
    train: Iterable[Any]
    validation: Iterable[Any]
    settings: dict[str, Any]
    done: dict[tuple[str, ...], Result] = field(default_factory=dict)
    trainings: int = 0

    def result(self, path: tuple[str, ...]) -> Result:
        """Of the last network on the path, trained by the one before."""
        if path not in self.done:
            above = self.result(path[:-1]).student if path[:-1] else self.teacher
            self.done[path] = self.trained(path[-1], above)
        return self.done[path]

    def trained(self, name: str, above: nn.Module | None) -> Result:
        self.trainings += 1
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(self.settings))
            learner = self.make[name]()
        losses = copy.deepcopy(self.settings["losses"]) if above is not None else None
        return distill(learner, above, self.train, self.validation, **{**self.settings, "losses": losses})

    def figure(self, result: Result) -> float:
        assert result.metrics is not None, "there are validation data"
        return result.metrics.value

    def best_copies(self, names: Sequence[str], longest: int) -> list[tuple[str, ...]]:
        """The paths to the student that end in the best copies of the candidates."""
        best: list[tuple[str, ...]] = [()]
        for name in names:
            ways = [(*path, name) for path in best if len(path) < longest]
            best.append(max(ways, key=lambda way: self.figure(self.result(way))))
        return best
