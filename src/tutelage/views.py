"""The views role: what the student and the teacher each see of a batch."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.errors import nearest

LABELS = ("labels", "label", "targets", "target", "y")
IDS = ("ids", "id", "index", "indices", "idx", "sample_ids")
UNLABELLED = -100
"""The label of a sample (or token) that has none; supervised losses pass over it."""


@lru_cache(maxsize=256)
def _accepted(forward: Callable) -> frozenset[str] | None:
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward pass.

    >>> Inputs((torch.ones(2, 4),)).call(nn.Linear(4, 3)).shape
    torch.Size([2, 3])
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        """Run the model. Of named inputs it is given those that its ``forward`` knows (teacher and student may know
        different ones); a single named input that it does not know is given by position."""
        if not self.kwargs:
            return model(*self.args)
        # A compiled model's class takes anything; its instance's forward is the original's.
        accepted = _accepted(model.forward if "forward" in vars(model) else type(model).forward)
        kwargs = self.kwargs if accepted is None else {k: v for k, v in self.kwargs.items() if k in accepted}
        if kwargs or self.args:
            return model(*self.args, **kwargs)
        if len(self.kwargs) == 1:
            return model(*self.kwargs.values())
        raise ValueError(
            f"{type(model).__name__}.forward knows none of the batch's fields {sorted(self.kwargs)}; "
            f"it takes {sorted((accepted or frozenset()) - {'self'})}"
        )

    def tensors(self) -> list[Tensor]:
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with ``change`` applied to every floating-point tensor.

        >>> Inputs((torch.ones(1),)).map(lambda x: 2 * x).args[0]
        tensor([2.])
        """

        return self.each(lambda x: change(x) if x.is_floating_point() else x)

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with ``change`` applied to every tensor.

        >>> Inputs((torch.ones(1, dtype=torch.long),), {"scale": 2}).each(lambda x: x + 1)
        Inputs(args=(tensor([2]),), kwargs={'scale': 2})
        """

        def apply(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Inputs(tuple(apply(a) for a in self.args), {k: apply(v) for k, v in self.kwargs.items()})


@dataclass(frozen=True)
class Replay:
    """Which of its augmentations each sample of a batch shows, where these are a function of numbers alone.

    Args:
        view: (B,) integers from 0 to ``views`` − 1.
        views: how many views of a sample there are.
        seed: of the augmentation.
    """

    view: Tensor
    views: int
    seed: int


@dataclass
class Batch:
    """One batch as the two models and the losses see it.

    Args:
        student: what the student is called with.
        teacher: what the teacher is called with.
        labels: of any shape that the task's loss takes; :data:`UNLABELLED` where there is none.
        ids: (B,) integers, the samples' numbers in the training set, for losses that remember samples.
        progress: the part of the training that is done, 0 to 1.
        population: how many samples the training set has, if that is known (only when binding).
        differentiable: whether a loss derives outputs with respect to the inputs, which then require gradients.
        replay: which augmentation each sample shows, if the data can show it again (:mod:`tutelage.data.replayed`).
    """

    student: Inputs
    teacher: Inputs
    labels: Tensor | None = None
    ids: Tensor | None = None
    progress: float = 0.0
    population: int | None = None
    differentiable: bool = False
    replay: Replay | None = None

    def with_gradients(self) -> Batch:
        """The same batch with inputs of its own that require gradients.

        >>> batch = read_batch(torch.ones(2, 4)).with_gradients()
        >>> batch.student.args[0].requires_grad, batch.student.args[0] is batch.teacher.args[0]
        (True, False)
        """

        def leaf(x: Tensor) -> Tensor:
            return x.detach().clone().requires_grad_()

        return replace(self, student=self.student.map(leaf), teacher=self.teacher.map(leaf), differentiable=True)

    def __len__(self) -> int:
        """The number of samples."""
        for value in (*self.student.tensors(), *self.teacher.tensors()):
            return value.shape[0]
        return 0 if self.labels is None else self.labels.shape[0]


def read_batch(raw: Any) -> Batch:
    """Read what a loader gave: a tensor, ``(inputs[, labels[, ids]])``, a mapping, a dataclass or a named tuple.

    In mappings and dataclasses the labels are called one of ``labels, label, targets, target, y``, the sample ids one
    of ``ids, id, index, indices, idx, sample_ids``, and everything else is given to the models by name. ``inputs``
    inside a tuple may be a tensor, or a mapping of the models' named arguments.

    Raises:
        TypeError: nothing of this kind.

    >>> batch = read_batch((torch.ones(2, 4), torch.tensor([0, 1])))
    >>> len(batch), batch.labels
    (2, tensor([0, 1]))
    >>> read_batch({"x": torch.ones(3, 4), "target": torch.zeros(3)}).student.kwargs.keys()
    dict_keys(['x'])
    """
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Tensor):
        return _same(Inputs((raw,)))
    if dataclasses.is_dataclass(raw) and not isinstance(raw, type | Mapping):
        raw = {f.name: getattr(raw, f.name) for f in dataclasses.fields(raw)}
    elif isinstance(raw, tuple) and hasattr(raw, "_asdict"):
        raw = raw._asdict()
    if isinstance(raw, Mapping):
        named = {k: v for k, v in raw.items() if v is not None}
        labels = next((named.pop(k) for k in LABELS if k in named), None)
        ids = next((named.pop(k) for k in IDS if k in named), None)
        return _same(Inputs((), named), labels, ids)
    if isinstance(raw, tuple | list) and 1 <= len(raw) <= 3:
        inputs, labels, ids = (*raw, None, None, None)[:3]
        if isinstance(inputs, Mapping):
            return _same(Inputs((), dict(inputs)), labels, ids)
        if isinstance(inputs, Tensor):
            return _same(Inputs((inputs,)), labels, ids)
    what = f"{type(raw).__name__} of {len(raw)}" if isinstance(raw, tuple | list) else type(raw).__name__
    raise TypeError(
        f"batch: cannot read a {what}; expected a tensor, (inputs[, labels[, ids]]), a mapping or a dataclass"
    )


def _same(inputs: Inputs, labels: Tensor | None = None, ids: Tensor | None = None) -> Batch:
    return Batch(inputs, inputs, labels, ids)


def example_inputs(example: Tensor | Mapping[str, Any] | Sequence[int], model: nn.Module) -> Inputs:
    """What a model is called with, from a few inputs as a loader gives them or the shape of one without the batch axis.

    >>> example_inputs((3, 32, 32), nn.Linear(1, 1)).args[0].shape
    torch.Size([2, 3, 32, 32])
    """
    if isinstance(example, Sequence) and all(isinstance(n, int) for n in example):
        parameter = next(model.parameters())
        return Inputs((torch.zeros(2, *example, device=parameter.device, dtype=parameter.dtype),))
    return read_batch(example).student


def move(raw: Any, device: torch.device | str) -> Any:
    """A batch of any kind that :func:`read_batch` reads, on another device."""
    if isinstance(raw, Tensor):
        # Towards the processor, a copy that is not waited for may be read before it is there.
        return raw.to(device, non_blocking=torch.device(device).type != "cpu")
    if isinstance(raw, Inputs):
        return Inputs(move(raw.args, device), move(raw.kwargs, device))
    if dataclasses.is_dataclass(raw) and not isinstance(raw, type | Mapping):
        return replace(raw, **{f.name: move(getattr(raw, f.name), device) for f in dataclasses.fields(raw)})
    if isinstance(raw, Mapping):
        return {k: move(v, device) for k, v in raw.items()}
    if isinstance(raw, tuple) and hasattr(raw, "_fields"):
        return type(raw)(*(move(v, device) for v in raw))
    if isinstance(raw, tuple | list):
        return type(raw)(move(v, device) for v in raw)
    return raw


class SameView:
    """Both see the batch as it is."""

    def __call__(self, raw: Any) -> Batch:
        return read_batch(raw)


def judging(views: Callable[[Any], Batch] | None) -> Callable[[Any], Batch]:
    """The view under which a model is judged, which is the one it learns with unless that has another in ``judging``.

    A view that distorts batches so that they teach something has; one that says what a model will be given has not.

    >>> type(judging(None)).__name__
    'SameView'
    """
    return getattr(views, "judging", views) or SameView()


class Paired:
    """Cross-modal pairs: the student sees one field of a batch, the teacher another.

    Args:
        student: the field of the batch (a mapping or dataclass) that the student is given.
        teacher: the field that the teacher is given.

    Raises:
        ValueError: the batch lacks a field.

    >>> views = Paired(student="depth", teacher="rgb")
    >>> batch = views({"rgb": torch.ones(2, 3), "depth": torch.zeros(2, 1), "label": torch.tensor([0, 1])})
    >>> batch.student.args[0].shape, batch.teacher.args[0].shape
    (torch.Size([2, 1]), torch.Size([2, 3]))
    """

    def __init__(self, student: str, teacher: str):
        self.student, self.teacher = student, teacher

    def __call__(self, raw: Any) -> Batch:
        batch = read_batch(raw)
        named = batch.student.kwargs
        for side, name in (("student", self.student), ("teacher", self.teacher)):
            if name not in named:
                raise ValueError(f"views.{side}: the batch has no field {name!r}{nearest(name, named)}")
        return replace(batch, student=Inputs((named[self.student],)), teacher=Inputs((named[self.teacher],)))


class Altered:
    """Each side sees the batch through a function of its own: noise, grey, a stronger augmentation.

    Args:
        student: applied to every floating-point input of the student; ``None`` leaves it.
        teacher: the same for the teacher.

    >>> batch = Altered(student=lambda x: x * 0)((torch.ones(2, 3), torch.tensor([0, 1])))
    >>> batch.student.args[0].sum(), batch.teacher.args[0].sum()
    (tensor(0.), tensor(6.))
    """

    def __init__(
        self,
        student: Callable[[Tensor], Tensor] | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ):
        self.student, self.teacher = student, teacher

    def __call__(self, raw: Any) -> Batch:
        batch = read_batch(raw)
        return replace(
            batch,
            student=batch.student.map(self.student) if self.student else batch.student,
            teacher=batch.teacher.map(self.teacher) if self.teacher else batch.teacher,
        )
