"""How measuring and exporting call a model: example inputs, batch sizes, and leaving it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tutelage.errors import nearest
from tutelage.evaluation import evaluating
from tutelage.views import Inputs, move

Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def as_call(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call that an example stands for.

    A tensor is the only argument, a tuple or list the positional ones, a mapping the keyword ones.

    Raises:
        TypeError: The example is none of these.

    >>> as_call({"a": 1})
    ((), {'a': 1})
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    raise TypeError(
        f"example is a {type(example).__name__}: expected a tensor, a tuple of positional arguments "
        "or a dict of keyword arguments"
    )


def batch_size_of(example: Example) -> int:
    """Rows of the first tensor with a dimension.

    Raises:
        ValueError: There is no such tensor, or it has no rows.

    >>> batch_size_of((torch.zeros(4, 3), 7))
    4
    """
    for leaf in pytree.tree_leaves(as_call(example)):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            if leaf.shape[0] == 0:
                raise ValueError(f"example has a tensor of shape {tuple(leaf.shape)}: it needs a row at least")
            return leaf.shape[0]
    raise ValueError("example has no tensor with a batch dimension")


def is_batched(leaf: Any, rows: int) -> bool:
    """Whether a leaf of an example whose batch has ``rows`` rows has one of them per sample.

    >>> is_batched(torch.zeros(4, 3), 4), is_batched(torch.zeros(3), 4), is_batched("x", 4)
    (True, False, False)
    """
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows


def resized(example: Any, rows: int) -> Any:
    """The example with another number of rows: cut, or its rows repeated in turn.

    >>> resized(torch.arange(3), 5).tolist()
    [0, 1, 2, 0, 1]
    """
    if rows < 1:
        raise ValueError(f"batch_size is {rows}: expected at least 1")
    before = batch_size_of(example)

    def change(leaf: Any) -> Any:
        if not is_batched(leaf, before):
            return leaf
        return leaf[torch.arange(rows, device=leaf.device) % before]

    return pytree.tree_map(change, dict(example) if isinstance(example, Mapping) else example)


def in_parts(batch: Any, smallest: int, largest: int | None) -> Iterator[tuple[Any, int]]:
    """A batch in parts that a file takes, each with the number of its rows that count: the rest fills it up."""
    rows = batch_size_of(batch)
    if largest is None or rows <= largest:
        yield resized(batch, smallest) if rows < smallest else batch, rows
        return
    for start in range(0, rows, largest):
        part = pytree.tree_map(lambda x, s=start: x[s : s + largest] if is_batched(x, rows) else x, batch)
        yield from in_parts(part, smallest, largest)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the processor if it has none.

    >>> device_of(nn.Linear(1, 1))
    device(type='cpu')
    """
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def taken_by(model: nn.Module, example: Example) -> Any:
    """The arguments that a network takes of an example, which may have further named ones, on its device.

    >>> taken_by(nn.Linear(2, 1), {"input": torch.ones(1, 2), "mask": None})
    {'input': tensor([[1., 1.]])}
    """
    caught: list[Inputs] = []
    inputs = Inputs(*as_call(move(example, device_of(model))))
    handle = model.register_forward_pre_hook(lambda _, *given: caught.append(Inputs(*given)), with_kwargs=True)
    try:
        with evaluating(model):
            inputs.call(model)
    finally:
        handle.remove()
    return caught[0].args or caught[0].kwargs


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model evaluating inside the block; every module's mode and every buffer as before after it.

    Buffers are kept because some modules write to theirs in eval mode too (counters, caches, observers).

    >>> model = nn.BatchNorm1d(2)
    >>> with undisturbed(model):
    ...     _ = model.running_mean.add_(1)
    >>> model.running_mean.tolist()
    [0.0, 0.0]
    """
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        with evaluating(model):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, copy in buffers:
                if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                    buffer.copy_(copy)
                module._buffers[name] = buffer


def feeds(names: list[str], example: Example) -> dict[str, np.ndarray]:
    """The example as exported files take it: arrays by input name.

    Keywords go by name, and those that the file does not take are left out; positions go in order, and what comes
    after the last input (labels, as a data loader gives them) is left out.

    Raises:
        KeyError: A keyword that the file needs is missing.
        ValueError: There are fewer positions than inputs.

    >>> feeds(["x"], torch.ones(2))
    {'x': array([1., 1.], dtype=float32)}
    """
    args, kwargs = as_call(example)
    if kwargs:
        for name in names:
            if name not in kwargs:
                raise KeyError(f"input {name!r} is missing{nearest(name, kwargs)}")
        return {name: array(kwargs[name]) for name in names}
    tensors = [arg for arg in args if isinstance(arg, Tensor | np.ndarray)]
    if len(tensors) < len(names):
        raise ValueError(f"{len(tensors)} tensors for {len(names)} inputs ({', '.join(names)})")
    return {name: array(tensor) for name, tensor in zip(names, tensors, strict=False)}


def array(tensor: Any) -> np.ndarray:
    """A tensor as a contiguous array on the processor.

    Raises:
        TypeError: It is bfloat16, which NumPy does not have.

    >>> array(torch.ones(2, 3).T).shape
    (3, 2)
    """
    if isinstance(tensor, Tensor):
        if tensor.dtype == torch.bfloat16:
            raise TypeError("an input is bfloat16, which exported files cannot be fed: convert it with .float()")
        tensor = tensor.detach().cpu().numpy()
    return np.ascontiguousarray(tensor)
