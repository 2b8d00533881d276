"""An exported file that is replaced stays whole, whenever the process that replaces it is killed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killing import HALF, OPENED, read, tree

from tutelage.deploy import check_exported

SCRIPT = Path(__file__).with_name("exporting_cases.py")
spec = importlib.util.spec_from_file_location("exporting_cases", SCRIPT)
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of what each killed process left."""
    pytest.importorskip("resource", reason="this system cannot copy processes")
    pytest.importorskip("onnxscript")
    out = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, SCRIPT, out], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(params=cases.FORMATS)
def moments(request, folder):
    """Of one format: where its exports were killed, and the last one, which was not."""
    found = [moment for moment in read(folder / "moments.json") if moment["format"] == request.param]
    if found[-1]["status"]:
        assert "ImportError" in found[-1]["words"], found[-1]["words"]
        pytest.skip(f"what writes .{request.param} is not installed")
    return found


def test_the_old_file_stays_or_the_new_one_is_whole(folder, moments):
    *killed, last = moments
    name = f"model.{last['format']}"
    old = contents(folder / f"{last['format']}-old")
    assert {moment["status"] for moment in killed} == {-9}
    kinds = {OPENED, "rename", "remove"} | (set() if last["format"] == "onnx" else {HALF})
    assert {moment["kind"] for moment in killed} >= kinds
    stayed = 0
    for moment in killed:
        left = folder / moment["left"]
        if contents(left) == old:
            stayed += 1
        elif (left / name).exists():
            check_exported(left / name, cases.network(2), cases.EXAMPLE, tolerance=1e-4)
        else:  # weights in a file of their own cannot be replaced in the same moment; better none than the wrong ones
            assert last["format"] == "xml", moment
    assert stayed >= len(killed) // 2
    check_exported(folder / last["format"] / name, cases.network(2), cases.EXAMPLE, tolerance=1e-4)


def test_nothing_is_left_over(folder, moments):
    assert moments[-1]["names"] == tree(folder / f"{moments[-1]['format']}-old")


def contents(folder):
    """The bytes of the files that somebody would use."""
    return {file.name: file.read_bytes() for file in folder.glob("model.*")}
