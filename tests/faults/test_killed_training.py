"""A training that is killed at any moment, and goes on, ends as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killing import HALF, OPENED, read, same, same_figures, timeless, tree
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("training_cases.py")
RUNS = ("chain", "late-remove", "late-rename", f"late-{HALF}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the undisturbed run and of those that were killed and then went on to the end."""
    pytest.importorskip("resource", reason="this system cannot copy processes")
    out = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out / "own words.txt").open("w") as words:  # a pipe would be held open by the workers of killed loaders
        subprocess.run([sys.executable, SCRIPT, out], env=environment, stdout=words, stderr=words, timeout=280)
    assert (out / "moments.json").exists(), (out / "own words.txt").read_text()[-4000:]
    return out


def test_they_were_killed_at_all_kinds_of_moments(folder):
    kills = [moment for moment in read(folder / "moments.json") if moment["status"] == -9]
    assert len(kills) >= 12
    assert {k["kind"] for k in kills} >= {"a step", HALF, OPENED, "rename", "remove", "make a folder"}
    assert {k["run"] for k in kills} == set(RUNS)


def test_no_file_was_torn_at_any_moment(folder):
    assert [moment["torn"] for moment in read(folder / "moments.json") if moment["torn"]] == []


@pytest.mark.parametrize("run", RUNS)
def test_weights_and_history_are_those_of_the_undisturbed_run(folder, run):
    whole = folder / "whole"
    students = sorted(whole.glob("student*.safetensors"))
    assert len(students) == 5
    for file in students:
        same(load_file(folder / run / file.name), load_file(file))
    assert len(read(whole / "history.json")) == 4
    same_figures(folder / run / "history.json", whole / "history.json")
    for name in ("result.json", "run.json"):
        assert read(folder / run / name) == read(whole / name)


@pytest.mark.parametrize("run", RUNS)
def test_nothing_is_left_over_and_every_file_loads(folder, run):
    assert tree(folder / run) == tree(folder / "whole")
    assert not [name for name in tree(folder / run) if ".part" in name]
    checkpoint = Path("checkpoints", "step-00000016")
    for name in ("own-0.pt", "optimizer.bin"):
        one, other = (torch.load(folder / r / checkpoint / name, weights_only=True) for r in (run, "whole"))
        same(timeless(one), timeless(other))
    same(*(load_file(folder / r / checkpoint / "model.safetensors") for r in (run, "whole")))
