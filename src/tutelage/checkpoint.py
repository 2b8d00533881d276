"""A run's folder: what it holds, how it is resumed, and that nothing in it is ever half-written or overwritten.

``run.json``                      what the run is, written first
``history.json``                  losses and metrics of each epoch
``student-best.safetensors``      the plain student, best on validation
``student-last.safetensors``      the plain student, latest
``student-epoch-0004.safetensors``  the plain student after four epochs, if ``Training.keep_every`` wants it
``checkpoints/step-00000120/``    everything needed to go on exactly, with the checksum of every file
``lock``                          held by the process that is at work here
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tutelage.checked import Damaged, compare_files, list_files, read_json, read_weights, write_json, write_weights
from tutelage.console import say
from tutelage.files import durable, locked, naming, writable

_FIXED = ("epochs", "steps", "optimizer", "lr", "weight_decay", "momentum", "scheduler", "cycles", "accumulate", "seed")


class RunFolder:
    """The folder of one run, which no other run may use until it is closed: ``with RunFolder(...) as folder:``.

    Args:
        path: the folder; made if needed.
        about: what the run is (settings, classes), written into ``run.json``.
        resume: go on where a run in this folder stopped; start afresh if there is none.
        overwrite: remove a run that is there, and leave everything else that lies beside it.
        accelerator: of a run in several processes, of which the first makes the folder and holds its lock. What it
            refuses, all of them raise.

    Raises:
        FileExistsError: a run is there, and neither ``resume`` nor ``overwrite`` was given; or the folder holds
            other things and no run.
        ValueError: both were given, or the run there is of another kind or damaged.
        BlockingIOError: another process is at work there. A process that was killed is not.
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
        self._lock = ExitStack()
        if resume and overwrite:
            raise ValueError("resume and overwrite: give one of them")
        refused: list[Exception | None] = [None]
        if accelerator is None or accelerator.is_main_process:
            try:
                self._open(about, resume, overwrite)
            except (OSError, ValueError) as error:
                self.close()
                refused = [error]
        if accelerator is not None and accelerator.num_processes > 1:
            broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.close()

    def _open(self, about: dict[str, Any], resume: bool, overwrite: bool) -> None:
        self._check(about, resume, overwrite)  # before the lock, whose file may not lie in other people's folders
        writable(self.path)
        self._lock.enter_context(locked(self.path / "lock"))
        if changed := self._check(about, resume, overwrite):
            say(f"resume: settings changed since the run began: {', '.join(changed)}")
        mark = self.path / "run.json"
        if overwrite and mark.exists():
            self._remove_run()
        if not mark.exists():
            write_json(mark, about, checked=True)

    def _check(self, about: dict[str, Any], resume: bool, overwrite: bool) -> list[str]:
        """Refuse what may not be used; returns the settings that are others than before."""
        mark = self.path / "run.json"
        if self.path.is_file():
            raise FileExistsError(f"out: {self.path} is a file; expected a folder")
        if mark.exists() and overwrite:
            if not {"student", "losses"} <= set(_read(mark, "overwrite")):
                raise FileExistsError(f"out: {mark} is not of a run of ours; choose another folder")
        elif mark.exists() and not resume:
            raise FileExistsError(
                f"out: {self.path} already holds a run; use --resume to go on with it, --overwrite to start again, "
                "or another folder"
            )
        elif mark.exists():
            return self._same_run(mark, about)
        elif others := sorted(p.name for p in self.path.glob("*") if p.name != "lock" and not _unfinished(p)):
            raise FileExistsError(
                f"out: {self.path} holds other files and no run of ours ({', '.join(others[:3])}); choose an empty one"
            )
        return []

    def save_student(self, name: str, state: dict[str, Tensor]) -> None:
        """Write the plain student's weights."""
        write_weights(self.student_file(name), state)

    def student_file(self, name: str) -> Path:
        """Where :meth:`save_student` writes."""
        return self.path / f"student-{name}.safetensors"

    def kept(self) -> dict[int, Path]:
        """The files of the weights that stay, by the number of epochs before them."""
        found = sorted(self.path.glob("student-epoch-*.safetensors"))
        return {int(file.stem.rpartition("-")[2]): file for file in found}

    def load_student(self, name: str) -> dict[str, Tensor]:
        """The weights that :meth:`save_student` wrote.

        Raises:
            ValueError: the file is damaged or gone.
        """
        try:
            return read_weights(self.student_file(name))
        except (Damaged, FileNotFoundError) as error:
            raise ValueError(
                f"resume: {error}; what was in it cannot be made again from the checkpoint: bring back a copy of the "
                "file, or train again (--overwrite, or another folder)"
            ) from error

    def keep_history(self, lines: list[dict[str, Any]]) -> None:
        """Write ``history.json``, unless it says the same already."""
        file = self.path / "history.json"
        try:
            same = json.loads(file.read_bytes()) == lines
        except (OSError, ValueError):
            same = False
        if not same:
            write_json(file, lines)

    def save(self, accelerator: Accelerator, step: int, own: dict[str, Any]) -> None:
        """Write a whole checkpoint, then forget the one before. All processes call it."""
        folder = self.path / "checkpoints" / f"step-{step:08d}"
        if folder.exists():  # made inside the epoch, and now again at its end: it stays until the new one is whole
            folder = folder.with_name(f"{folder.name}+")
        beside = folder.with_name(f".{folder.name}.part")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        with naming(beside):
            accelerator.save_state(str(beside))
            torch.save(own, beside / f"own-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            list_files(beside)
            durable(beside)
            beside.rename(folder)
            durable(folder.parent)
            self._clear([folder])
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator) -> dict[str, Any] | None:
        """Restore the latest checkpoint; returns what :meth:`save` was given as ``own``, or ``None``.

        Raises:
            ValueError: it is damaged (the message names the file and what can be done), or of another distillation.
        """
        found = self.checkpoints()
        if not found:
            return None
        try:
            compare_files(found[-1])
        except (OSError, Damaged) as error:
            instead = f"go on from {found[-2].name}" if found[1:] else "begin this run anew"
            raise ValueError(
                f"resume: the checkpoint {found[-1]} is damaged: {error}; remove this folder to {instead}"
            ) from error
        try:
            hook = accelerator.register_load_state_pre_hook(_load_models)
            try:
                accelerator.load_state(str(found[-1]))
            finally:
                hook.remove()
            own = found[-1] / f"own-{accelerator.process_index}.pt"
            state = torch.load(own, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"resume: the checkpoint {found[-1]} does not fit this distillation or is damaged: {error}"
            ) from error
        if accelerator.is_main_process:  # a finished run that was killed while it did so saves no more
            self._clear(found[-1:])
        return state

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first; half-written ones begin with a dot."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def _clear(self, keep: list[Path]) -> None:
        """Remove the other checkpoints, and what a killed run was about to write."""
        for other in (*self.path.glob("*"), *self.path.glob("checkpoints/*")):
            if _unfinished(other) or (other in self.checkpoints() and other not in keep):
                shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)

    def _remove_run(self) -> None:
        """Remove what a run writes and nothing else that lies there."""
        for folder in (*self.checkpoints(), self.path / "tutelage"):  # the second is the trackers'
            shutil.rmtree(folder, ignore_errors=True)
        for pattern in ("student-*.safetensors", "student.safetensors", "result.json", "history.json", "run.json"):
            for file in self.path.glob(pattern):
                file.unlink()

    def _same_run(self, mark: Path, about: dict[str, Any]) -> list[str]:
        there = _read(mark, "resume")
        for name in ("student", "parameters", "teacher", "losses"):
            if there.get(name) != about.get(name):
                raise ValueError(
                    f"resume: the run in {self.path} has {name} {there.get(name)!r}, this one {about.get(name)!r}"
                )
        before, now = there.get("training", {}), about.get("training", {})
        changed = [k for k, v in now.items() if before.get(k) != v]
        # A constant learning rate does not depend on where the end is.
        free = ["epochs", "steps"] if now.get("scheduler") == before.get("scheduler") == "constant" else []
        if not {before.get("optimizer"), now.get("optimizer")} <= {"sgd", "adamw"}:
            free.append("optimizer")  # a function's name does not say what it makes
        for name in (n for n in changed if n in _FIXED and n not in free):
            raise ValueError(
                f"resume: {name} was {before.get(name)!r} and is {now[name]!r}; what is restored from the checkpoint "
                "depends on it: go on with the old value, or start a run in another folder"
            )
        return changed


