"""One cell of a comparison: one method on one pair from one seed, run in a process of its own.

``cells/<key>/cell.json``            what it is, written by whoever starts it
``cells/<key>/result.json``          what came of it, whole or not there
``cells/<key>/student.safetensors``  the student with its best weights on validation
``cells/<key>/run/``                 the run's folder, to go on in after an interruption
``cells/<key>/log.txt``              what it printed
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tutelage.checked import read_json, write_json, write_weights
from tutelage.checkpoint import plain_state
from tutelage.files import locked
from tutelage.progress import NonFiniteLoss
from tutelage.run import Interrupted
from tutelage.tasks import task_of

State = Literal["done", "skipped", "diverged", "failed"]
TRAINED = "cell:"  # a file of weights that another cell trains: "cell:<key>"
_FORMAT = 1  # of what a cell means: a higher number makes every cell run again
# Where a run writes and what it prints do not change what comes of it.
_NO_MATTER = ("out", "resume", "overwrite", "control")


@dataclass(frozen=True)
class Cell:
    """One method on one pair from one seed.

    Args:
        method, student, teacher: their names in the comparison; a teacher's own training has the method ``"teacher"``.
        seed: of the recipe.
        fields: the whole recipe; weights that another cell trains are ``"cell:<its key>"``.
    """

    method: str
    student: str
    teacher: str | None
    seed: int
    fields: dict[str, Any]

    @functools.cached_property
    def key(self) -> str:
        """The hash of the recipe: of two cells with one key, one needs to run.

        A file counts by what it holds and a folder only as a folder, so that data may lie elsewhere on another machine.
        A word is a path if it has a slash in it. What a file held when the key was first asked for stays with the cell.
        """
        fields = {k: v for k, v in self.fields.items() if k not in _NO_MATTER}
        training = fields.get("training")
        if isinstance(training, dict):
            fields["training"] = {k: v for k, v in training.items() if k not in ("progress", "gradient_shares", "cpu")}
        text = json.dumps([_FORMAT, _portable(fields)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def needs(self) -> str | None:
        """The key of the cell that trains its teacher."""
        weights = self.fields.get("teacher_weights")
        return weights.removeprefix(TRAINED) if isinstance(weights, str) and weights.startswith(TRAINED) else None


@dataclass
class CellResult:
    """What came of a cell; shares are between 0 and 1.

    Args:
        key, method, student, teacher, seed: the cell's.
        state: ``"done"``; ``"skipped"`` if the pair cannot support the method; ``"diverged"`` if a loss became NaN or
            infinite; ``"failed"`` for everything else that ended it.
        reason: why it is not done.
        metrics: on test, of the weights that were best on validation.
        last: on test, of the last weights.
        validation: on validation, of the best weights.
        teacher_metrics: the teacher's, on test.
        history: every epoch.
        seconds: of the whole cell with everything it trains, on the machine as busy as it was; of one that was
            interrupted, since it went on.
        peak_memory_bytes: what the process (or the GPU) held at most beyond the imported libraries.
        environment: versions and resources.
    """

    key: str
    method: str
    student: str
    teacher: str | None
    seed: int
    state: State
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    teacher_metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        """Whether running the cell again would give the same."""
        return self.state in ("done", "diverged")


def read_result(folder: Path, cell: Cell) -> CellResult | None:
    """The result in a cell's folder under the cell's present names; ``None`` if there is none that is whole."""
    try:
        body = read_json(folder / "result.json")
        return renamed(CellResult(**body), cell)
    except (OSError, ValueError, TypeError):
        return None


def renamed(result: CellResult, cell: Cell) -> CellResult:
    """The result of an equal cell as this cell's own."""
    result = copy.copy(result)
    result.key, result.method, result.student, result.teacher = cell.key, cell.method, cell.student, cell.teacher
    result.seed = cell.seed
    return result


