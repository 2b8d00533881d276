"""Filling a cache that is killed at any moment, and goes on, makes the same files, and nothing of them twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from killing import HALF, OPENED, read, tree

SCRIPT = Path(__file__).with_name("caching_cases.py")
BATCH, ROWS = 7, 96
KINDS = {HALF, OPENED, "rename", "half a row", "a row without its checksum", "the teacher"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the undisturbed cache and of the one whose makers were killed."""
    pytest.importorskip("resource", reason="this system cannot copy processes")
    out = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, SCRIPT, out], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def kills(folder):
    return [moment for moment in read(folder / "moments.json") if moment["status"] == -9]


def test_it_was_killed_at_all_kinds_of_moments(kills):
    assert len(kills) >= 12
    assert {kill["kind"] for kill in kills} == KINDS


def test_every_file_is_that_of_the_undisturbed_cache(folder):
    names = tree(folder / "whole")
    assert len([name for name in names if name.endswith(".rows")]) == 5
    assert tree(folder / "chain") == names
    for name in names:
        assert (folder / "chain" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_no_more_is_calculated_twice_than_was_under_way(folder, kills):
    whole, chain = (sum(map(int, (folder / f"{name}.calls").read_text().split())) for name in ("whole", "chain"))
    assert whole == ROWS
    assert ROWS <= chain <= ROWS + BATCH * len(kills)
