"""That a disk is full is said, with the file; what was there stays whole; and with room again all goes on exactly."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from killing import read, same, same_figures, tree
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("full_disk_cases.py")
FULL = os.strerror(errno.ENOSPC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What was found on a file system of 16 MiB, and copies of what was there in the end."""
    out = tmp_path_factory.mktemp("full")
    (out / "try").mkdir()
    try:
        call = ["unshare", "--map-root-user", "--mount"]
        tried = subprocess.run([*call, "mount", "-t", "tmpfs", "tmpfs", out / "try"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("this system has no unshare, with which a small disk could be mounted")
    if tried.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {tried.stderr.strip()}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*call, sys.executable, SCRIPT, out], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{done.returncode} {done.stderr[-4000:]}"
    return out


@pytest.fixture(scope="module")
def found(folder):
    return read(folder / "found.json")


def test_a_training_says_which_file_had_no_room(found, folder):
    ends = found["training"]["ends"]
    assert [(end["kind"], end["errno"]) for end in ends] == [("OSError", errno.ENOSPC)] * 5
    for end in ends:
        assert end["file"].startswith(str(folder / "disk" / "run"))
        assert end["text"] == f"[Errno {errno.ENOSPC}] {FULL}: {end['file']!r}"
    assert len({end["file"] for end in ends}) >= 3, "it was not full at one moment only"


def test_a_training_goes_on_exactly_with_room_again(found, folder):
    assert [end["loads"]["kind"] for end in found["training"]["ends"]] == ["nothing"] * 5
    whole, run = folder / "training" / "whole", folder / "training" / "run"
    assert tree(run) == tree(whole)
    for file in whole.glob("student*.safetensors"):
        same(load_file(run / file.name), load_file(file))
    same_figures(run / "history.json", whole / "history.json")


def test_a_cache_says_so_and_is_filled_with_room_again(found, folder):
    for end in found["cache"]["ends"]:
        assert (end["kind"], end["errno"]) == ("OSError", errno.ENOSPC)
        assert str(folder / "disk" / "cache") in end["text"]
        assert FULL in end["text"]
    whole, cache = folder / "cache" / "whole", folder / "cache" / "cache"
    assert tree(cache) == tree(whole)
    for name in tree(whole):
        assert (cache / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("suffix", ["onnx", "pt2", "xml"])
def test_an_exported_file_stays_until_a_new_one_has_room(found, folder, suffix):
    end = found["exporting"][suffix]
    if end["kind"] == "ImportError":
        pytest.skip(end["text"])
    assert (end["kind"], end["errno"]) == ("OSError", errno.ENOSPC)
    assert end["file"] == str(folder / "disk" / "exported" / f"model.{suffix}")
    assert end["same"], "the old file, and nothing beside it"
    assert end["new"], "written with room again"


def test_a_comparison_ends_with_one_line_and_goes_on_with_room_again(found, folder):
    *full, last = found["comparing"]["ends"]
    refused = [end for end in full if end["status"]]
    assert len(refused) >= 2
    for end in refused:
        line = end["text"].strip().splitlines()[-1]  # what stands before it is the cells', whose log it is
        assert line.startswith(f"tutelage: [Errno {errno.ENOSPC}] {FULL}: '{folder / 'disk' / 'comparison'}")
    assert last["status"] == 0
    one, other = (folder / "comparing" / name / "comparison.json" for name in ("comparison", "whole"))
    same_figures(one, other)
    assert tree(one.parent) == tree(other.parent)


@pytest.mark.parametrize("command", ["distill", "cache", "export"])
def test_a_command_says_one_line(found, folder, command):
    end = found["commands"][command]
    assert end["status"] == 2
    assert end["text"].startswith("tutelage: ")
    assert end["text"].count("\n") == 1
    assert FULL in end["text"]
    assert str(folder / "disk") in end["text"]
