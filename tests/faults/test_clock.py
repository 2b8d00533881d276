"""A clock that goes back, and files of any date, change nothing: what is newest is said by names and contents."""

from __future__ import annotations

import json
import os
import random
import shutil
import time

import cache_cases
import comparing_cases
import pytest
import training_cases
from killing import read, same, same_figures, timeless
from safetensors.torch import load_file

from tutelage.cli import main as command_line
from tutelage.comparison import pool
from tutelage.data import loaders

DAY = 86_400


@pytest.fixture(autouse=True)
def backwards(monkeypatch):
    """Each look at the clock sees an hour less than the one before."""
    now = [time.time()]

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(time, "time_ns", lambda: int(earlier() * 1e9))


def redate(folder, seed=0):
    """Give everything in a folder another date, in the past or in the future."""
    chance, today = random.Random(seed), 1_700_000_000
    for path in sorted(folder.rglob("*")):
        date = today + chance.randint(-4000, 4000) * DAY
        os.utime(path, (date, date))


class Stop(Exception):
    pass


class Steps:
    """Ends a training before the step after ``most``."""

    def __init__(self, most=10**9):
        self.most, self.count = most, 0

    def __call__(self):
        if self.count == self.most:
            raise Stop
        self.count += 1


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path):
    training_cases.train(tmp_path / "whole")
    run, older = tmp_path / "run", tmp_path / "older"
    with pytest.raises(Stop):
        training_cases.train(run, Steps(3))
    shutil.copytree(run / "checkpoints" / "step-00000003", older)
    with pytest.raises(Stop):
        training_cases.train(run, Steps(4))
    newest = run / "checkpoints" / "step-00000006"
    assert [path.name for path in newest.parent.iterdir()] == [newest.name]
    shutil.copytree(older, newest.with_name("step-00000003"))  # as if it had been killed before that was removed
    redate(run)
    for path, date in ((newest, 0), (newest.with_name("step-00000003"), 4_000_000_000)):
        os.utime(path, (date, date))
    steps = Steps()
    training_cases.train(run, steps)
    assert steps.count == 16 - 6
    same(load_file(run / "student.safetensors"), load_file(tmp_path / "whole" / "student.safetensors"))
    same_figures(run / "history.json", tmp_path / "whole" / "history.json")  # which looks for negative times as well


def test_a_finished_run_stays_finished(tmp_path):
    training_cases.train(tmp_path / "run", epochs=1)
    redate(tmp_path / "run", seed=1)
    steps = Steps()
    training_cases.train(tmp_path / "run", steps, epochs=1)
    assert steps.count == 0


def test_a_cache_stays_valid(tmp_path, monkeypatch):
    whole = cache_cases.filled(tmp_path / "cache").cache.held()
    redate(tmp_path, seed=2)
    calls, exact = [], cache_cases.exact

    def taught():
        network = exact()
        network.register_forward_hook(lambda module, given, output: calls.append(len(output)))
        return network

    monkeypatch.setattr(cache_cases, "exact", taught)
    assert cache_cases.filled(tmp_path / "cache").cache.held() == whole
    assert sum(calls) == 0


def test_a_comparison_runs_nothing_again_and_no_time_is_negative(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loaders, "fashion_subset", comparing_cases.few_images)
    monkeypatch.setattr(pool._Processes, "__call__", comparing_cases.in_this_process)
    fields = {**comparing_cases.COMPARISON, "seeds": 1}
    fields["methods"] = {"KD": {}}
    file, out = tmp_path / "comparison.yaml", tmp_path / "out"
    file.write_text(json.dumps(fields))
    call = ["compare", str(file), "--out", str(out), "--workers", "1", "--no-timing"]
    assert command_line(call) == 0
    said = capsys.readouterr()
    assert "(-" not in said.err + said.out
    ran = (tmp_path / "out.ran").read_text()
    assert len(ran.splitlines()) == 3
    before = timeless(read(out / "comparison.json"))
    redate(tmp_path, seed=3)
    assert command_line(call) == 0
    assert (tmp_path / "out.ran").read_text() == ran
    assert timeless(read(out / "comparison.json")) == before
