"""A folder that cannot be written to is refused before any work is done; what only has to be read in one is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from killing import read

SCRIPT = Path(__file__).with_name("read_only_cases.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of which the part ``shelf`` could not be written to."""
    out = tmp_path_factory.mktemp("closed")
    call = []
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no permissions of folders that could be taken away")
    if os.geteuid() == 0:  # no permissions stop him: it has to be a mount
        call = ["unshare", "--map-root-user", "--mount"]
        try:
            tried = subprocess.run([*call, "mount", "--bind", out, out], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("this is root, and there is no unshare, with which a folder could be mounted read-only")
        if tried.returncode:
            pytest.skip(f"this is root, and nothing can be mounted here: {tried.stderr.strip()}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*call, sys.executable, SCRIPT, out], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{done.returncode} {done.stderr[-4000:]}"
    return out


@pytest.fixture(scope="module")
def found(folder):
    return read(folder / "found.json")


@pytest.mark.parametrize("run", ["new", "run"])
def test_a_training_is_refused_before_its_first_step(found, folder, run):
    """Also one that would be resumed."""
    end = found["training"][run]
    assert end["kind"] in ("OSError", "PermissionError")  # of a file system, and of permissions
    assert end["file"] == str(folder / "shelf" / run)
    assert end["steps"] == 0


def test_an_export_is_refused_before_the_model_is_looked_at(found, folder):
    assert found["export"]["kind"] in ("OSError", "PermissionError")
    assert found["export"]["file"] == str(folder / "shelf")


@pytest.mark.parametrize("command", ["distill", "cache", "compare", "compare again", "export"])
def test_a_command_says_one_line_with_the_folder(found, folder, command):
    end = found["commands"][command]
    assert end["status"] == 2
    assert end["text"].startswith("tutelage: ")
    assert "cannot write there" in end["text"]
    assert str(folder / "shelf") in end["text"]
    assert end["text"].count("\n") == 1, "nothing was trained before"


def test_no_cell_of_a_comparison_ran_that_was_refused(folder):
    ran = (folder / "ran").read_text().splitlines()
    assert len(ran) == 6, "all of them before the folder was closed"


def test_a_cache_that_can_only_be_read_is_read(found):
    assert found["cached"]["samples"] == 0, "the teacher is not asked"
    assert found["cached"]["same"]
    assert found["commands"]["check"]["status"] == 0


def test_a_row_that_is_missing_in_such_a_cache_is_an_error_with_its_folder(found, folder):
    end = found["cached"]["missing"]
    assert end["kind"] in ("OSError", "PermissionError")
    assert str(folder / "shelf" / "part") in end["text"]


def test_weights_recipes_and_known_results_are_read(found, folder):
    assert found["weights"]["kind"] == "nothing"
    assert found["commands"]["known"]["status"] == 0
    ran = [line for line in (folder / "known.ran").read_text().splitlines() if "teacher" not in line]
    assert [line for line in ran if "nowhere" not in line] == [], "what was known did not run"
