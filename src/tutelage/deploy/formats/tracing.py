"""A model as a traced program of its tensors alone, from which every format is written."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from tutelage.deploy.calling import Example, as_call, batch_size_of, is_batched, resized, undisturbed
from tutelage.record import Record


class ExportError(ValueError):
    """A model, or a part of it, cannot be written in a format; the message names the part."""


class Logits(nn.Module):
    """The model as a function of its tensors alone, by name or in order, giving its logits."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self.names = input_names(model, example)
        self.leaves, self.spec = pytree.tree_flatten(as_call(example))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

        def forward(*tensors: Tensor, **named: Tensor) -> Tensor:
            return self.logits([*tensors, *(named[name] for name in self.names[len(tensors) :])])

        # torch.export names the inputs after the signature.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in self.names])  # type: ignore[attr-defined]
        self.forward = forward

    def output(self, tensors: list[Tensor]) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)

    def logits(self, tensors: list[Tensor]) -> Tensor:
        return Record(self.output(tensors)).logits


def beside_logits(model: nn.Module, example: Example) -> list[str]:
    """The names of the tensors that a model's output has beside its logits, which no file will have.

    >>> from tutelage.models import SmallDetector
    >>> beside_logits(SmallDetector(width=4), torch.zeros(2, 1, 48, 48))
    ['boxes']
    >>> beside_logits(nn.Linear(2, 2), torch.ones(1, 2))
    []
    """
    with undisturbed(model), torch.no_grad():
        output = Logits(model, example).output(tensors_of(example))
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        output = output._asdict()
    elif dataclasses.is_dataclass(output) and not isinstance(output, type | Mapping):
        output = vars(output)
    named = output.items() if isinstance(output, Mapping) else ()
    return [name for name, value in named if isinstance(value, Tensor) and name not in ("logits", "loss")]


def input_names(model: nn.Module, example: Example) -> list[str]:
    """The names of an example's tensors: those of the arguments of ``forward``, numbered inside a structure.

    >>> input_names(nn.Bilinear(1, 1, 1), (torch.ones(1, 1), torch.ones(1, 1)))
    ['input1', 'input2']
    """
    args, kwargs = as_call(example)
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = {name: value for name, value in itertools.zip_longest(positional[: len(args)], args) if name}
    if len(named) < len(args):
        named = {f"input_{i}": value for i, value in enumerate(args)}
    names: list[str] = []
    for name, value in {**named, **kwargs}.items():
        count = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
        names += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
    return names


def tensors_of(example: Example) -> list[Tensor]:
    """The tensors of an example, in the order of the file's inputs.

    >>> [t.shape[0] for t in tensors_of({"x": torch.ones(2), "flag": True, "y": (torch.ones(3),)})]
    [2, 3]
    """
    return [leaf for leaf in pytree.tree_leaves(as_call(example)) if isinstance(leaf, Tensor)]


def trace(
    model: nn.Module,
    example: Example,
    *,
    dynamic_batch: bool = True,
    largest: int | None = None,
    keywords: bool = False,
) -> ExportedProgram:
    """The model in eval mode as a program of ``torch.export``, whose inputs have the names of its arguments.

    Args:
        model: the module, left with the modes and buffers it came with.
        example: on the model's device; what is not a tensor is fixed in the program.
        dynamic_batch: whether the first dimension of the tensors that have one row a sample is free.
        largest: most samples, where the format wants a bound.
        keywords: whether the program takes a dict's tensors by name, as the model does, instead of in order.

    Raises:
        ExportError: ``torch.export`` cannot follow the model.
    """
    dimensions = _dimensions(example, dynamic_batch, largest)
    if dynamic_batch:
        # One row is specialised by torch.export; below the bound ExecuTorch would plan for the example's rows.
        example = resized(example, largest or max(2, batch_size_of(example)))
    wrapped = Logits(model, example)
    tensors = tensors_of(example)
    with undisturbed(model):
        return exported(wrapped, wrapped.names, tensors, dimensions, keywords)


