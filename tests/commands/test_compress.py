"""The command `tutelage compress`: what it makes of its words, what it writes, and how it ends."""

from __future__ import annotations

import json

import pytest
import torch

from tutelage import KD
from tutelage.cli import main
from tutelage.commands import compress as command
from tutelage.deploy import compress as compressing
from tutelage.deploy.candidates import Prune, Shrink
from tutelage.deploy.limits import Limits
from tutelage.models import SmallCNN, save_weights

RECIPE = """
student: {class_path: SmallCNN, init_args: {width: 2}}
teacher: {class_path: SmallCNN, init_args: {width: 6}}
data: {class_path: fashion_loaders, init_args: {limit: 200, validation: 100, batch_size: 50}}
losses: [{class_path: TaskLoss}, {class_path: KD}]
teacher_training: {epochs: 1, lr: 0.01, progress: false}
training: {epochs: 1, lr: 0.01, progress: false}
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return str(file)


@pytest.fixture
def given(monkeypatch):
    """What the command asks for; nothing is done."""

    class Asked(Exception):
        pass

    found = {}

    def asked(*args, **named):
        found.update(named, positional=args)
        raise Asked

    monkeypatch.setattr(compressing, "compress", asked)

    def ask(*words):
        with pytest.raises(Asked):
            main(["compress", *words])
        return found

    return ask


def failed(capsys, *words: str) -> str:
    assert main(["compress", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


# What is asked for


def test_words_become_candidates_limits_and_settings(given, recipe, tmp_path):
    found = given(
        *(recipe, "--prune", "0.3", "--prune", "0.5", "--student", "SmallCNN(width=4)", "--student", "resnet8"),
        *("--max-size", "200kB", "--max-latency", "500us", "--min-accuracy", "70%", "--precision", "int8"),
        *("--out", str(tmp_path / "out"), "--set", "training.epochs=3", "--seed", "5", "--resume"),
    )
    *pruned, four, eight = found["candidates"]
    assert pruned == [Prune(0.3), Prune(0.5)]
    assert [four.label, eight.label] == ["SmallCNN-width=4", "resnet8"]
    assert four.model.linear.in_features == 16
    assert found["limits"] == Limits(200_000, 0.5, 0.7)
    assert found["precisions"] == ("int8",)
    assert (found["training"].epochs, found["training"].seed, found["teacher_training"].epochs) == (3, 5, 1)
    assert found["out"] == str(tmp_path / "out")
    assert found["resume"] is True
    assert [type(loss).__name__ for loss in found["losses"]] == ["TaskLoss", "KD"]
    assert isinstance(found["losses"][1], KD)
    assert found["about"]["init_args"]["limit"] == 200
    teacher, train, validation, test = found["positional"]
    assert teacher.linear.in_features == 24
    assert [len(part.dataset) for part in (train, validation, test)] == [200, 100, 3000]


def test_without_candidates_the_recipes_own_student_is_one(given, recipe, tmp_path):
    torch.manual_seed(9)
    save_weights(SmallCNN(width=2), tmp_path / "begun.safetensors")
    save_weights(SmallCNN(width=6), tmp_path / "teacher.safetensors")
    weights = [
        f"{who}_weights={tmp_path / file}.safetensors" for who, file in (("student", "begun"), ("teacher", "teacher"))
    ]
    words = [recipe, "--max-size", "1MB", "--out", str(tmp_path / "out")]
    found = given(*words, "--set", weights[0], "--set", weights[1])
    (own,) = found["candidates"]
    assert isinstance(own, Shrink)
    assert own.label == "student"
    torch.manual_seed(9)
    assert torch.equal(own.model.linear.weight, SmallCNN(width=2).linear.weight)
    assert torch.equal(found["positional"][0].linear.weight, SmallCNN(width=6).linear.weight)
    assert found["precisions"] == ("float32", "int8")
    assert [c.label for c in given(*words, "--prune", "0.5")["candidates"]] == ["prune-0.5", "student"]


def test_first_weights_do_not_depend_on_the_other_candidates(given, recipe, tmp_path):
    words = [recipe, "--max-size", "1MB", "--out", str(tmp_path / "out"), "--student"]
    alone = given(*words, "SmallCNN(width=4)")["candidates"][0].model.linear.weight
    after = given(*words, "SmallCNN(width=8)", "--student", "SmallCNN(width=4)")["candidates"][1].model.linear.weight
    assert torch.equal(alone, after)


# Mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give max_size, max_latency or min_accuracy"),
        (["--max-size", "200kX"], "max_size='200kX': no unit 'kX'; nearest: 'kB'"),
        (["--max-latency", "2"], "a unit is missing"),
        (["--min-accuracy", "70"], "expected a share such as 0.7, or 70%"),
        (["--max-size", "1MB", "--prune", "1.5"], "prune-1.5: ratio=1.5: expected a share between 0 and 1"),
        (["--max-size", "1MB", "--prune", "0.5", "--prune", "0.5"], "two are called 'prune-0.5'"),
        (["--max-size", "1MB", "--student", "SmalCNN(width=4)"], "no model 'SmalCNN'; nearest: 'SmallCNN'"),
        (["--max-size", "1MB", "--set", "training.epoch=3"], "training.epoch: no such field"),
    ],
)
def test_mistakes_are_one_line(capsys, recipe, tmp_path, words, said):
    assert said in failed(capsys, recipe, "--out", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("deep_mutual_learning", "teacher: compress needs a recipe whose teacher is a network"),
        ("dafl", "source: compress distils from the teacher and the data alone"),
        ("teacher_assistant", "procedure: compress distils"),
    ],
)
def test_recipes_that_train_in_another_way_are_refused(capsys, tmp_path, name, said):
    assert said in failed(capsys, name, "--max-size", "1MB", "--out", str(tmp_path / "out"))


def test_a_folder_is_needed(capsys, recipe):
    assert "out: compress needs a folder; give --out FOLDER" in failed(capsys, recipe, "--max-size", "1MB")


def test_every_argument_is_explained(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compress", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--prune", "--student", "--max-size", "--max-latency", "--min-accuracy", "--precision", "--resume"):
        assert flag in said


# A real one


@pytest.fixture
def exporting():
    for package in ("torch_pruning", "onnx", "onnxscript", "onnxruntime", "matplotlib"):
        pytest.importorskip(package)


def test_a_file_within_limits_and_then_limits_that_none_meets(exporting, recipe, tmp_path, capsys):
    out = tmp_path / "out"
    words = [recipe, "--prune", "0.5", "--student", "SmallCNN(width=2)", "--precision", "float32", "--out", str(out)]
    assert main(["compress", *words, "--max-size", "100kB", "--min-accuracy", "1%"]) == 0
    said = capsys.readouterr()
    for name in ("teacher float32", "prune-0.5 float32", "SmallCNN-width=2 float32"):
        assert name in said.out
    body = json.loads((out / "compress.json").read_text())
    assert said.out.count("chosen") == 1
    assert f"{body['chosen']}: " in said.err
    assert (out / "student.onnx").stat().st_size < 100_000
    assert "prune-0.5" in (out / "report.html").read_text(encoding="utf-8")
    assert json.loads((out / "report.json").read_text())["rows"][0]["kind"] == "teacher"
    assert body["test"]["samples"] == 3000

    assert "holds a compression already" in failed(capsys, *words, "--max-size", "100kB")

    trained = {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")}
    words += ["--resume", "--min-accuracy", "100%"]
    assert main(["compress", *words]) == 1
    said = capsys.readouterr().err
    assert "no file meets the limits; the nearest is " in said
    assert "points under the 100 % of min_accuracy" in said
    assert not (out / "student.onnx").exists()
    assert json.loads((out / "compress.json").read_text())["chosen"] is None
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.safetensors")} == trained
    with pytest.raises(command.LimitsMissed, match="no file meets the limits") as missed:
        command.compress(recipe, [0.5], ["SmallCNN(width=2)"], "1B", precision=["float32"], out=str(out), resume=True)
    assert missed.value.exit_status == 1
