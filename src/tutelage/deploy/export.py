"""A model as one exported file, checked against PyTorch before it replaces anything."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutelage.console import say
from tutelage.deploy.calling import Example, batch_size_of, is_batched, resized
from tutelage.deploy.formats import executorch, format_of, onnx
from tutelage.deploy.formats.tracing import ExportError, beside_logits, tensors_of, unsupported
from tutelage.deploy.formats.writing import available, write
from tutelage.deploy.parity import compared, logits_of
from tutelage.deploy.running import open_exported
from tutelage.files import durable, naming, replacing, workplace, writable
from tutelage.views import move


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: The file.
        format: ``"onnx"``, ``"torch.export"``, ``"executorch"`` or ``"openvino"``.
        size_bytes: Its size, with that of the weights beside it: OpenVINO's .bin, ONNX's external data from 2 GB.
        max_abs_error: Largest absolute difference of a logit from the PyTorch model's.
        agreement: Share of predictions with the same most likely class as PyTorch, in [0, 1].
        samples: Rows that these two figures were taken from.
        quantized: Whether weights and activations are int8.
        opset: Version of ONNX's operators that the file uses; None for other formats.
        data: What these rows were: ``"example"``, ``"calibration"`` or ``"given"``; from the command line
            ``"random"`` or the name of the loaders.
    """

    path: Path
    format: str
    size_bytes: int
    max_abs_error: float
    agreement: float
    samples: int
    quantized: bool
    opset: int | None
    data: str


