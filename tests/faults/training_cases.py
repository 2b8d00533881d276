"""What test_killed_training.py runs in a process of its own: ``training_cases.py FOLDER``.

One training with all that must be remembered (a memory of contrastive losses, drop-out, a schedule, augmentation in
workers), undisturbed, and killed again and again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch._dynamo  # the optimisers' first step imports it, here once for all the copies of this process
import torchmetrics  # noqa: F401  (and evaluation this)
from killing import HALF, OPENED, Dying, in_a_fork, torn
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from tutelage import CRD, KD, TaskLoss, distill
from tutelage.data import Indexed

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(32, 1, 6, 6, generator=GENERATOR)
LABELS = torch.arange(32) % 3
WIDTH = 3  # of the student


class Shifted(TensorDataset):
    """Augmented with the worker's random numbers."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.roll(int(torch.randint(6, ())), -1) + 0.1 * torch.randn(image.shape), label


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16 * width, 3),
    )


def train(out: Path, step: Callable[[], None] = lambda: None, **changes: Any) -> None:
    """A whole training, or what is left of it; ``step`` is called after each step."""
    student = network(WIDTH, seed=0)
    settings = {
        "epochs": 4,
        "scheduler": "cosine",
        "optimizer": "adamw",
        "lr": 0.01,
        "checkpoint_every": 3,
        "keep_every": 2,
        "progress": False,
        "cpu": True,
        "resume": True,
    }
    stepping = register_optimizer_step_post_hook(lambda *given: step())
    try:
        distill(
            student,
            network(5, seed=1),
            DataLoader(Indexed(Shifted(IMAGES, LABELS)), batch_size=8, shuffle=True, num_workers=1),
            [(IMAGES[:20], LABELS[:20])],
            losses=[TaskLoss(weight=0.3), KD(weight=0.7), CRD("3", features=4, k=5, weight=0.1)],
            out=out,
            **{**settings, **changes},
        )
    finally:
        stepping.remove()


def killed(out: Path, kind: str | None, at: int, words: Path) -> int:
    """Go on with the run, and be killed before the ``at``-th of a kind of moments; the exit status."""

    def work() -> None:
        dying = Dying(out, kind, at)
        dying.tears(torch, "save", 1)
        dying.tears(safetensors.torch, "serialize_file", 1)
        dying.tears(Path, "write_text", 0)
        train(out, lambda: dying.reaches("a step"))
        (words.parent / "counts.json").write_text(json.dumps(dying.counts))

    return in_a_fork(work, words)


def killed_at_any_time(out: Path, delay: float, words: Path) -> int:
    """Go on, and be killed from outside some time later."""

    def later(process: int) -> None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)

    return in_a_fork(lambda: train(out), words, lambda n: threading.Thread(target=later, args=(n,)).start())


def main(folder: Path) -> None:
    words = folder / "words.txt"
    assert killed(folder / "whole", None, 0, words) == 0, words.read_text()
    counts = json.loads((folder / "counts.json").read_text())
    chance, moments = random.Random(6), []

    def note(out: str, kind: str, at: float, status: int) -> None:
        moments.append({"run": out, "kind": kind, "at": at, "status": status, "torn": torn(folder / out)})

    # from the beginning, again and again: each time a little further, or not even that
    chain = [("a step", 6), (HALF, 4), ("rename", 5), (OPENED, 6), ("remove", 4), ("make a folder", 1)] * 2
    for kind, most in chain:
        at = chance.randint(1, most)
        note("chain", kind, at, killed(folder / "chain", kind, at, words))
    delay = chance.uniform(0.0, 0.5)
    note("chain", "any time", delay, killed_at_any_time(folder / "chain", delay, words))
    # the last moments of all
    for kind, before in (("remove", 4), ("rename", 2), (HALF, 0)):
        at, out = counts[kind] - before, f"late-{kind}"
        note(out, kind, at, killed(folder / out, kind, at, words))
    for out in dict.fromkeys(moment["run"] for moment in moments):
        assert killed(folder / out, None, 0, words) == 0, words.read_text()
    (folder / "moments.json").write_text(json.dumps(moments))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
