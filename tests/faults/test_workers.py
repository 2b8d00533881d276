"""A loader's worker that dies or fails ends the run with an error, and what was saved before is good."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worker_cases import train

SCRIPT = Path(__file__).with_name("worker_cases.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed", r"RuntimeError: DataLoader worker \(pid.* (is killed by signal: Killed|exited unexpectedly)"),
        ("ends", r"RuntimeError: DataLoader worker \(pid.* exited unexpectedly"),
        ("raises", r"ValueError: .*DataLoader worker process \d(.|\n)*sample 5 cannot be read"),
    ],
)
def test_a_worker_that_breaks_ends_the_run_and_harms_nothing(how, said, whole, tmp_path):
    words = tmp_path / "words.txt"
    with words.open("w") as file:  # a pipe would be held open by the other worker
        command = [sys.executable, SCRIPT, tmp_path / "run", how]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file, timeout=280
        )
    assert done.returncode == 1
    assert re.search(said, words.read_text()), words.read_text()[-3000:]
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))  # it may have been writing the next one
    assert 6 <= int(checkpoint.name.removeprefix("step-")) < 12  # of the second epoch
    weights, losses = train(tmp_path / "run", resume=True)
    assert losses == whole[1]
    assert all(torch.equal(weights[name], whole[0][name]) for name in whole[0])
