"""Archives of ``torch.export`` (.pt2), for PyTorch itself: no Python code of the model is needed to run them."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.export import ExportedProgram

from tutelage.deploy.formats.tracing import forget_origins


def write(program: ExportedProgram, file: Path) -> None:
    """Save a program without what it notes about its making."""
    forget_origins(program)
    content = io.BytesIO()  # given a path, torch ends the whole process when the disk is full
    torch.export.save(program, content)
    file.write_bytes(content.getbuffer())
