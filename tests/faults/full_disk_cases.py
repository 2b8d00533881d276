"""What test_full_disk.py runs in a process that may mount: ``full_disk_cases.py FOLDER``. The disk is FOLDER/disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cache_cases
import comparing_cases
import training_cases
from exporting_cases import EXAMPLE, FORMATS, network
from killing import tree

from tutelage.cli import main as command_line
from tutelage.comparison import pool
from tutelage.data import loaders
from tutelage.deploy import export

MEBIBYTE = 2**20
LEFT = (0, 12_288, 40_960, 65_536, 98_304)  # bytes: as much as ends in each of the files that are written together


class Disk:
    """A small file system, which :meth:`full` fills but for some bytes."""

    def __init__(self, path: Path, size: int = 16 * MEBIBYTE):
        self.path, self.filler = path, path / "filler"
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)

    def full(self, left: int = 0) -> None:
        with self.filler.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.path).free - left)

    def room(self) -> None:
        self.filler.unlink(missing_ok=True)


def refused(work: Callable[[], Any]) -> dict[str, Any]:
    """How the work ended, which the disk had no room for."""
    try:
        work()
    except Exception as error:
        number, name = getattr(error, "errno", None), getattr(error, "filename", None)
        return {"kind": type(error).__name__, "errno": number, "file": str(name), "text": str(error)}
    return {"kind": "nothing"}


def said(*arguments: str) -> dict[str, Any]:
    """What the command line answers."""
    with contextlib.redirect_stderr(io.StringIO()) as words, contextlib.redirect_stdout(io.StringIO()):
        status = command_line([str(a) for a in arguments])
    return {"status": status, "text": words.getvalue()}


def training(disk: Disk, folder: Path) -> dict[str, Any]:
    """Each attempt gets a little further, or not."""
    training_cases.WIDTH = 40
    training_cases.train(folder / "whole")
    out, ends = disk.path / "run", []
    for left in LEFT:
        disk.full(left)
        ends.append(refused(lambda: training_cases.train(out)))
        disk.room()
        ends[-1]["loads"] = refused(lambda: stopped_after_a_step(out))
    training_cases.train(out)
    shutil.copytree(out, folder / "run")
    return {"ends": ends}


def stopped_after_a_step(out: Path) -> None:
    """Go on with what is there, as far as a checkpoint."""

    class Stop(Exception):
        pass

    steps = []

    def step() -> None:
        steps.append(1)
        if len(steps) > 3:
            raise Stop

    with contextlib.suppress(Stop):
        training_cases.train(out, step)


def cache(disk: Disk, folder: Path) -> dict[str, Any]:
    cache_cases.filled(folder / "whole", size=7)
    out, ends = disk.path / "cache", []
    for left in (0, 4096):
        disk.full(left)
        ends.append(refused(lambda: cache_cases.filled(out, size=7)))
        disk.room()
    cache_cases.filled(out, size=7)
    shutil.copytree(out, folder / "cache")
    return {"ends": ends}


def exporting(disk: Disk, folder: Path) -> dict[str, Any]:
    found, where = {}, disk.path / "exported"
    for suffix in FORMATS:
        file = where / f"model.{suffix}"
        try:
            export(network(1), EXAMPLE, file)
        except ImportError as error:
            found[suffix] = {"kind": "ImportError", "text": str(error)}
            continue
        names = tree(where)
        before = {name: (where / name).read_bytes() for name in names}
        disk.full(40_000)
        end = refused(lambda file=file: export(network(2), EXAMPLE, file))
        disk.room()
        end["same"] = before == {name: (where / name).read_bytes() for name in tree(where)}
        export(network(2), EXAMPLE, file)
        end["new"] = tree(where) == names and before[file.name] != file.read_bytes()
        found[suffix] = end
        for name in names:
            (where / name).unlink()
    return found


def comparing(disk: Disk, folder: Path) -> dict[str, Any]:
    loaders.fashion_subset = comparing_cases.few_images
    pool._Processes.__call__ = comparing_cases.in_this_process  # type: ignore[method-assign]
    file = folder / "comparison.yaml"
    file.write_text(json.dumps(comparing_cases.COMPARISON))
    call = ["compare", str(file), "--workers", "1", "--no-timing", "--out"]
    assert command_line([*call, str(folder / "whole")]) == 0
    out, ends = disk.path / "comparison", []
    for left in (0, 16_384, 131_072, 262_144):
        disk.full(left)
        ends.append(said(*call, str(out)))
        disk.room()
    ends.append(said(*call, str(out)))
    shutil.copytree(out, folder / "comparison")
    return {"ends": ends}


def commands(disk: Disk, folder: Path) -> dict[str, Any]:
    """The other commands' words."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({**comparing_cases.COMPARISON["recipe"], "teacher_training": None, "seed": 0}))
    found = {}
    for name, arguments in {
        "distill": [recipe, "--out", disk.path / "a"],
        "cache": [recipe, "--out", disk.path / "b"],
        "export": ["SmallCNN", disk.path / "c.onnx", "--arg", "width=4", "--input", "1,1,28,28"],
    }.items():
        disk.full(4096)
        found[name] = said(name, *arguments)
        disk.room()
    return found


def main(folder: Path) -> None:
    disk = Disk(folder / "disk")
    found = {}
    for case in (training, cache, exporting, comparing, commands):
        (folder / case.__name__).mkdir()
        found[case.__name__] = case(disk, folder / case.__name__)
    (folder / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
