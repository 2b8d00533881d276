"""Deployment (survey section 8): measure a model, export it, and report what it is worth."""

from __future__ import annotations

from tutelage.deploy.export import Exported, Parity, ParityError, check_onnx, export_onnx
from tutelage.deploy.measure import Measurement, measure, measure_onnx
from tutelage.deploy.report import Curve, Example, Report, Row, environment

__all__ = [
    "Curve",
    "Example",
    "Exported",
    "Measurement",
    "Parity",
    "ParityError",
    "Report",
    "Row",
    "check_onnx",
    "environment",
    "export_onnx",
    "measure",
    "measure_onnx",
]
