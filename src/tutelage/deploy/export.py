"""A model as one ONNX file, checked against PyTorch before it replaces anything."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tutelage.deploy.calling import (
    Example,
    as_call,
    batch_size_of,
    device_of,
    feeds,
    is_batched,
    resized,
    undisturbed,
)
from tutelage.errors import require
from tutelage.files import replacing
from tutelage.record import Record
from tutelage.views import move


class ParityError(ValueError):
    """The exported file does not say what the PyTorch model says."""


@dataclass(frozen=True)
class Parity:
    """How far an ONNX file is from the model it came from.

    Attributes:
        max_abs_error: Largest absolute difference between two logits.
        max_abs_logit: Largest absolute logit of the PyTorch model, to see the error against.
        agreement: Share of predictions with the same most likely class, in [0, 1].
        samples: Rows that were compared.
    """

    max_abs_error: float
    max_abs_logit: float
    agreement: float
    samples: int


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was written and checked.

    Attributes:
        path: The file.
        size_bytes: Its size, with the external data where a model of 2 GB or more needs them.
        max_abs_error: Largest absolute difference of a logit from the PyTorch model's.
        agreement: Share of predictions with the same most likely class as PyTorch, in [0, 1].
        quantized: Whether weights and activations are int8.
    """

    path: Path
    size_bytes: int
    max_abs_error: float
    agreement: float
    quantized: bool


def export_onnx(
    model: nn.Module,
    example: Example,
    path: str | Path,
    *,
    quantize: Literal["int8"] | None = None,
    calibration: Iterable[Any] | None = None,
    opset: int = 18,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a model's logits as an ONNX file that onnxruntime has been seen to compute alike.

    The float file is compared with PyTorch on the example and, where the batch is dynamic, on other numbers of its
    rows. int8 is onnxruntime's static quantisation in QDQ form with int8 weights per channel and int8 activations,
    whose ranges come from the calibration batches; its figures are those of the calibration batches, without a
    tolerance. The model is left with the modes and buffers it came with.

    Args:
        model: The module. Of an output with ``logits`` (or a tuple) the logits are exported,
            half-precision ones as float32.
        example: A tensor, a tuple of positional arguments or a dict of keyword arguments. Tensors whose first
            dimension is the batch's become dynamic there; what is not a tensor is fixed in the file.
        path: The file to write. Its input names are the names of the arguments, its output is ``logits``.
        quantize: ``"int8"``, or None for the model's own precision.
        calibration: Batches like the example. A longer tuple (with labels, as a data loader gives) is cut, further
            keys of a dict are ignored. Required for int8; otherwise it adds to the comparison.
        opset: ONNX operator set.
        dynamic_batch: Whether the file takes any number of samples.
        tolerance: Largest accepted difference of a logit, absolute up to logits of one and relative to the largest
            logit beyond.

    Returns:
        What was written.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ParityError: The file computes something else; a file that was at ``path`` is untouched.
        ValueError: int8 without calibration batches, or an unknown ``quantize``.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra="export")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize is {quantize!r}: expected None or 'int8'")
    path = Path(path)
    rows = batch_size_of(example)
    batches = [_like(example, batch) for batch in calibration or ()]
    if quantize and not batches:
        raise ValueError("quantize='int8' needs calibration: a few batches of typical inputs to take the ranges from")
    sizes = sorted({rows, 1, rows + 1}) if dynamic_batch else [rows]
    checks = [resized(example, n) for n in sizes]
    # A model that cannot be called so, or gives no logits, is better refused in its own words than the exporter's.
    _expected(model, example)

    path.parent.mkdir(parents=True, exist_ok=True)
    # Everything happens in a folder beside the target: the name of external data is written into the file.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        file = Path(folder) / path.name
        with _quiet():
            _write(model, example, file, opset, dynamic_batch)
        parity = check_onnx(file, model, checks + ([] if quantize else batches), tolerance=tolerance)
        if quantize:
            with _quiet():
                _quantize(file, batches)
            check_onnx(file, model, checks)
            parity = check_onnx(file, model, batches)
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
        for extra in Path(folder).iterdir():
            if extra != file:
                os.replace(extra, path.with_name(extra.name))
        with replacing(path) as beside:
            os.replace(file, beside)
    return Exported(path, size, parity.max_abs_error, parity.agreement, quantize is not None)


