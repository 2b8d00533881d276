from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tutelage import Distillation, Training
from tutelage.checkpoint import RunFolder, write_json, write_weights
from tutelage.engine import fit

ABOUT = {"student": "Linear", "teacher": "Linear", "losses": ["KD"], "parameters": 15, "training": {"lr": 0.1}}
DATA = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3) for i in range(4)]


def train(out, seed=0, **options):
    torch.manual_seed(seed)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    changes = {k: options.pop(k) for k in ("epochs", "checkpoint_every", "lr", "scheduler") if k in options}
    training = Training(**{"epochs": 2, "progress": False, "cpu": True, **changes})
    fit(Distillation(student, teacher), DATA, None, training=training, out=out, **options)
    return student


def contents(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def same(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# whose folder


def test_a_run_that_is_there_is_refused(tmp_path):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"already holds a run; use --resume .*--overwrite"):
        train(tmp_path / "run")
    assert contents(tmp_path / "run") == before
    with pytest.raises(ValueError, match="resume and overwrite: give one of them"):
        train(tmp_path / "run", resume=True, overwrite=True)
    assert contents(tmp_path / "run") == before


def test_overwrite_begins_again_and_leaves_what_is_not_ours(tmp_path):
    run = tmp_path / "run"
    train(run, epochs=4)
    notes = [run / "notes.txt", run / "student.onnx", run / "plots" / "a.png", run / "checkpoints" / "mine.bin"]
    for note in notes:
        note.parent.mkdir(exist_ok=True)
        note.write_text("precious")
    student = train(run, seed=3, overwrite=True)
    assert all(note.read_text() == "precious" for note in notes)
    assert [p.name for p in (run / "checkpoints").glob("step*")] == ["step-00000008"]
    assert len(json.loads((run / "history.json").read_text())) == 2
    fresh = nn.Linear(4, 3)
    fresh.load_state_dict(load_file(run / "student-last.safetensors"))
    same(fresh, student)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_other_peoples_files_are_refused_and_untouched(how, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "student.safetensors").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds other files and no run of ours \(student.safetensors\)"):
        train(tmp_path / "thesis", **how)
    assert contents(tmp_path) == before


def test_another_programs_run_is_not_overwritten(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-1" / "weights").write_text("years of work")
    (tmp_path / "run" / "run.json").write_text('{"id": 7}')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="not of a run of ours"):
        train(tmp_path / "run", overwrite=True)
    with pytest.raises(ValueError, match="has student None"):
        train(tmp_path / "run", resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_file_in_place_of_the_folder(how, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file; expected a folder"):
        train(tmp_path / "run", **how)
    assert (tmp_path / "run").read_text() == "a file"


def test_empty_and_missing_folders_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".run.77.part.json").write_text("{")  # by a process that died in its first moment
    for name in ("empty", "killed", "deep/and/new"):
        train(tmp_path / name)
        assert json.loads((tmp_path / name / "run.json").read_text())["losses"] == ["TaskLoss", "KD"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "nonsense"])
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_damaged_run_json_is_named(text, how, tmp_path):
    train(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"{how}: .*run.json is damaged"):
        train(tmp_path / "run", **{how: True})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("field", ["student", "teacher", "losses", "parameters"])
def test_another_kind_of_run_is_not_resumed(field, tmp_path):
    RunFolder(tmp_path / "run", ABOUT)
    with pytest.raises(
        ValueError, match=rf"resume: the run in .* has {field} {ABOUT[field]!r}, this one 'other'".replace("[", r"\[")
    ):
        RunFolder(tmp_path / "run", {**ABOUT, field: "other"}, resume=True)


def test_changed_settings_are_said(tmp_path, capsys):
    RunFolder(tmp_path / "run", ABOUT)
    capsys.readouterr()
    RunFolder(tmp_path / "run", ABOUT, resume=True)
    assert capsys.readouterr().err == ""
    RunFolder(tmp_path / "run", {**ABOUT, "training": {**ABOUT["training"], "log_every": 3}}, resume=True)
    assert "settings changed since the run began: log_every" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("lr", 0.2), ("epochs", 9), ("scheduler", "step"), ("seed", 5)])
def test_settings_that_the_checkpoint_brings_back_cannot_change(name, value, tmp_path):
    RunFolder(tmp_path / "run", ABOUT)
    with pytest.raises(ValueError, match=rf"resume: {name} was .* and is {value!r}"):
        RunFolder(tmp_path / "run", {**ABOUT, "training": {**ABOUT["training"], name: value}}, resume=True)


def test_a_run_of_constant_learning_rate_may_become_longer(tmp_path):
    expected = train(tmp_path / "whole", epochs=4, scheduler="constant")
    train(tmp_path / "run", epochs=2, scheduler="constant")
    same(train(tmp_path / "run", epochs=4, scheduler="constant", resume=True), expected)
    train(tmp_path / "cosine", epochs=2)
    with pytest.raises(ValueError, match="resume: epochs was 2 and is 4"):
        train(tmp_path / "cosine", epochs=4, resume=True)


