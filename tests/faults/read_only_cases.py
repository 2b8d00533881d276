"""What test_read_only.py runs in a process of its own: ``read_only_cases.py FOLDER``. FOLDER/shelf gets read-only."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import cache_cases
import comparing_cases
import training_cases
from exporting_cases import EXAMPLE, network
from full_disk_cases import refused, said
from safetensors.torch import save_file

from tutelage import Cached
from tutelage.comparison import pool
from tutelage.data import loaders
from tutelage.deploy import export
from tutelage.models import load_weights


def close(shelf: Path) -> None:
    """Nothing can be written there from now on."""
    if os.geteuid() == 0:  # whom no permissions stop
        subprocess.run(["mount", "--bind", shelf, shelf], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", shelf], check=True)
    else:
        for path in (shelf, *shelf.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)


class Steps:
    """How many steps a training made."""

    def __init__(self, most: int = 10**9):
        self.most, self.count = most, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count > self.most:
            raise KeyboardInterrupt


def training(shelf: Path, folder: Path) -> dict[str, Any]:
    found = {}
    for name in ("new", "run"):
        steps = Steps()
        found[name] = {**refused(lambda name=name, steps=steps: training_cases.train(shelf / name, steps))}
        found[name]["steps"] = steps.count
    return found


def cached(shelf: Path, folder: Path) -> dict[str, Any]:
    """The teacher speaks from a cache that can only be read; it is given no samples."""
    batches = [cache_cases.arrays(views=2) for _ in range(2)]
    live, _ = cache_cases.train(cache_cases.exact(), batches[0])
    role = Cached(cache_cases.exact(), str(shelf / "cache"), "float32")
    calls: list[int] = []
    role.module.register_forward_hook(lambda module, given, output: calls.append(len(output)))
    read, _ = cache_cases.train(role, batches[1])
    found = {"samples": sum(calls), "same": all((live[name] == read[name]).all() for name in live)}
    missing = Cached(cache_cases.exact(), str(shelf / "part"), "float32")
    return {**found, "missing": refused(lambda: cache_cases.train(missing, cache_cases.arrays(views=2)))}


def commands(shelf: Path, folder: Path) -> dict[str, Any]:
    recipe, comparison = shelf / "recipe.yaml", shelf / "comparison.yaml"
    plain = ["--workers", "1", "--no-timing"]
    found = {
        "distill": said("distill", recipe, "--out", shelf / "new"),
        "cache": said("cache", recipe, "--out", shelf / "new"),
        "compare": said("compare", comparison, *plain, "--out", shelf / "new"),
        "compare again": said("compare", comparison, *plain, "--out", shelf / "comparison"),
        "export": said("export", "SmallCNN", shelf / "new.onnx", "--arg", "width=4", "--input", "1,1,28,28"),
    }
    (folder / "ran").write_text("".join(path.read_text() for path in shelf.parent.glob("shelf/*.ran")))
    found["known"] = said(
        "compare", comparison, *plain, "--out", folder / "known", "--known", shelf / "comparison" / "comparison.json"
    )
    found["check"] = said("cache", "--check", shelf / "cache")
    return found


def main(folder: Path) -> None:
    loaders.fashion_subset = comparing_cases.few_images
    pool._Processes.__call__ = comparing_cases.in_this_process  # type: ignore[method-assign]
    shelf = folder / "shelf"
    shelf.mkdir()
    with contextlib.suppress(KeyboardInterrupt):
        training_cases.train(shelf / "run", Steps(9))
    cache_cases.filled(shelf / "cache")
    part = Cached(cache_cases.exact(), str(shelf / "part"), "float32")
    cache_cases.train(part, cache_cases.arrays(views=2), steps=1, epochs=None)
    (shelf / "comparison.yaml").write_text(json.dumps(comparing_cases.COMPARISON))
    (shelf / "recipe.yaml").write_text(json.dumps({**comparing_cases.COMPARISON["recipe"], "seed": 0}))
    said("compare", shelf / "comparison.yaml", "--workers", "1", "--no-timing", "--out", shelf / "comparison")
    save_file(network(1).state_dict(), shelf / "weights.safetensors")
    close(shelf)

    found = {"training": training(shelf, folder), "cached": cached(shelf, folder), "commands": commands(shelf, folder)}
    found["export"] = refused(lambda: export(lambda x: x, EXAMPLE, shelf / "new.onnx"))  # before the model is called
    found["weights"] = refused(lambda: load_weights(network(1), str(shelf / "weights.safetensors")))
    (folder / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