def run_cell(folder: str | Path) -> CellResult:
    """Run the cell whose ``cell.json`` is in ``folder``, or go on with it, and write its ``result.json``.

    Every end but an interruption is a result. A process whose parent was killed may still be ending here: it is waited
    for.
    """
    folder = Path(folder)
    about = read_json(folder / "cell.json")
    cell = Cell(**about["cell"])
    with locked(folder / "lock", wait=True):
        there = read_result(folder, cell)
        if there is not None and there.final:
            return there  # from the one that was waited for
        result = _outcome(cell, folder, about["trust"])
        write_json(folder / "result.json", asdict(result), checked=True)
        shutil.rmtree(folder / "run", ignore_errors=True)  # what it would go on with
    return result


def _outcome(cell: Cell, folder: Path, trust: list[str]) -> CellResult:
    import torchmetrics  # noqa: F401  (imported before the memory is looked at)

    from tutelage.deploy.report import environment
    from tutelage.recipe import load

    before, began = _held(), time.monotonic()
    result = CellResult(cell.key, cell.method, cell.student, cell.teacher, cell.seed, "done")
    fields = {**trained_paths(cell.fields, folder.parent), "out": str(folder / "run"), "resume": True}
    fields["training"] = {**(fields.get("training") or {"epochs": 10}), "progress": True}
    try:
        run = load(fields, trust=trust)
        if (task := task_of(run.keywords["data"].train)) is not None:
            raise ValueError(f"comparisons are of classifiers, by their accuracy; these data are for {task.name}")
        found = run()
    except (Interrupted, KeyboardInterrupt):
        raise
    except NonFiniteLoss as error:
        result.state, result.reason = "diverged", str(error)
    except Exception as error:
        # What is refused before the first epoch is the pair's or the recipe's nature, or a package that is not
        # installed; what breaks later is not.
        kinds = ValueError | TypeError | NotImplementedError | ImportError
        refused = isinstance(error, kinds) and not _has_trained(folder / "run")
        result.state = "skipped" if refused else "failed"
        result.reason = " ".join(f"{'' if refused else type(error).__name__ + ': '}{error}".split())
        traceback.print_exc()
    else:
        for name, metrics in (
            ("metrics", found.metrics),
            ("last", found.last_metrics),
            ("teacher_metrics", found.teacher_metrics),
        ):
            setattr(result, name, metrics.known() if metrics is not None else {})
        result.history = found.history
        best = found.runs[-1].best_epoch
        result.validation = next((h["metrics"] for h in reversed(found.history) if h["epoch"] == best), {})
        write_weights(folder / "student.safetensors", plain_state(found.student))
    result.seconds = time.monotonic() - began
    result.peak_memory_bytes = _peak() - before
    result.environment = environment()
    return result


def trained_paths(fields: dict[str, Any], cells: Path) -> dict[str, Any]:
    """The recipe with the files of the cells that it needs."""
    weights = fields.get("teacher_weights")
    if isinstance(weights, str) and weights.startswith(TRAINED):
        fields = {**fields, "teacher_weights": str(cells / weights.removeprefix(TRAINED) / "student.safetensors")}
    return copy.deepcopy(fields)


def _has_trained(run: Path) -> bool:
    return any(run.rglob("history.json")) or any(run.rglob("checkpoints/step-*"))


def _portable(value: Any) -> Any:
    """Plain values in which a file stands for its content, and a folder for no more than being one."""
    if isinstance(value, dict):
        return {str(k): _portable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(v) for v in value]
    if isinstance(value, str) and os.sep in value:
        path = Path(value).expanduser()
        if path.is_dir():
            return "folder"
        if path.is_file():
            there = path.stat()
            return f"sha256:{_digest(path, there.st_size, there.st_mtime_ns)}"
    return value


@functools.lru_cache(256)
def _digest(path: Path, size: int, changed: int) -> str:
    """Of what the file holds; hundreds of cells name the same teacher."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _held() -> int:
    """Bytes that the process holds now; on a GPU the count begins anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return _peak()


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _end_with_parent() -> None:
    """Stop, with a checkpoint, when whoever holds the other end of standard input is gone, however it went."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if "--end-with-parent" in sys.argv:
        _end_with_parent()
    try:
        run_cell(sys.argv[1])
    except (Interrupted, KeyboardInterrupt) as stop:
        print(stop)
        sys.exit(130)