def exported(
    module: nn.Module, names: list[str], tensors: list[Tensor], dimensions: list[Any], keywords: bool
) -> ExportedProgram:
    """``torch.export.export`` with errors that name the module."""
    by_name = keywords and len(names) > 0
    # The order of an example's memory (channels last) would become what the file expects of everybody's.
    tensors = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    try:
        return torch.export.export(
            module,
            () if by_name else tuple(tensors),
            dict(zip(names, tensors, strict=True)) if by_name else None,
            dynamic_shapes=dict(zip(names, dimensions, strict=True)) if any(dimensions) else None,
        )
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "onstraints violated" in said:
            said = "it fixes the number of samples; dynamic_batch=False exports it so"
        raise ExportError(f"{_innermost(module, error.__traceback__)}: torch.export cannot trace it: {said}") from error


def _dimensions(example: Example, dynamic_batch: bool, largest: int | None) -> list[Any]:
    """For each tensor what its shape leaves free, in the form of ``torch.export``."""
    rows = batch_size_of(example)
    batch = Dim("batch", min=1, max=largest)
    return [{0: batch} if dynamic_batch and is_batched(tensor, rows) else None for tensor in tensors_of(example)]


def dimensions_of(program: ExportedProgram) -> list[Any]:
    """What a program's inputs leave free, to trace a changed form of it alike."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found: list[Any] = []
    for name in program.graph_signature.user_inputs:
        value = nodes[str(name)].meta["val"]
        if value.ndim and not isinstance(value.shape[0], int):
            upper = program.range_constraints[value.shape[0].node.expr].upper
            found.append({0: Dim("batch", min=1, max=int(upper) if upper.is_Integer else None)})
        else:
            found.append(None)
    return found


def forget_origins(program: ExportedProgram) -> None:
    """Remove what a program notes about its making, *in place*: stack traces with local paths, and the example.

    What remains of each value is its shape and type.
    """
    program._example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.meta.clear()
            for node in module.graph.nodes:
                node.meta = {key: value for key, value in node.meta.items() if key == "val"}


def unsupported(program: ExportedProgram, said: str, by: str) -> ExportError | None:
    """The error that names the modules of the operators which a converter's message names; None if it names none.

    Args:
        program: what was to be converted.
        said: the converter's message.
        by: what does not support them: ``"ONNX opset 18"``.
    """
    operators = dict.fromkeys(re.findall(r"\b(?:aten|prims|quantized_decomposed)(?:\.|::)(\w+)", said))
    for candidate in (program, None):
        # An operator that the converter met may only arise when others are taken apart.
        candidate = candidate or program.run_decompositions()
        sentences = []
        for operator in operators:
            nodes = [n for n in candidate.graph.nodes if n.op == "call_function" and _operator(n) == operator]
            if nodes:
                places = ", ".join(dict.fromkeys(_place(node) for node in nodes))
                sentences.append(f"{places}: operator aten::{operator} is not supported by {by}")
        if sentences:
            return ExportError("; ".join(sentences))
    return None


def _operator(node: torch.fx.Node) -> str:
    return getattr(node.target, "_opname", "")


def _place(node: torch.fx.Node) -> str:
    """The address of the module in which a node stands."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    name = re.sub(r"@\d+$", "", str(path)).removeprefix("model").removeprefix(".")
    kind = kind if isinstance(kind, str) else getattr(kind, "__qualname__", "")
    return name or f"the model itself ({kind.rpartition('.')[2]})"


def _innermost(module: nn.Module, traceback: TracebackType | None) -> str:
    """The address of the module whose code was running when an error arose."""
    model = getattr(module, "model", module)
    names = {id(part): name for name, part in model.named_modules()}
    found = f"the model itself ({type(model).__name__})"
    while traceback is not None:
        part = traceback.tb_frame.f_locals.get("self")
        if isinstance(part, nn.Module) and names.get(id(part)):
            found = names[id(part)]
        traceback = traceback.tb_next
    return found


def chain(error: BaseException) -> Iterable[str]:
    """What an error and its causes say.

    >>> list(chain(ValueError("a")))
    ['a']
    """
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
