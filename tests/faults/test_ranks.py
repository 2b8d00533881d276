"""Of two processes that are one training one dies, fails or hangs: the other ends, and the run can go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("rank_cases.py")
BROKEN = ("killed-1", "killed-0", "raises-1", "stopped-1")

if not hasattr(os, "fork") or not torch.distributed.is_gloo_available():
    pytest.skip("needs copies of a process that talk over gloo", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out / "words.txt").open("w") as words:
        subprocess.run([sys.executable, SCRIPT, out], env=environment, stdout=words, stderr=words, timeout=580)
    assert (out / "found.json").exists(), (out / "words.txt").read_text()[-4000:]
    return out


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", BROKEN)
def test_the_other_ends_with_an_error(name, found):
    how, which = name.split("-")
    one, other, left = found[name][int(which)], found[name][1 - int(which)], found[name][2]
    assert one["end"] == {"killed": -signal.SIGKILL, "raises": 1, "stopped": "stopped"}[how], one["said"]
    assert ("ArithmeticError: a bug in a loss" in one["said"]) == (how == "raises")
    assert other["end"] == 1, other["said"]  # by itself: neither "hangs" nor a signal
    kind = "Timed out" if how == "stopped" else "Connection (closed|reset) by peer|Broken pipe"
    assert re.search(kind, other["said"])
    assert left["checkpoints"] == ["step-00000007"]  # the step before


@pytest.mark.parametrize("name", BROKEN)
def test_a_new_pair_goes_on_to_the_same_weights(name, folder, found):
    assert [rank["end"] for rank in found["whole"]] == [0, 0], found["whole"]
    assert [rank["end"] for rank in found[f"{name} again"]] == [0, 0], found[f"{name} again"]
    for rank in (0, 1):
        whole = torch.load(folder / f"whole-{rank}.pt", weights_only=True)
        again = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
        assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_what_the_first_refuses_all_do(folder, found):
    for rank in (0, 1):
        assert found["there"][rank]["end"] == 1
        assert "FileExistsError: out: " in found["there"][rank]["said"]
        assert found["locked"][rank]["end"] == 1
        assert f"BlockingIOError: {folder / 'whole'}: another process is at work" in found["locked"][rank]["said"]
