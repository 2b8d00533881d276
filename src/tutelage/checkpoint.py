"""A run's folder: what it holds, how it is resumed, and that nothing in it is ever half-written or overwritten.

``run.json``                      what the run is, written first
``history.json``                  losses and metrics of each epoch
``student-best.safetensors``      the plain student, best on validation
``student-last.safetensors``      the plain student, latest
``student-epoch-0004.safetensors``  the plain student after four epochs, if ``Training.keep_every`` wants it
``checkpoints/step-00000120/``    everything needed to go on exactly
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tutelage.console import say
from tutelage.files import replacing

_FIXED = ("epochs", "steps", "optimizer", "lr", "weight_decay", "momentum", "scheduler", "cycles", "accumulate", "seed")


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; made if needed.
        about: what the run is (settings, classes), written into ``run.json``.
        resume: go on where a run in this folder stopped; start afresh if there is none.
        overwrite: remove a run that is there, and leave everything else that lies beside it.
        accelerator: of a run in several processes, of which the first makes the folder.

    Raises:
        FileExistsError: a run is there, and neither ``resume`` nor ``overwrite`` was given; or the folder holds
            other things and no run.
        ValueError: both were given, or the run there is of another kind or damaged.
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
            self._remove_run(mark)
        elif mark.exists() and not resume:
            raise FileExistsError(
                f"out: {self.path} already holds a run; use --resume to go on with it, --overwrite to start again, "
                "or another folder"
            )
        elif mark.exists():
            self._same_run(mark, about)
        elif self.path.is_dir() and (others := [p.name for p in self.path.iterdir() if not _unfinished(p)]):
            raise FileExistsError(
                f"out: {self.path} holds other files and no run of ours ({', '.join(sorted(others)[:3])}); "
                "choose an empty folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            write_json(mark, about)

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

    def load_student(self, name: str) -> dict[str, Tensor] | None:
        """The weights that :meth:`save_student` wrote, ``None`` if it did not."""
        file = self.student_file(name)
        try:
            return load_file(file) if file.exists() else None
        except SafetensorError as error:
            raise ValueError(f"resume: {file} is damaged: {error}") from error

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
        accelerator.save_state(str(beside))
        torch.save(own, beside / f"own-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = (f for f in beside.rglob("*") if f.is_file())
            write_json(beside / "files.json", {str(f.relative_to(beside)): f.stat().st_size for f in files})
            beside.rename(folder)
            for other in folder.parent.iterdir():
                if other != folder and (_unfinished(other) or other in self.checkpoints()):
                    shutil.rmtree(other, ignore_errors=True)
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator) -> dict[str, Any] | None:
        """Restore the latest checkpoint; returns what :meth:`save` was given as ``own``, or ``None``."""
        found = self.checkpoints()
        if not found:
            return None
        try:
            sizes = json.loads((found[-1] / "files.json").read_text())
            for name, size in sizes.items():
                if (there := (found[-1] / name).stat().st_size) != size:
                    raise OSError(f"{found[-1] / name} has {there} bytes and not {size}")
            hook = accelerator.register_load_state_pre_hook(_load_models)
            try:
                accelerator.load_state(str(found[-1]))
            finally:
                hook.remove()
            own = found[-1] / f"own-{accelerator.process_index}.pt"
            return torch.load(own, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"resume: the checkpoint {found[-1]} does not fit this distillation or is damaged: {error}"
            ) from error

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first; half-written ones begin with a dot."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    def _remove_run(self, mark: Path) -> None:
        """Remove what a run writes and nothing else that lies there."""
        if not {"student", "losses"} <= set(_read(mark, "overwrite")):
            raise FileExistsError(f"out: {mark} is not of a run of ours; choose another folder")
        for folder in (*self.checkpoints(), self.path / "tutelage"):  # the second is the trackers'
            shutil.rmtree(folder, ignore_errors=True)
        for pattern in ("student-*.safetensors", "student.safetensors", "result.json", "history.json", "run.json"):
            for file in self.path.glob(pattern):
                file.unlink()

    def _same_run(self, mark: Path, about: dict[str, Any]) -> None:
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
        if changed:
            say(f"resume: settings changed since the run began: {', '.join(changed)}")


def _read(mark: Path, wish: str) -> dict[str, Any]:
    try:
        return dict(json.loads(mark.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{wish}: {mark} is damaged: {error}") from error


def _unfinished(path: Path) -> bool:
    """Whether this is what a killed run was about to write."""
    return path.name.startswith(".") and ".part" in path.name


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1))


def write_weights(path: Path, state: dict[str, Tensor], **about: str) -> None:
    """Write a state dict as safetensors, whole or not at all, with what is known ``about`` it inside."""
    with replacing(path) as beside:
        save_file(_unshared(state), beside, metadata={"format": "pt", **about})


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