def check_onnx(
    path: str | Path, model: nn.Module, inputs: Iterable[Any] | Tensor, *, tolerance: float | None = None
) -> Parity:
    """Compare an ONNX file in onnxruntime with the PyTorch model in eval mode.

    Args:
        path: The file.
        model: The module it should compute; left with the modes and buffers it came with.
        inputs: A batch (a tensor, or a dict of keyword arguments), or an iterable of batches.
        tolerance: If given, the largest accepted difference of a logit, absolute up to logits of one and relative
            to the largest logit beyond.

    Returns:
        The largest difference, and how often the most likely class is the same. Classes lie in dimension 1 of
        maps (four dimensions or more) and in the last one otherwise; a single logit is compared by its sign.

    Raises:
        ParityError: The shapes differ, a value is not finite in one of them only, or the difference is beyond
            ``tolerance``.
        ValueError: There is nothing to compare.
    """
    ort = require("onnxruntime", extra="export")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    error = largest = 0.0
    same = predictions = samples = 0
    for batch in [inputs] if isinstance(inputs, Tensor | Mapping) else inputs:
        expected = _expected(model, batch)
        found = session.run(None, feeds(names, batch))[0].astype(np.float32)
        if found.shape != expected.shape:
            raise ParityError(f"the file gives logits of shape {found.shape}, PyTorch {expected.shape}")
        unlike = ~(np.isfinite(found) & np.isfinite(expected)) & (found != expected)
        unlike &= ~(np.isnan(found) & np.isnan(expected))
        if unlike.any():
            raise ParityError(f"{int(unlike.sum())} logits are not finite in the file or in PyTorch only")
        both = np.isfinite(expected)
        error = max(error, float(np.abs(found - expected, where=both, out=np.zeros_like(found)).max(initial=0)))
        largest = max(largest, float(np.abs(expected[both]).max(initial=0)))
        agree = _classes(found) == _classes(expected)
        same, predictions, samples = same + int(agree.sum()), predictions + agree.size, samples + len(expected)
    if not predictions:
        raise ValueError("inputs is empty: there is nothing to compare")
    parity = Parity(error, largest, same / predictions, samples)
    if tolerance is not None and error > tolerance * max(1.0, largest):
        raise ParityError(
            f"the largest difference between the file's logits and PyTorch's is {error:.3g} "
            f"(largest logit {largest:.3g}, {parity.agreement:.1%} the same class), beyond the tolerance {tolerance:g}"
        )
    return parity


def _expected(model: nn.Module, batch: Any) -> np.ndarray:
    args, kwargs = as_call(move(batch, device_of(model)))
    with undisturbed(model), torch.inference_mode():
        return Record(model(*args, **kwargs)).logits.float().cpu().numpy()


def _classes(logits: np.ndarray) -> np.ndarray:
    axis = 1 if logits.ndim >= 4 else -1
    return logits > 0 if logits.shape[axis] == 1 else logits.argmax(axis)


class _Logits(nn.Module):
    """The model as a function of its tensors alone, giving its logits."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self.leaves, self.spec = pytree.tree_flatten(as_call(example))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Tensor:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return Record(self.model(*args, **kwargs)).logits


def _input_names(model: nn.Module, example: Example) -> list[str]:
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


def _write(model: nn.Module, example: Example, file: Path, opset: int, dynamic_batch: bool) -> None:
    rows = batch_size_of(example)
    if dynamic_batch and rows == 1:
        # A size of one is specialised by torch.export: it would be fixed in the file.
        rows, example = 2, resized(example, 2)
    example = move(example, device_of(model))
    tensors = [leaf for leaf in pytree.tree_leaves(as_call(example)) if isinstance(leaf, Tensor)]
    dynamic = tuple({0: "batch"} if is_batched(t, rows) else None for t in tensors)
    with undisturbed(model):
        program = torch.onnx.export(
            _Logits(model, example),
            tuple(tensors),
            dynamo=True,
            input_names=_input_names(model, example),
            output_names=["logits"],
            opset_version=opset,
            dynamic_shapes={"tensors": dynamic} if dynamic_batch else None,
            verbose=False,
        )
    assert program is not None
    _forget_origins(program.model)
    # None keeps the weights inside the file unless they exceed what a protobuf can hold.
    program.save(file, external_data=None)


def _forget_origins(model: Any) -> None:
    """Remove the exporter's notes: stack traces with the paths of the machine, larger than a small model."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for thing in (graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
            thing.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


def _like(example: Example, batch: Any) -> Example:
    """A calibration batch in the form of the example: without labels or further keys."""
    if isinstance(batch, Mapping):
        if not isinstance(example, Mapping):
            raise TypeError("a calibration batch is a dict, the example is not: both need the same form")
        missing = [key for key in example if key not in batch]
        if missing:
            raise KeyError(f"a calibration batch lacks {', '.join(map(repr, missing))}")
        return {key: batch[key] for key in example}
    if isinstance(example, Mapping):
        raise TypeError(f"a calibration batch is a {type(batch).__name__}, the example a dict: both need the same form")
    if isinstance(batch, Tensor):
        return batch if isinstance(example, Tensor) else (batch,)
    if isinstance(batch, tuple | list):
        return batch[0] if isinstance(example, Tensor) else tuple(batch[: len(example)])
    raise TypeError(f"a calibration batch is a {type(batch).__name__}: expected a tensor, a tuple or a dict")


def _quantize(file: Path, batches: list[Any]) -> None:
    """Replace a float file by its int8 form."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [i.name for i in onnx.load(str(file), load_external_data=False).graph.input]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else feeds(names, batch)

    with tempfile.TemporaryDirectory() as folder:
        prepared, done = Path(folder) / "prepared.onnx", Path(folder) / file.name
        quant_pre_process(str(file), str(prepared))
        quantize_static(
            str(prepared),
            str(done),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        file.write_bytes(done.read_bytes())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No chatter from exporter and quantiser; if they fail, what they said goes with the error."""
    said = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if said.getvalue().strip():
            error.add_note(said.getvalue().strip())
        raise
    finally:
        logging.disable(before)
