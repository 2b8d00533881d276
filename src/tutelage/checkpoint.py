"""A run's folder: what it holds, how it is resumed, and that nothing in it is ever half-written or overwritten.

``run.json``                      what the run is, written first
``history.json``                  losses and metrics of each epoch
``student-best.safetensors``      the plain student, best on validation
``student-last.safetensors``      the plain student, latest
``checkpoints/step-00000120/``    everything needed to go on exactly
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from tutelage.console import say
from tutelage.files import replacing


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; made if needed.
        about: what the run is (settings, classes), written into ``run.json``.
        resume: go on where a run in this folder stopped; start afresh if there is none.
        overwrite: remove a run that is there.
        accelerator: of a run in several processes, of which the first makes the folder.

    Raises:
        FileExistsError: a run is there, and neither ``resume`` nor ``overwrite`` was given; or the folder holds
            other things and ``overwrite`` would destroy them.
        ValueError: both were given, or the run there is of another kind.
    """

    def __init__(
        self,
        path: str | Path,
        about: dict[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        accelerator: Accelerator | None = None,
    ):
        self.path = Path(path)
        if resume and overwrite:
            raise ValueError("resume and overwrite: give one of them")
        if accelerator is None or accelerator.is_main_process:
            self._open(about, resume, overwrite)
        if accelerator is not None:
            accelerator.wait_for_everyone()

    def _open(self, about: dict[str, Any], resume: bool, overwrite: bool) -> None:
        mark = self.path / "run.json"
        if self.path.is_file():
            raise FileExistsError(f"out: {self.path} is a file; expected a folder")
        if mark.exists() and overwrite:
            shutil.rmtree(self.path)
        elif mark.exists() and not resume:
            raise FileExistsError(
                f"out: {self.path} already holds a run; use --resume to go on with it, --overwrite to start again, "
                "or another folder"
            )
        elif mark.exists():
            self._same_run(mark, about)
        elif self.path.is_dir() and any(p.name != "report.html" for p in self.path.iterdir()) and not resume:
            raise FileExistsError(f"out: {self.path} holds other files and no run of ours; choose an empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            write_json(mark, about)

    def save_student(self, name: str, state: dict[str, Tensor]) -> None:
        """Write the plain student's weights."""
        write_weights(self.path / f"student-{name}.safetensors", state)

    def load_student(self, name: str) -> dict[str, Tensor] | None:
        file = self.path / f"student-{name}.safetensors"
        return load_file(file) if file.exists() else None

    def save(self, accelerator: Accelerator, step: int, own: dict[str, Any]) -> None:
        """Write a whole checkpoint, then forget the one before. All processes call it."""
        folder = self.path / "checkpoints" / f"step-{step:08d}"
        beside = folder.with_name(f".{folder.name}.part")
        if accelerator.is_main_process:
            for old in (beside, folder):
                shutil.rmtree(old, ignore_errors=True)
            beside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(beside))
        torch.save(own, beside / f"own-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            beside.rename(folder)
            for other in self.checkpoints():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator) -> dict[str, Any] | None:
        """Restore the latest checkpoint; returns what :meth:`save` was given as ``own``, or ``None``."""
        found = self.checkpoints()
        if not found:
            return None
        try:
            accelerator.load_state(str(found[-1]))
            own = found[-1] / f"own-{accelerator.process_index}.pt"
            return torch.load(own, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"resume: the checkpoint {found[-1]} does not fit this distillation or is damaged: {error}"
            ) from error

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first; half-written ones begin with a dot."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def _same_run(self, mark: Path, about: dict[str, Any]) -> None:
        try:
            there = json.loads(mark.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"resume: {mark} is damaged: {error}") from error
        for name in ("student", "teacher", "losses"):
            if there.get(name) != about.get(name):
                raise ValueError(
                    f"resume: the run in {self.path} has {name} {there.get(name)!r}, this one {about.get(name)!r}"
                )
        changed = [k for k, v in about.get("training", {}).items() if there.get("training", {}).get(k) != v]
        if changed:
            say(f"resume: settings changed since the run began: {', '.join(changed)}")


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1))


def write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict as safetensors, whole or not at all."""
    with replacing(path) as beside:
        save_file(_unshared(state), beside, metadata={"format": "pt"})


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        out[name] = value
    return out