def export(
    model: nn.Module,
    example: Example,
    path: str | Path,
    *,
    quantize: Literal["int8"] | None = None,
    calibration: Iterable[Any] | None = None,
    data: Iterable[Any] | None = None,
    samples: int = 500,
    opset: int | None = None,
    dynamic_batch: bool = True,
    max_batch: int | None = None,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a model's logits as a file that its own runtime has been seen to compute alike.

    The ending chooses the format: ``.onnx``, ``.pt2`` (a ``torch.export`` archive), ``.pte`` (ExecuTorch, with the
    XNNPACK delegate) or ``.xml`` (OpenVINO, with its weights in a ``.bin`` beside it).

    The file is loaded and run on the processor before it replaces anything. The float file is compared with PyTorch
    on the example, where the batch is dynamic also on other numbers of its rows, and on ``data``. int8 is static:
    weights per channel, activations with ranges from the calibration batches; by onnxruntime for ``.onnx`` (QDQ) and
    ``.xml``, by torchao's PT2E for ``.pt2`` (linear layers and convolutions) and ``.pte`` (XNNPACK's quantiser).
    Its figures are reported without a tolerance. The model is left with the modes and buffers it came with.

    Args:
        model: The module. Of an output with ``logits`` (or a tuple) the logits are exported,
            half-precision ones as float32.
        example: A tensor, a tuple of positional arguments or a dict of keyword arguments. Tensors whose first
            dimension is the batch's become dynamic there; what is not a tensor is fixed in the file.
        path: The file to write. Its input names are the names of the arguments.
        quantize: ``"int8"``, or None for the model's own precision.
        calibration: Batches like the example. A longer tuple (with labels, as a data loader gives) is cut, further
            keys of a dict are ignored. Required for int8; otherwise it adds to the comparison.
        data: Batches in the same forms whose comparison is reported, best of the validation set; without them the
            calibration batches, and else the example.
        samples: Most rows of ``data`` to compare.
        opset: ONNX operator set, 18 by default; for ``.onnx`` only.
        dynamic_batch: Whether the file takes any number of samples.
        max_batch: Most samples in one call of a ``.pte`` file, whose memory is planned for them; 64 by default.
        tolerance: Largest accepted difference of a logit, absolute up to logits of one and relative to the largest
            logit beyond.

    Returns:
        What was written.

    Raises:
        ImportError: A package that writes or runs the format is not installed.
        ExportError: The format cannot hold the model; the message names the module and the operator.
        ParityError: The file computes something else.
        ValueError: An unknown ending or ``quantize``, int8 without calibration batches, or an option that the format
            does not have. After any error a file that was at ``path`` is untouched.
    """
    path = Path(path)
    kind = format_of(path)
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize is {quantize!r}: expected None or 'int8'")
    if opset is not None and kind != "onnx":
        raise ValueError(f"opset is {opset}: only .onnx files have one, not {path.suffix}")
    if max_batch is not None and (kind != "executorch" or not dynamic_batch):
        raise ValueError(f"max_batch is {max_batch}: only .pte files with a dynamic batch have such a bound")
    if max_batch is not None and max_batch < 2:
        raise ValueError(f"max_batch is {max_batch}: expected at least 2 (dynamic_batch=False fixes it)")
    if samples < 1:
        raise ValueError(f"samples is {samples}: expected at least 1")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected a file to write")
    writable(path.parent)
    with _quiet():
        available(kind, quantize is not None)
    model = _plain(model)
    example = move(example, torch.device("cpu"))
    rows = batch_size_of(example)
    calibrating = [_like(example, batch, "calibration") for batch in calibration or ()]
    if quantize and not calibrating:
        raise ValueError("quantize='int8' needs calibration: a few batches of typical inputs to take the ranges from")
    judging = list(_first(samples, (_like(example, batch, "data") for batch in data))) if data is not None else []
    if data is not None and not judging:
        raise ValueError("data is empty: there is nothing to compare")
    sizes = sorted({rows, 1, rows + 1}) if dynamic_batch else [rows]
    if kind == "executorch" and dynamic_batch:
        max_batch = max_batch or max(executorch.LARGEST, rows)
        sizes = sorted({*(size for size in sizes if size <= max_batch), max_batch})
    checks = [resized(example, n) for n in sizes]
    # A model that cannot be called so, or gives no logits, is better refused in its own words than the exporter's.
    logits_of(model, example)
    for check in checks:
        try:
            logits_of(model, check)
        except Exception as error:
            raise ExportError(
                f"the model takes {rows} samples but not {batch_size_of(check)} ({error}); "
                f"dynamic_batch=False exports it for {rows}"
            ) from error
    if left_out := beside_logits(model, example):
        say(f"{type(model).__name__}: the file has the logits alone, and not {', '.join(left_out)} of the output")

    # Everything happens in a folder beside the target: the name of external data is written into the file.
    with workplace(path) as folder:
        file = folder / path.name
        try:
            with _quiet(), naming(path):
                program = write(
                    kind,
                    model,
                    example,
                    file,
                    calibrating if quantize else [],
                    opset or onnx.OPSET,
                    dynamic_batch,
                    max_batch,
                )
        except (ImportError, TypeError, ValueError, OSError):
            raise
        except Exception as error:  # quantisers' and converters' errors have no base in common
            raise ExportError(f"{kind} failed: {' '.join(str(error).split())}") from error
        try:
            # ExecuTorch tells standard error, and only it, which operator failed.
            with (
                executorch.hushed() if kind == "executorch" else contextlib.nullcontext(),
                open_exported(file) as running,
            ):
                for batches in (checks, calibrating, judging):
                    if batches:  # the last of them is what is reported
                        parity = compared(running, model, batches, None if quantize else tolerance)
        except ExportError as error:
            raise (
                unsupported(program, " ".join(getattr(error, "__notes__", [])), f"{kind}'s runtime") or error
            ) from error.__cause__
        size = sum(f.stat().st_size for f in folder.iterdir())
        found = onnx.opset_of(file) if kind == "onnx" else None
        durable(folder)
        for extra in folder.iterdir():
            if extra != file:
                # Two files cannot be replaced in one moment. A process that is killed now leaves none rather than a
                # network with the other one's weights.
                path.unlink(missing_ok=True)
                os.replace(extra, path.with_name(extra.name))
        with replacing(path) as beside:
            os.replace(file, beside)
    data_name = "given" if judging else "calibration" if calibrating else "example"
    return Exported(
        path, kind, size, parity.max_abs_error, parity.agreement, parity.samples, quantize is not None, found, data_name
    )


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
    """:func:`export` to an ONNX file, whose name ends in ``.onnx``; the arguments are the same."""
    if Path(path).suffix.lower() != ".onnx":
        raise ValueError(f"{Path(path).name}: the name of an ONNX file ends in .onnx; export() writes other formats")
    return export(
        model,
        example,
        path,
        quantize=quantize,
        calibration=calibration,
        opset=opset,
        dynamic_batch=dynamic_batch,
        tolerance=tolerance,
    )


def _plain(model: nn.Module) -> nn.Module:
    """The model on the processor with weights in the usual order of memory: itself, if it is so.

    Both would otherwise stand in the file as constants; ExecuTorch refuses weights that are channels last.
    """
    weights = (*model.parameters(), *model.buffers())
    if all(w.device.type == "cpu" and (w.ndim < 4 or w.is_contiguous()) for w in weights):
        return model
    return copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)


def _first(samples: int, batches: Iterable[Any]) -> Iterator[Any]:
    """Batches until so many rows are reached; the last one is cut."""
    left = samples
    for batch in batches:
        rows = batch_size_of(batch)
        yield resized(batch, left) if rows > left else batch
        left -= rows
        if left <= 0:
            return


def _like(example: Example, batch: Any, field: str) -> Example:
    """A batch in the form of the example: without labels or further keys."""
    batch = move(batch, torch.device("cpu"))
    if isinstance(batch, Mapping):
        if not isinstance(example, Mapping):
            raise TypeError(f"a {field} batch is a dict, the example is not: both need the same form")
        missing = [key for key in example if key not in batch]
        if missing:
            raise KeyError(f"a {field} batch lacks {', '.join(map(repr, missing))}")
        found: Example = {key: batch[key] for key in example}
    elif isinstance(example, Mapping):
        raise TypeError(f"a {field} batch is a {type(batch).__name__}, the example a dict: both need the same form")
    elif isinstance(batch, Tensor):
        found = batch if isinstance(example, Tensor) else (batch,)
    elif isinstance(batch, tuple | list):
        found = batch[0] if isinstance(example, Tensor) else tuple(batch[: len(example)])
    else:
        raise TypeError(f"a {field} batch is a {type(batch).__name__}: expected a tensor, a tuple or a dict")
    _same_shapes(example, found, field)
    return found


def _same_shapes(example: Example, batch: Example, field: str) -> None:
    rows, others = batch_size_of(example), batch_size_of(batch)
    for one, other in zip(tensors_of(example), tensors_of(batch), strict=False):
        if is_batched(one, rows) and is_batched(other, others) and one.shape[1:] != other.shape[1:]:
            raise ValueError(
                f"a {field} batch has samples of shape {tuple(other.shape[1:])}, the example {tuple(one.shape[1:])}"
            )


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
