"""What test_killed_comparing.py runs in a process of its own: ``comparing_cases.py FOLDER``.

``tutelage compare`` in copies of this process, in which the cells run too: starting others takes longer than training.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch._dynamo  # the optimisers' first step imports it, here once for all the copies of this process
import torchmetrics  # noqa: F401  (and evaluation this)
from killing import HALF, OPENED, Dying, in_a_fork, torn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tutelage.cli import main as command_line
from tutelage.comparison import pool
from tutelage.comparison.cells import Cell, CellResult, read_result, run_cell
from tutelage.data import Images, ImageSet, fashion_subset, loaders

COMPARISON: dict[str, Any] = {
    "recipe": {
        "student": {"class_path": "SmallCNN", "init_args": {"width": 2}},
        "teacher": {"class_path": "SmallCNN", "init_args": {"width": 3}},
        "teacher_training": {"epochs": 1, "optimizer": "adamw", "lr": 0.01},
        "data": {"class_path": "fashion_loaders", "init_args": {"batch_size": 32, "limit": 96, "validation": 32}},
        "training": {"epochs": 2, "optimizer": "adamw", "lr": 0.01, "checkpoint_every": 1},
    },
    "seeds": 2,
    "methods": {"KD": {}, "nowhere": {"losses": [{"class_path": "FitNets", "init_args": {"taps": ["stage9"]}}]}},
}


@functools.cache
def few_images() -> ImageSet:
    whole = fashion_subset()
    parts = (Images(part.images[:128], part.labels[:128]) for part in (whole.train, whole.test))
    return ImageSet(*parts, whole.classes)


def in_this_process(processes: Any, cell: Cell, folder: Path, slot: int) -> CellResult:
    """Stands for the pool's processes; notes which cells ran, and whether they had to."""
    before = read_result(folder, cell)
    had = before is not None and before.final
    with Path(f"{folder.parent.parent}.ran").open("a") as file:
        file.write(json.dumps([cell.method, cell.seed, had]) + "\n")
    pool.prepare(cell, folder, processes.trust)
    run_cell(folder)
    result = read_result(folder, cell)
    assert result is not None
    return result


def compare(out: Path, kind: str | None, at: int, words: Path) -> int:
    """Go on with the comparison, and be killed before the ``at``-th of a kind of moments; the exit status."""

    def work() -> None:
        dying = Dying(out, kind, at)
        dying.tears(torch, "save", 1)
        dying.tears(safetensors.torch, "serialize_file", 1)
        dying.tears(Path, "write_text", 0)
        register_optimizer_step_post_hook(lambda *given: dying.reaches("a step"))
        file = str(words.parent / "comparison.yaml")
        assert command_line(["compare", file, "--out", str(out), "--workers", "1", "--no-timing"]) == 0
        (words.parent / "counts.json").write_text(json.dumps(dying.counts))

    return in_a_fork(work, words)


def done(folder: Path) -> None:
    assert run_cell(folder).state == "done"


def two_at_once(folder: Path, words: Path) -> list[int]:
    """A cell's process whose parent is gone is asked to stop while the next one has begun already; their statuses."""
    run, second = folder / "run", []

    def interfere(process: int) -> None:
        while not (run / "history.json").exists():
            time.sleep(0.002)

        def stop(second: int) -> None:
            time.sleep(0.5)  # until it is waiting, or not: both must go well
            os.kill(process, signal.SIGTERM)

        second.append(in_a_fork(lambda: done(folder), words, stop))

    def begin(process: int) -> None:
        threads.append(threading.Thread(target=interfere, args=(process,)))
        threads[-1].start()

    threads: list[threading.Thread] = []
    first = in_a_fork(lambda: done(folder), words, begin)
    threads[0].join()
    return [first, *second]


def main(folder: Path) -> None:
    loaders.fashion_subset = few_images
    pool._Processes.__call__ = in_this_process  # type: ignore[method-assign]
    few_images()
    (folder / "comparison.yaml").write_text(json.dumps(COMPARISON))
    words, chance, moments = folder / "words.txt", random.Random(8), []
    assert compare(folder / "whole", None, 0, words) == 0, words.read_text()
    counts = json.loads((folder / "counts.json").read_text())
    chain = [("a step", 8), (HALF, 60), ("rename", 30), (OPENED, 20), ("remove", 80)] * 3
    for kind, at in [(kind, chance.randint(1, most)) for kind, most in chain]:
        status = compare(folder / "chain", kind, at, words)
        moments.append({"kind": kind, "at": at, "status": status, "torn": torn(folder / "chain")})
    # the last moments of all
    for kind, before in (("rename", 1), ("remove", 8)):
        at = counts[kind] - before
        status = compare(folder / f"late-{kind}", kind, at, words)
        moments.append({"kind": kind, "at": at, "status": status, "torn": torn(folder / f"late-{kind}")})
        assert compare(folder / f"late-{kind}", None, 0, words) == 0, words.read_text()
    assert compare(folder / "chain", None, 0, words) == 0, words.read_text()
    (folder / "moments.json").write_text(json.dumps(moments))

    longer = {**COMPARISON["recipe"], "teacher": None, "teacher_training": None}
    longer |= {"training": {"epochs": 20, "optimizer": "adamw", "lr": 0.01}, "losses": [{"class_path": "TaskLoss"}]}
    cell = Cell("alone", "small", None, 0, longer)
    for name in ("two", "one"):
        pool.prepare(cell, folder / name / cell.key, [])
    statuses = two_at_once(folder / "two" / cell.key, words)
    assert in_a_fork(lambda: done(folder / "one" / cell.key), words) == 0, words.read_text()
    (folder / "two.json").write_text(json.dumps([cell.key, statuses]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
