"""Of what is on disk a byte is changed, or the end is missing: it is noticed with the file's name, or does no harm.

Every case does what a user would do next with the file, and compares what comes of it with what comes of the whole one.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import SAID, judged, same
from torch import nn

from tutelage import KD, Distillation, TaskLoss, Training, cli
from tutelage.checked import checksum, read_json, read_weights, write_json
from tutelage.engine import fit
from tutelage.models import load_weights, save_weights
from tutelage.run import Epoch

GENERATOR = torch.Generator().manual_seed(0)
DATA = [(torch.randn(8, 4, generator=GENERATOR), torch.arange(8) % 3, torch.arange(8 * n, 8 * n + 8)) for n in range(2)]


class Stopped(Exception):
    pass


def network(width: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Dropout(0.2), nn.Linear(width, 3))


def train(out: Path, stop: int | None = None, **how: Any):
    def after(line: Epoch) -> None:
        if line.epoch == stop:
            raise Stopped

    training = Training(
        epochs=3, optimizer="adamw", scheduler="onecycle", keep_every=1, progress=False, cpu=True, gradient_shares=False
    )
    d = Distillation(network(), network(7, seed=1), [TaskLoss(), KD()])
    return fit(d, DATA, DATA, training=training, out=out, after_epoch=after, **how)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after two epochs of three."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stopped):
        train(out, stop=1)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return outcome(train(tmp_path_factory.mktemp("whole") / "run"), tmp_path_factory.getbasetemp() / "whole0" / "run")


def outcome(run, out: Path) -> Any:
    """All that a run leaves, the clock's words aside."""
    kept = {n: read_weights(file) for n, file in run.kept.items() if isinstance(file, Path)}
    written = [{**line, "seconds": 0} for line in json.loads((out / "history.json").read_text())]
    return [run.last, run.best, run.best_value, kept, written, read_json(out / "run.json")]


def test_a_run_that_is_resumed(stopped, whole, tmp_path):
    run = tmp_path / "run"

    def restore() -> None:
        shutil.rmtree(run)
        shutil.copytree(stopped, run)

    def go_on() -> Any:
        before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
        try:
            made = train(run, resume=True)
        except SAID:
            after = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
            changed = {f.name for f in before if after.get(f) != before[f]}
            assert changed <= {"history.json"}  # an error removes nothing
            raise
        return outcome(made, run)

    shutil.copytree(stopped, run)
    assert same(go_on(), whole)
    restore()
    files = sorted(f for f in run.rglob("*") if f.is_file() and f.name != "lock")
    assert {f.name for f in files} == {
        *("run.json", "history.json", "student-last.safetensors", "student-best.safetensors"),
        *("student-epoch-0001.safetensors", "student-epoch-0002.safetensors"),
        *("model.safetensors", "optimizer.bin", "own-0.pt", "random_states_0.pkl", "files.json"),
    }
    found = judged(files, go_on, restore)
    assert found.keys() <= {"noticed", "harmless"}
    assert found["noticed"] >= 140
    assert found["harmless"] >= 15  # all those of the history, which is made again


def test_a_run_that_is_used_when_it_has_ended(tmp_path):
    run = tmp_path / "run"
    train(run)
    save_weights(network(), tmp_path / "saved.safetensors")

    def load() -> Any:
        state = {}
        for file in files:
            model = network(seed=3)
            load_weights(model, file)
            state[file.name] = model.state_dict()
        return state

    files = [run / "student-best.safetensors", run / "student-last.safetensors", tmp_path / "saved.safetensors"]
    found = judged(files, load)
    assert found.keys() <= {"noticed", "harmless"}
    assert found["noticed"] >= 40


def test_the_error_says_what_can_be_done(stopped, tmp_path, whole, capsys, monkeypatch):
    run = shutil.copytree(stopped, tmp_path / "run")
    (checkpoint,) = (run / "checkpoints").iterdir()
    model = checkpoint / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=rf"{model} does not have its checksum; remove this folder to begin .* anew"):
        train(run, resume=True)
    # a crash between the renaming and the removal leaves the checkpoint before, too
    shutil.copytree(next((stopped / "checkpoints").iterdir()), checkpoint.with_name("step-00000002"))
    with pytest.raises(ValueError, match=rf"{model} .*; remove this folder to go on from step-00000002"):
        train(run, resume=True)
    for folder in (run / "checkpoints").iterdir():
        shutil.rmtree(folder)
    assert same(outcome(train(run, resume=True), run), whole)
    # the command line makes one line of it
    (run / "run.json").write_text("{}x")
    monkeypatch.setattr("tutelage.recipe.load", lambda *given: lambda: train(run, resume=True))
    assert cli.main(["distill", "kd"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"tutelage: resume: {run / 'run.json'} is damaged: ")
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_student_that_is_gone_is_not_passed_over(name, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / f"student-{name}.safetensors").unlink()
    with pytest.raises(ValueError, match=f"resume: .*student-{name}.safetensors"):
        train(run, resume=True)


class Canary:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


@pytest.mark.parametrize("name", ["optimizer.bin", "own-0.pt", "random_states_0.pkl"])
@pytest.mark.parametrize("plain", [True, False])
def test_nothing_that_is_put_into_a_checkpoint_is_executed(name, plain, stopped, tmp_path, whole):
    """With checksums that are right, as somebody who means it would write them."""
    run, sign = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "executed"
    (checkpoint,) = (run / "checkpoints").iterdir()
    if plain:
        (checkpoint / name).write_bytes(pickle.dumps(Canary(sign), protocol=2))
    else:
        torch.save(Canary(sign), checkpoint / name)
    sums = {
        f.name: {"bytes": f.stat().st_size, "crc32": checksum(f)}
        for f in checkpoint.iterdir()
        if f.name != "files.json"
    }
    write_json(checkpoint / "files.json", {"files": sums}, checked=True)
    if name == "random_states_0.pkl":  # accelerate passes it over; the engine has the generators in its own file
        assert same(outcome(train(run, resume=True), run), whole)
    else:
        with pytest.raises(
            ValueError, match=f"the checkpoint {checkpoint} does not fit this distillation or is damaged"
        ):
            train(run, resume=True)
    assert not sign.exists()
