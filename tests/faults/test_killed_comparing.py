"""A comparison that is killed at any moment and started again runs what is missing, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killing import HALF, OPENED, read, same, same_figures, tree
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("comparing_cases.py")
RUNS = ("chain", "late-rename", "late-remove")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the undisturbed comparison and of those that were killed and then went on to the end."""
    pytest.importorskip("resource", reason="this system cannot copy processes")
    out = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out / "own words.txt").open("w") as words:
        subprocess.run([sys.executable, SCRIPT, out], env=environment, stdout=words, stderr=words, timeout=280)
    assert (out / "two.json").exists(), (out / "own words.txt").read_text()[-4000:]
    return out


def test_it_was_killed_at_all_kinds_of_moments(folder):
    kills = [moment for moment in read(folder / "moments.json") if moment["status"] == -9]
    assert len(kills) >= 12
    assert {kill["kind"] for kill in kills} == {"a step", HALF, OPENED, "rename", "remove"}


def test_no_file_was_torn_at_any_moment(folder):
    assert [moment["torn"] for moment in read(folder / "moments.json") if moment["torn"]] == []


@pytest.mark.parametrize("run", RUNS)
def test_results_and_tables_are_those_of_the_undisturbed_comparison(folder, run):
    whole = folder / "whole" / "comparison.json"
    assert [cell["state"] for cell in read(whole)["cells"]].count("done") == 5
    same_figures(folder / run / "comparison.json", whole)
    for file in (folder / "whole").glob("cells/*/student.safetensors"):
        same(load_file(folder / run / file.relative_to(folder / "whole")), load_file(file))
    for file in (folder / "whole").glob("cells/*/result.json"):
        same_figures(folder / run / file.relative_to(folder / "whole"), file)


@pytest.mark.parametrize("run", RUNS)
def test_nothing_is_left_over(folder, run):
    assert tree(folder / run) == tree(folder / "whole")


def test_no_cell_runs_again_that_had_its_result(folder):
    for run in RUNS:
        ran = [tuple(line) for line in lines(folder / f"{run}.ran")]
        assert ran
        assert not [cell for cell in ran if cell[2]], run
    assert len(lines(folder / "whole.ran")) == 6, "each of the cells once, and of the refused method one"
    assert len(lines(folder / "chain.ran")) > 6


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_cell_waits_for_the_process_that_an_ended_parent_left_behind(folder):
    key, (_, second) = read(folder / "two.json")
    assert second == 0
    same_figures(folder / "two" / key / "result.json", folder / "one" / key / "result.json")
