"""What test_killed_exporting.py runs in a process of its own: ``exporting_cases.py FOLDER``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from killing import HALF, OPENED, Dying, in_a_fork, tree
from torch import nn

from tutelage.deploy import export
from tutelage.deploy.formats import openvino

FORMATS = ("onnx", "pt2", "xml")
EXAMPLE = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))


def network(seed: int) -> nn.Module:
    """The second is larger than the first."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 5 + seed))


def write(file: Path, seed: int, kind: str | None, at: int, words: Path) -> int:
    """Export a network over the file, and be killed before the ``at``-th of a kind of moments; the exit status."""

    def work() -> None:
        dying = Dying(file.parent, kind, at)
        dying.tears(Path, "write_bytes", 0)
        if file.suffix == ".xml":
            dying.tears(openvino.library(), "save_model", 1)
        export(network(seed), EXAMPLE, file)
        (words.parent / "counts.json").write_text(json.dumps(dying.counts))

    return in_a_fork(work, words)


def main(folder: Path) -> None:
    words, moments = folder / "words.txt", []
    export(network(0), EXAMPLE, folder / "first.onnx")  # so that everything is imported
    for suffix in FORMATS:
        file = folder / suffix / f"model.{suffix}"
        if write(file, 1, None, 0, words):
            moments.append({"format": suffix, "status": 1, "words": words.read_text()[-2000:]})
            continue
        counts = json.loads((folder / "counts.json").read_text())
        shutil.copytree(file.parent, folder / f"{suffix}-old")
        chosen = [(kind, at) for kind in (HALF, OPENED, "rename") for at in range(1, counts.get(kind, 0) + 1)]
        chosen += [("remove", counts["remove"] - 1)]
        for kind, at in chosen:
            status = write(file, 2, kind, at, words)
            left = folder / f"{suffix}-{kind}-{at}"
            shutil.copytree(file.parent, left)
            moments.append({"format": suffix, "kind": kind, "at": at, "status": status, "left": left.name})
            shutil.copytree(folder / f"{suffix}-old", file.parent, dirs_exist_ok=True)
        assert write(file, 2, None, 0, words) == 0, words.read_text()
        moments.append({"format": suffix, "status": 0, "names": tree(file.parent)})
    (folder / "moments.json").write_text(json.dumps(moments, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
