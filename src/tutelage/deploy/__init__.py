"""Deployment (survey section 8): measure a model, export it, and report what it is worth."""

from __future__ import annotations

from tutelage.comparison.quoted import Quoted
from tutelage.deploy.analysis import Analysis, analyse
from tutelage.deploy.candidates import Prune, Shrink
from tutelage.deploy.compressed import Compressed
from tutelage.deploy.export import Exported, export, export_onnx
from tutelage.deploy.formats.tracing import ExportError
from tutelage.deploy.limits import Limits
from tutelage.deploy.measure import Measurement, Measurements, measure, measure_onnx, measure_together
from tutelage.deploy.parity import Parity, ParityError, check_exported, check_onnx
from tutelage.deploy.report import Curve, Example, Report, Row, environment
from tutelage.deploy.running import Running, open_exported
from tutelage.deploy.similarity import cka_matrix, linear_cka
from tutelage.deploy.timing import Ratio

__all__ = [
    "Analysis",
    "Compressed",
    "Curve",
    "Example",
    "ExportError",
    "Exported",
    "Limits",
    "Measurement",
    "Measurements",
    "Parity",
    "ParityError",
    "Prune",
    "Quoted",
    "Ratio",
    "Report",
    "Row",
    "Running",
    "Shrink",
    "analyse",
    "check_exported",
    "check_onnx",
    "cka_matrix",
    "environment",
    "export",
    "export_onnx",
    "linear_cka",
    "measure",
    "measure_onnx",
    "measure_together",
    "open_exported",
]
