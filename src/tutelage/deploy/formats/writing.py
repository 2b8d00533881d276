"""A file of any format, in float or int8."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from tutelage.deploy.calling import Example, batch_size_of, in_parts
from tutelage.deploy.formats import executorch, onnx, openvino, pt2e, torch_export
from tutelage.deploy.formats.tracing import tensors_of, trace


def available(kind: str, quantize: bool) -> None:
    """Raise an ImportError that names the missing package, if what writes or runs a format is not there."""
    if kind == "onnx" or (kind == "openvino" and quantize):
        onnx.available()
    if kind == "openvino":
        openvino.available()
    if kind == "executorch":
        executorch.available()
    if quantize and kind in ("executorch", "torch.export"):
        pt2e.available()


def write(
    kind: str,
    model: nn.Module,
    example: Example,
    file: Path,
    calibration: list[Any],
    opset: int,
    dynamic_batch: bool,
    max_batch: int | None,
) -> ExportedProgram:
    """Write the file, in int8 if there are calibration batches; the program that it was written from."""
    rows = batch_size_of(example)
    bounds = (1, max_batch) if dynamic_batch else (rows, rows)
    parts = [part for batch in calibration for part, _ in in_parts(batch, *bounds)]
    keywords = kind == "torch.export" and isinstance(example, Mapping)
    program = trace(model, example, dynamic_batch=dynamic_batch, largest=max_batch, keywords=keywords)
    if parts and kind in ("torch.export", "executorch"):
        quantizer = executorch.quantizer() if kind == "executorch" else pt2e.layers_quantizer()
        program = pt2e.quantized(program, [tensors_of(part) for part in parts], quantizer, keywords=keywords)
    if kind == "torch.export":
        torch_export.write(program, file)
    elif kind == "executorch":
        executorch.write(program, file, (bounds[0], bounds[1] or rows))
    elif kind == "onnx":
        onnx.write(program, file, opset)
        if parts:
            onnx.quantize(file, parts)
    elif parts:
        with tempfile.TemporaryDirectory() as folder:
            between = Path(folder) / "int8.onnx"
            onnx.write(program, between, opset)
            onnx.quantize(between, parts)
            openvino.write_int8(between, file)
    else:
        openvino.write(program, file)
    return program