def _read(mark: Path, wish: str) -> dict[str, Any]:
    try:
        there = read_json(mark)
    except Damaged as error:
        raise ValueError(f"{wish}: {error}") from error
    if not isinstance(there, dict):
        raise ValueError(f"{wish}: {mark} is damaged: expected fields, got a {type(there).__name__}")
    return there


def _unfinished(path: Path) -> bool:
    """Whether this is what a killed run was about to write."""
    return path.name.startswith(".") and ".part" in path.name


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict that loads into the plain model: of a parametrised tensor (fake quantisation, weight norm) the value
    that the model calculates with, under its plain name.

    >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> sorted(layer.state_dict()), sorted(plain_state(layer))[1:]
    (['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1'], ['weight'])
    """
    state = model.state_dict()
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            prefix = f"{name}." if name else ""
            for key in [k for k in state if k.startswith(f"{prefix}parametrizations.")]:
                del state[key]
            for tensor in module.parametrizations:  # type: ignore[union-attr]
                state[f"{prefix}{tensor}"] = getattr(module, tensor).detach()
    return state


def _load_models(models: list[nn.Module], folder: str) -> None:
    """What accelerate would do with the models, which it then finds done, for modules that are shared as well.

    A tensor with several names (of branches on one trunk) is in the file under one of them. The loader of safetensors
    calls the other names of a batch-norm's counter unexpected.
    """
    for i, model in enumerate(models):
        state = load_file(Path(folder) / f"model{f'_{i}' if i else ''}.safetensors")
        mine = model.state_dict()
        written = {mine[name].data_ptr(): value for name, value in state.items() if name in mine}
        for name, tensor in mine.items():
            if name not in state and tensor.numel() and tensor.data_ptr() in written:
                state[name] = written[tensor.data_ptr()]
        model.load_state_dict(state)
    models.clear()
