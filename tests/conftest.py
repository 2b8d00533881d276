"""Shared by all tests: where optional data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of packed data sets: $TUTELAGE_DATA, or ``shared/data`` beside the repository."""
    root = Path(os.environ.get("TUTELAGE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no data sets in {root} (set TUTELAGE_DATA)")
    return root


@pytest.fixture(scope="session")
def reference() -> dict:
    """Loss values computed with other people's published code on inputs that anyone can rebuild."""
    import json

    path = Path(os.environ.get("TUTELAGE_REFERENCE") or Path(__file__).resolve().parents[2] / "shared" / "reference")
    if not (path / "losses.json").is_file():
        pytest.skip(f"no reference values in {path} (set TUTELAGE_REFERENCE)")
    return json.loads((path / "losses.json").read_text())
