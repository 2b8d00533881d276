"""Cells in processes: as many at a time as the machine has room for, or on a Ray cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tutelage.checked import read_json, write_json
from tutelage.comparison.cells import Cell, CellResult, read_result, renamed
from tutelage.errors import require
from tutelage.files import replacing

Runs = Callable[[Cell, Path, int], CellResult]


def default_workers(threads: int = 1) -> int:
    """Processes that this machine has room for: one a GPU, or one for each ``threads`` cores.

    Two processes with one thread each do several times the work of two with two threads on two cores.
    """
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    workers: int | None = None,
    threads: int = 1,
    trust: Sequence[str] = (),
    known: dict[str, CellResult] | None = None,
    cluster: str | None = None,
    after: Callable[[CellResult, int, int], None] | None = None,
) -> list[CellResult]:
    """Run the cells that have no result yet; a cell that breaks does not end the others.

    Args:
        cells: in an order in which those that train a teacher come before those that need it.
        folder: where each cell's folder is made, under its key.
        workers: processes at a time; by default :func:`default_workers`, on a cluster as many as it has room for.
        threads: of each process.
        trust: as for :func:`tutelage.recipe.load`.
        known: results by key that need not be run again.
        cluster: ``"ray"``.
        after: called with each new result, how many there are and how many there will be.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once every process has written a checkpoint.
        ImportError: Ray is not installed.
        ValueError: ``workers`` or ``threads`` below 1, or a cell needs another that is not given.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    results = finished(cells, folder, known)
    refused: dict[tuple[str, str, str | None], CellResult] = {}
    waiting: list[Cell] = []
    for cell in cells:
        if cell.key not in results and cell.key not in {c.key for c in waiting}:  # equal cells run once
            waiting.append(cell)
    total = len(results) + len(waiting)
    if lost := {c.needs for c in waiting} - {c.key for c in cells} - {None}:
        raise ValueError(f"cells: {', '.join(map(str, lost))} trains a teacher and is not among them")
    with _executor(cluster, workers, threads, trust) as (run, room):
        running: dict[Future[CellResult], tuple[Cell, int]] = {}
        with ThreadPoolExecutor(room) as pool, _terminated_as_interrupted():
            try:
                slots = list(range(room))
                while waiting or running:
                    for cell in list(waiting):
                        place = cell.method, cell.student, cell.teacher
                        blame = _broken_teacher(cell, results)
                        if blame or place in refused:
                            waiting.remove(cell)
                            result = CellResult(cell.key, *place, cell.seed, "skipped", blame or refused[place].reason)
                            results[cell.key] = result
                            _tell(after, result, results, total)
                        elif slots and (cell.needs is None or cell.needs in results):
                            waiting.remove(cell)
                            slot = slots.pop(0)
                            running[pool.submit(run, cell, folder / cell.key, slot)] = cell, slot
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        cell, slot = running.pop(future)
                        slots.append(slot)
                        result = results[cell.key] = future.result()
                        if result.state == "skipped":
                            refused[cell.method, cell.student, cell.teacher] = result
                        _tell(after, result, results, total)
            except BaseException:
                run.stop()
                raise
    return [renamed(results[cell.key], cell) for cell in cells]


def _tell(after: Any, result: CellResult, results: dict[str, CellResult], total: int) -> None:
    if after is not None:
        after(result, len(results), total)


def finished(cells: Sequence[Cell], folder: Path, known: dict[str, CellResult] | None = None) -> dict[str, CellResult]:
    """The results that need not be run again, by key: those in the cells' folders, and the known ones.

    A teacher is trained again if a cell that is to run needs its weights and they are not there.
    """
    results: dict[str, CellResult] = {}
    for cell in cells:
        found = read_result(folder / cell.key, cell)
        if (found is None or not found.final) and known and cell.key in known:
            found = renamed(known[cell.key], cell)
        if found is not None and found.final:
            results[cell.key] = found
    needed = {cell.needs for cell in cells if cell.needs is not None and cell.key not in results}
    for key in needed & results.keys():
        if results[key].state == "done" and not (folder / key / "student.safetensors").exists():
            del results[key]
    return results


def _broken_teacher(cell: Cell, results: dict[str, CellResult]) -> str:
    if cell.needs is None or cell.needs not in results or results[cell.needs].state == "done":
        return ""
    return f"the training of its teacher {results[cell.needs].state}: {results[cell.needs].reason}"


def child(folder: Path) -> list[str]:
    """What to call for a process that runs the cell in ``folder``, and ends when we do."""
    return [sys.executable, "-m", "tutelage.comparison.cells", str(folder), "--end-with-parent"]


