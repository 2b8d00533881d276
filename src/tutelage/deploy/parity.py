"""An exported file against the PyTorch model that it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.deploy.calling import as_call, device_of, feeds, in_parts, undisturbed
from tutelage.deploy.formats.tracing import ExportError
from tutelage.deploy.running import Running, open_exported
from tutelage.record import Record
from tutelage.views import move


class ParityError(ValueError):
    """The exported file does not say what the PyTorch model says."""


@dataclass(frozen=True)
class Parity:
    """How far a file is from the model it came from.

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


def check_exported(
    path: str | Path, model: nn.Module, inputs: Iterable[Any] | Tensor, *, tolerance: float | None = None
) -> Parity:
    """Compare an exported file in its own runtime with the PyTorch model in eval mode.

    Args:
        path: The file (.onnx, .pt2, .pte, .xml).
        model: The module it should compute; left with the modes and buffers it came with.
        inputs: A batch (a tensor, or a dict of keyword arguments), or an iterable of batches. Batches that are too
            large for the file are given to it in parts.
        tolerance: If given, the largest accepted difference of a logit, absolute up to logits of one and relative
            to the largest logit beyond.

    Returns:
        The largest difference, and how often the most likely class is the same. Classes lie in dimension 1 of
        maps (four dimensions or more) and in the last one otherwise; a single logit is compared by its sign.

    Raises:
        ParityError: The shapes differ, a value is not finite in one of them only, or the difference is beyond
            ``tolerance``.
        ValueError: There is nothing to compare, or the file cannot be loaded.
    """
    with open_exported(path) as running:
        return compared(running, model, [inputs] if isinstance(inputs, Tensor | Mapping) else inputs, tolerance)


def check_onnx(
    path: str | Path, model: nn.Module, inputs: Iterable[Any] | Tensor, *, tolerance: float | None = None
) -> Parity:
    """:func:`check_exported` of an ONNX file."""
    return check_exported(path, model, inputs, tolerance=tolerance)


def compared(running: Running, model: nn.Module, batches: Iterable[Any], tolerance: float | None) -> Parity:
    """:func:`check_exported` of a file that is open, on an iterable of batches."""
    error = largest = 0.0
    same = predictions = samples = 0
    for whole in batches:
        for batch, rows in in_parts(whole, *running.batch):
            expected = logits_of(model, batch)[:rows]
            found = _found(running, batch)[:rows].astype(np.float32)
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


def logits_of(model: nn.Module, batch: Any) -> np.ndarray:
    """What PyTorch says of a batch."""
    args, kwargs = as_call(move(batch, device_of(model)))
    with undisturbed(model), torch.inference_mode():
        return Record(model(*args, **kwargs)).logits.float().cpu().numpy()


def _found(running: Running, batch: Any) -> np.ndarray:
    fed = feeds(list(running.inputs), batch)
    try:
        return running(*fed.values())
    except Exception as error:  # the runtimes' errors have no base in common
        raise ExportError(f"{running.format} cannot run the file: {' '.join(str(error).split())}") from error


def _classes(logits: np.ndarray) -> np.ndarray:
    axis = 1 if logits.ndim >= 4 else -1
    return logits > 0 if logits.shape[axis] == 1 else logits.argmax(axis)
