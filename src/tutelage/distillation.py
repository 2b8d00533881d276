"""The six roles bound together, and the one step that every method of the survey is."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.beside import SideLearner
from tutelage.console import say
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.taps import Observer
from tutelage.teachers import Frozen, Lesson, NoTeacher, Teacher, as_teacher
from tutelage.views import Batch, SameView


@dataclass
class Losses:
    """What one batch costs.

    Args:
        total: Σ weight·value, to call ``backward()`` on.
        values: each term before its weight, detached.
        weights: each term's weight at this moment.

    >>> losses = Losses(torch.tensor(3.0), {"KD": torch.tensor(1.5)}, {"KD": 2.0})
    >>> losses["KD"], losses.weights["KD"]
    (tensor(1.5000), 2.0)
    """

    total: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


class Distillation(nn.Module):
    """A student, a teacher, what each sees, and what is transferred. Calling it with a batch is one step's forward.

    ``parameters()`` are the student's and those that losses learn; never the teacher's.

    Args:
        student: any module that learns.
        teacher: any module (it is frozen, not copied), a :class:`tutelage.teachers.Teacher`, or ``None`` to train the
            student alone.
        losses: the terms; by default ``[TaskLoss(weight=0.1), KD(weight=0.9)]``, or the task alone without a teacher.
        views: turns what the loader gives into a :class:`tutelage.views.Batch`; by default both models see the same.

    >>> from tutelage import KD, TaskLoss
    >>> student, teacher = nn.Linear(8, 3), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> batch = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
    >>> d = Distillation(student, teacher, losses=[TaskLoss(), KD(temperature=4)]).bind(batch)
    >>> losses = d(batch)
    >>> losses.total.backward()
    >>> sorted(losses.values), teacher[0].weight.grad
    (['KD', 'TaskLoss'], None)
    """

    student: nn.Module
    views: Callable[[Any], Batch]

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None = None,
        losses: Sequence[Loss] | None = None,
        views: Callable[[Any], Batch] | None = None,
    ):
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student: expected an nn.Module, got {type(student).__name__}")
        self.student = student
        self._teacher = (as_teacher(teacher),)  # in a tuple, so that no network of the teacher is a submodule
        if losses is None:
            losses = [TaskLoss()] if isinstance(self.teacher, NoTeacher) else [TaskLoss(weight=0.1), KD(weight=0.9)]
        for loss in losses:
            if not isinstance(loss, Loss):
                raise TypeError(f"losses: expected tutelage losses, got {type(loss).__name__}")
        if not losses:
            raise ValueError("losses: at least one is needed")
        self.losses = nn.ModuleDict()
        for loss in losses:
            names = [loss.name, *(f"{loss.name}_{n}" for n in range(2, len(losses) + 2))]
            self.losses[next(name for name in names if name not in self.losses)] = loss
        self.apart = nn.ModuleDict()  # of losses that own something: one more for each further pair of networks
        self.views = views or SameView()
        self.progress = 0.0
        self._learned: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        self.observer: Observer | None = None

    @property
    def terms(self) -> dict[str, Loss]:
        """The losses by their names in logs."""
        return {name: loss for name, loss in self.losses.items() if isinstance(loss, Loss)}

    @property
    def owned(self) -> nn.ModuleDict:
        """The losses, with those that stand between further pairs of networks: everything that losses own."""
        return nn.ModuleDict({"losses": self.losses, "apart": self.apart})

    @property
    def teacher(self) -> Teacher:
        return self._teacher[0]

    @property
    def device(self) -> torch.device:
        parameter = next(self.student.parameters(), None)
        if parameter is None:
            raise ValueError(f"student: {type(self.student).__name__} has no parameters, so it cannot learn")
        return parameter.device

    def continue_from(self, earlier: Distillation) -> Distillation:
        """Let every term go on with what the term of the same name and class learned in an earlier stage.

        To be called before :meth:`bind`; returns itself. A term with other shapes than before is refused there.

        >>> from tutelage import FitNets
        >>> student, teacher, batch = nn.Linear(8, 3), nn.Linear(8, 5), torch.ones(2, 8)
        >>> first = Distillation(student, teacher, losses=[FitNets(":input", weight=1)]).bind(batch)
        >>> second = Distillation(student, teacher, losses=[FitNets(":input")]).continue_from(first).bind(batch)
        >>> bool((second.losses["FitNets"].regressors[0].weight == first.losses["FitNets"].regressors[0].weight).all())
        True
        """
        for name, before in (*earlier.losses.items(), *earlier.apart.items()):
            if type(before) is type(self.terms.get(name.split("@")[0])):
                beside = {n: m.own_state() for n, m in before.named_modules() if isinstance(m, SideLearner)}
                self._learned[name] = copy.deepcopy((dict(before.state_dict()), beside))
        return self

    def bind(self, batch: Any, population: int | None = None) -> Distillation:
        """Look every address up, run both models once on ``batch``, build what losses own, and check everything.

        Nothing that was there before changes: modes, buffers and random numbers are as they came. A second call
        does nothing.

        Args:
            batch: a first batch, on the student's device.
            population: the number of training samples, for losses that remember each one.

        Raises:
            ValueError: an address, a shape, missing labels or ids, non-finite inputs; the message names it.
        """
        if self.observer is not None:
            return self
        names = self.teacher.names(self.student)
        try:
            with untouched(self.student):
                batch = replace(self.views(batch), population=population)
                self._check_batch(batch)
                if self._input_gradients:
                    batch = batch.with_gradients()
                    torch.set_grad_enabled(True)
                self.student.train()
                self.losses.eval()  # a loss in eval mode does not change what it remembers
                for loss in self.terms.values():
                    if loss.resolve(*names, batch):
                        where = ", ".join(f"student {s!r} ← teacher {t!r}" for s, t in loss.pairs)
                        say(f"{loss.name} reads {where}")
                self.teacher.check(list(self.terms.values()))
                reads_s = [s for loss in self.terms.values() for s, _ in loss.pairs]
                reads_t = [t for loss in self.terms.values() if loss.needs_teacher for _, t in loss.pairs]
                observer = Observer(self.student, self.teacher.bind(self.student, reads_s, reads_t))
                self._build(self.teacher.lessons(batch, observer.dry_run(batch.student)), batch)
        finally:
            self.owned.train(self.training)
        self.observer = observer
        return self

    def forward(self, batch: Any, shares: dict[str, Tensor] | None = None) -> Losses:
        """One step's forward: both models once, then every term.

        Args:
            batch: what the loader gave, on the student's device.
            shares: each term's part of a step that is made of several batches (:meth:`units` over the step's);
                ``None`` for a step of one batch.
        """
        if self.observer is None:
            self.bind(batch)
        values, weights = self.terms_on(batch)
        terms = [weights[n] * v * (1.0 if shares is None else shares[n]) for n, v in values.items()]
        total = torch.stack(terms).sum() if terms else torch.zeros((), device=self.device, requires_grad=True)
        return Losses(total, {n: v.detach() for n, v in values.items()}, weights)

    def terms_on(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Each term on this batch, before its weight and with its graph, and the weights at this moment."""
        assert self.observer is not None, "bind first"
        batch = replace(self.views(batch), progress=self.progress)
        if self._input_gradients:
            # such losses need the graph for their value already, also where nobody learns from it
            learning, batch = torch.is_grad_enabled(), batch.with_gradients()
            with torch.enable_grad():
                values, weights = self._terms(batch)
            return (values if learning else {n: v.detach() for n, v in values.items()}), weights
        return self._terms(batch)

    def _terms(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        assert self.observer is not None
        self.teacher.ahead(batch)
        lessons = self.teacher.lessons(batch, self.observer(batch.student))
        weights = {name: loss.weight_at(self.progress) for name, loss in self.terms.items()}
        values: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, enabled=False):
            for lesson in lessons:
                for name, loss in self._applying(lesson):
                    if weights[name]:
                        value = loss(lesson.student, lesson.teacher, batch) * lesson.weight
                        values[name] = values[name] + value if name in values else value
        return values, weights

    def _build(self, lessons: list[Lesson], batch: Batch) -> None:
        """Let each loss make what it owns, once for each pair of networks that it stands between."""
        fresh = {name: copy.deepcopy(loss) for name, loss in self.terms.items() if _owns(loss)}
        built: set[str] = set()
        self.apart = nn.ModuleDict()
        for lesson in lessons:
            teacher = cast(Record, lesson.teacher)  # None only for losses that say they need no teacher
            for name in (n for n, loss in self.terms.items() if lesson.teacher is not None or not loss.needs_teacher):
                slot = f"{name}@{lesson.key}"
                if name in built and name in fresh and slot not in built:
                    self.apart[slot] = copy.deepcopy(fresh[name])
                loss = self._of(name, lesson)
                if not {name, slot} <= built:
                    loss.build(lesson.student, teacher, batch)
                    self._recall(slot if slot in self.apart else name, loss.to(self.device).eval())
                    built |= {name, slot}
                loss.check(lesson.student, teacher, batch)
                loss(lesson.student, teacher, batch)
        if idle := sorted(set(self.losses) - built):
            raise ValueError(f"losses {idle} need a teacher, and {type(self.teacher).__name__} gives none")

    def units(self, raw: Any) -> dict[str, Tensor | int]:
        """What each term of this batch is a mean over, to combine several batches into one step."""
        batch = SameView()(raw)
        return {name: loss.units(batch) for name, loss in self.terms.items()}

    def description(self) -> dict[str, Any]:
        """Who and what, in words, for a run's folder."""
        teacher = self.teacher.module if isinstance(self.teacher, Frozen) else self.teacher
        return {
            "student": type(self.student).__name__,
            "teacher": None if isinstance(teacher, NoTeacher) else type(teacher).__name__,
            "losses": list(self.losses),
            "parameters": sum(p.numel() for p in self.student.parameters()),
        }

    @property
    def skips_parameters(self) -> bool:
        """Whether a step may leave parameters without gradient (nobody reads the logits, a weight that falls to 0)."""
        logits = any(mine == "@logits" for loss in self.terms.values() for mine, _ in loss.pairs)
        changing = any(callable(loss.weight) for loss in self.terms.values())
        # A gradient by the inputs knows no last bias; of several teachers some may be silent in a step.
        return not logits or changing or self._input_gradients or len(self.apart) > 0

    def side_learners(self) -> dict[str, SideLearner]:
        """Everything inside the losses that learns with an optimiser of its own."""
        modules = (*self.losses.named_modules(), *self.apart.named_modules())
        return {n: m for n, m in modules if isinstance(m, SideLearner)}

    @property
    def _input_gradients(self) -> bool:
        return any(loss.needs_input_gradients for loss in self.terms.values())

    def _recall(self, name: str, loss: Loss) -> None:
        if name in self._learned:
            state, beside = self._learned.pop(name)
            try:
                loss.load_state_dict(state)
                for n, module in loss.named_modules():
                    if isinstance(module, SideLearner):
                        module.load_own_state(beside[n])
            except (RuntimeError, KeyError) as error:
                raise ValueError(
                    f"{name} cannot go on with what it learned in an earlier stage: {' '.join(str(error).split())}"
                ) from error

    def _applying(self, lesson: Lesson) -> Iterator[tuple[str, Loss]]:
        for name, loss in self.terms.items():
            if lesson.teacher is not None or not loss.needs_teacher:
                yield name, self._of(name, lesson)

    def _of(self, name: str, lesson: Lesson) -> Loss:
        slot = f"{name}@{lesson.key}"
        return cast(Loss, self.apart[slot] if slot in self.apart else self.losses[name])

    def _apply(self, fn: Callable, recurse: bool = True) -> Distillation:
        super()._apply(fn, recurse)
        self.teacher.apply(lambda network: network._apply(fn))
        return self

    def _check_batch(self, batch: Batch) -> None:
        for name, inputs in (("student", batch.student), ("teacher", batch.teacher)):
            if not all(bool(torch.isfinite(t).all()) for t in inputs.tensors() if t.is_floating_point()):
                raise ValueError(f"inputs of the {name}: NaN or infinite values in the first batch")
        for loss in self.terms.values():
            if loss.needs_labels and batch.labels is None:
                raise ValueError(f"{loss.name} needs labels, and the batch has none (see tutelage.views.read_batch)")
            if loss.needs_ids and batch.ids is None:
                raise ValueError(
                    f"{loss.name} needs sample ids, and the batch has none: wrap the data set in tutelage.data.Indexed"
                )
            if len(batch) < loss.needs_samples:
                raise ValueError(
                    f"{loss.name} compares samples and needs at least {loss.needs_samples} in a batch; "
                    f"the first batch has {len(batch)}"
                )
            if loss.needs_teacher and isinstance(self.teacher, NoTeacher):
                raise ValueError(f"{loss.name} needs a teacher, and there is none")


def _owns(loss: Loss) -> bool:
    """Whether a loss makes something of its own when it is bound: a projector, a critic, a memory."""
    return type(loss).build is not Loss.build


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Run without gradients, and leave buffers, modes and random numbers as they were."""
    state = [(m, m.training) for module in modules for m in module.modules()]
    owners = [m for module in modules for m in module.modules()]
    buffers = [(m, n, b, None if b is None else b.clone()) for m in owners for n, b in m._buffers.items()]
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (a model may draw from them as well)
    with torch.random.fork_rng(cuda), torch.no_grad():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            for owner, name, buffer, value in buffers:
                # the forward pass may have put another tensor there
                setattr(owner, name, buffer if buffer is None or value is None else buffer.copy_(value))
            for module, training in state:
                module.training = training