class _Processes:
    """Runs a cell in a process of its own."""

    def __init__(self, threads: int, trust: Sequence[str]):
        self.threads, self.trust = threads, list(trust)
        self.alive: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def __call__(self, cell: Cell, folder: Path, slot: int) -> CellResult:
        prepare(cell, folder, self.trust)
        environment = {**os.environ, **thread_limits(self.threads)}
        if torch.cuda.is_available():
            visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
            devices = visible or [str(n) for n in range(torch.cuda.device_count())]
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        with (folder / "log.txt").open("ab") as log:
            with self.lock:
                if self.stopped:
                    raise KeyboardInterrupt
                process = subprocess.Popen(
                    child(folder),
                    stdin=subprocess.PIPE,  # nothing is said to it: it notices when the pipe ends
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # so that Ctrl-C in the terminal reaches it once, through us
                )
                self.alive.add(process)
            code = process.wait()
            assert process.stdin is not None
            process.stdin.close()
            self.alive.discard(process)
        if self.stopped:
            raise KeyboardInterrupt
        return read_result(folder, cell) or ended_without(cell, code, folder)

    def stop(self) -> None:
        """Ask every process to write a checkpoint and end, and wait for them."""
        with self.lock:
            self.stopped = True
            for process in list(self.alive):
                process.send_signal(signal.SIGTERM)
        for process in list(self.alive):
            process.wait()


class _Ray:
    """Runs a cell as a task of a Ray cluster; what it leaves comes back as bytes, so no folder need be shared."""

    def __init__(self, ray: Any, threads: int, trust: Sequence[str]):
        self.ray, self.threads, self.trust = ray, threads, list(trust)
        self.alive: set[Any] = set()
        self.lock = threading.Lock()
        self.stopped = False
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        # a process for each cell, as it may leave the memory and the generators in any state
        self.task = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=1, max_retries=1)(_ray_task)

    def __call__(self, cell: Cell, folder: Path, slot: int) -> CellResult:
        prepare(cell, folder, self.trust)
        teacher = folder.parent / cell.needs / "student.safetensors" if cell.needs else None
        given = {
            "cell.json": (folder / "cell.json").read_bytes(),
            **({f"../{cell.needs}/student.safetensors": teacher.read_bytes()} if teacher else {}),
        }
        with self.lock:
            if self.stopped:
                raise KeyboardInterrupt
            task = self.task.remote(folder.name, given, self.threads)
            self.alive.add(task)
        try:
            left = self.ray.get(task)
        except self.ray.exceptions.RayError as error:
            if self.stopped:
                raise KeyboardInterrupt from None
            return _failed(cell, f"its Ray task ended: {' '.join(str(error).split())[-300:]}")
        finally:
            self.alive.discard(task)
        for name in sorted(left, key=lambda name: name == "result.json"):  # the result last: it says that all is there
            with replacing(folder / name) as beside:
                beside.write_bytes(left[name])
        return read_result(folder, cell) or _failed(cell, "its Ray task left no result")

    def stop(self) -> None:
        """End every task; what it had done is lost, as its folder is on another machine."""
        with self.lock:
            self.stopped = True
            for task in list(self.alive):
                self.ray.cancel(task, force=True)


def _ray_task(name: str, given: dict[str, bytes], threads: int) -> dict[str, bytes]:
    os.environ.update(thread_limits(threads))
    torch.set_num_threads(threads)
    from tutelage.comparison.cells import run_cell

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / name
        for file, content in given.items():
            path = (folder / file).resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        run_cell(folder)
        return {f.name: f.read_bytes() for f in folder.iterdir() if f.name in ("result.json", "student.safetensors")}


@contextmanager
def _executor(
    cluster: str | None, workers: int | None, threads: int, trust: Sequence[str]
) -> Iterator[tuple[Any, int]]:
    if cluster is None:
        yield _Processes(threads, trust), workers or default_workers(threads)
        return
    if cluster != "ray":
        raise ValueError(f"cluster={cluster!r}: expected 'ray'")
    ray = require("ray", extra="cluster")
    mine = not ray.is_initialized()
    if mine:  # RAY_ADDRESS names a cluster; without one, this machine is it
        ray.init(configure_logging=False, log_to_driver=False, include_dashboard=False)
    try:
        room = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        yield _Ray(ray, threads, trust), workers or room
    finally:
        if mine:
            ray.shutdown()


def prepare(cell: Cell, folder: Path, trust: Sequence[str]) -> None:
    """Make the cell's folder and say in it what it is; the result of an earlier attempt is no longer there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    write_json(folder / "cell.json", {"cell": asdict(cell), "trust": list(trust)}, checked=True)


def thread_limits(threads: int) -> dict[str, str]:
    """The environment in which the libraries' pools have so many threads."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def ended_without(cell: Cell, code: int, folder: Path) -> CellResult:
    """The result of a process that left none."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    try:
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    last = f"; it last said: {lines[-1].strip()}" if lines and code > 0 else ""
    return _failed(cell, f"its process {how}{last}")


def _failed(cell: Cell, reason: str) -> CellResult:
    return CellResult(cell.key, cell.method, cell.student, cell.teacher, cell.seed, "failed", reason)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that the processes are stopped in order."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def read_known(path: str | Path) -> dict[str, CellResult]:
    """The results of an earlier comparison's JSON file, by key.

    Raises:
        ValueError: the file is no comparison.
    """
    try:
        body = read_json(Path(path))
        results = [CellResult(**r) for r in body["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"known: {path} is not the comparison.json of a comparison ({error})") from None
    return {r.key: r for r in results if r.final}