# half-written and damaged


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    train(tmp_path / "run", epochs=2, scheduler="constant")
    half = tmp_path / "run" / "checkpoints" / ".step-00000012.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\x00" * 10)
    same(
        train(tmp_path / "run", epochs=2, scheduler="constant", resume=True),
        train(tmp_path / "short", epochs=2, scheduler="constant"),
    )
    assert not half.exists()
    longer = train(tmp_path / "run", epochs=3, scheduler="constant", resume=True)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000012"]
    same(longer, train(tmp_path / "whole", epochs=3, scheduler="constant"))


DAMAGES = [
    (name, damage)
    for name in ("model.safetensors", "optimizer.bin", "own-0.pt", "random_states_0.pkl")
    for damage in ("truncated", "missing", "flipped")
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_damaged_files_are_named(name, damage, tmp_path):
    train(tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    file = checkpoint / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(bytes(255 - b for b in content[:40]) + content[40:])
    with pytest.raises(ValueError, match=r"resume: the checkpoint .*step-00000008 .*damaged") as caught:
        train(tmp_path / "run", resume=True)
    assert name in str(caught.value)


def test_damaged_weights_of_the_best_student_are_named(tmp_path):
    train(tmp_path / "run")
    file = tmp_path / "run" / "student-last.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"student-last.safetensors is damaged"):
        train(tmp_path / "run", resume=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("where", ["save_state", "own", "rename"])
def test_a_failure_while_saving_leaves_the_checkpoint_before(error, where, tmp_path, monkeypatch):
    expected = train(tmp_path / "whole", epochs=4, checkpoint_every=3)
    save, saved_state, rename, count = torch.save, Accelerator.save_state, Path.rename, []

    def failing(original, condition):
        def call(*args, **kwargs):
            if condition(*args):
                count.append(1)
                if len(count) == 4:
                    if where == "save_state":
                        original(*args, **kwargs)  # everything but the last word
                    raise error
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if where == "save_state":
            patch.setattr(Accelerator, "save_state", failing(saved_state, lambda *_: True))
        elif where == "own":
            patch.setattr(torch, "save", failing(save, lambda _, file: "own-" in str(file)))
        else:
            patch.setattr(Path, "rename", failing(rename, lambda path, _: path.name.startswith(".step")))
        with pytest.raises(type(error)):
            train(tmp_path / "run", epochs=4, checkpoint_every=3)
    whole = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert whole == ["step-00000006"]  # after 3, 4 (the end of an epoch) and 6
    same(train(tmp_path / "run", epochs=4, checkpoint_every=3, resume=True), expected)


def test_only_the_latest_checkpoint_is_kept(tmp_path):
    train(tmp_path / "run", epochs=3, checkpoint_every=1)
    (only,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert only.name.startswith("step-00000012")
    listed = json.loads((only / "files.json").read_text())
    assert listed["files"] == {
        f.name: {"bytes": f.stat().st_size, "crc32": zlib.crc32(f.read_bytes())}
        for f in only.iterdir()
        if f.name != "files.json"
    }


def test_a_checkpoint_from_before_there_were_checksums_is_read(tmp_path):
    expected = train(tmp_path / "whole", epochs=4, scheduler="constant")
    train(tmp_path / "run", epochs=2, scheduler="constant")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    sizes = {f.name: f.stat().st_size for f in checkpoint.iterdir() if f.name != "files.json"}
    (checkpoint / "files.json").write_text(json.dumps(sizes))
    mark = tmp_path / "run" / "run.json"
    mark.write_text(json.dumps({k: v for k, v in json.loads(mark.read_text()).items() if k != "checksum"}))
    weights = tmp_path / "run" / "student-last.safetensors"
    save_file(load_file(weights), weights)
    same(train(tmp_path / "run", epochs=4, scheduler="constant", resume=True), expected)


# single files


def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "student.safetensors"
    write_weights(file, {"a": torch.ones(3)})

    def full(state, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tutelage.checked.save_file", full)
    with pytest.raises(OSError, match="No space"):
        write_weights(file, {"a": torch.zeros(3)})
    assert torch.equal(load_file(file)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": torch.ones(1)})
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_shared_and_strided_tensors_are_written_as_they_read(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "whole": base,
        "same": base,
        "row": base[1],
        "transposed": base.T,
        "empty": torch.zeros(0),
        "scalar": torch.tensor(3),
        "channels_last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    write_weights(tmp_path / "a.safetensors", state)
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "crc32"}


def test_tied_weights_load_strictly(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    def run(**how):
        torch.manual_seed(0)
        student = Tied()
        training = Training(epochs=2, progress=False, cpu=True)
        fit(Distillation(student, nn.Linear(4, 4)), DATA, None, training=training, out=tmp_path / "run", **how)
        return student

    student = run()
    fresh = Tied()
    fresh.load_state_dict(load_file(tmp_path / "run" / "student-last.safetensors"), strict=True)
    same(fresh, student)
    same(run(resume=True), student)
