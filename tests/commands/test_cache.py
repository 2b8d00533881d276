"""``tutelage cache``: what is kept ahead is what a training reads, and one line for a mistake."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from tutelage.cache import Cached
from tutelage.cache_folder import Cache
from tutelage.cli import main
from tutelage.data import Images, ImageSet, fashion_subset, loaders
from tutelage.models import SmallCNN
from tutelage.teachers import Frozen


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TUTELAGE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    whole = fashion_subset()
    parts = (Images(part.images[:n], part.labels[:n]) for part, n in ((whole.train, 140), (whole.test, 30)))
    few = ImageSet(*parts, whole.classes)
    monkeypatch.setattr(loaders, "fashion_subset", lambda: few)


def small(*more):
    changes = ["teacher_training.epochs=1", "training.epochs=1", *more]
    return [word for change in changes for word in ("--set", change)]


VALIDATION = "data.init_args.data.init_args.validation=40"


def failed(capsys, *arguments: str) -> str:
    assert main(["cache", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    line = said.err.splitlines()[-1]
    assert line.startswith("tutelage: ")
    return line


def test_what_is_kept_ahead_is_all_that_a_training_reads(capsys, monkeypatch):
    words = ["cache", "cached", *small(VALIDATION)]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "teacher_weights: runs/cache/teacher.safetensors" in said.err
    assert "views: 4, seed: 0" in said.err
    assert max(map(len, said.out.splitlines())) <= 80
    assert "400" in said.out
    assert Cache("runs/cache").held()[0].rows == 4 * 100

    def asked(*given):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(Frozen, "lessons", asked)
    weights = ["teacher_weights=runs/cache/teacher.safetensors", "teacher_training=null"]
    changes = [word for change in weights for word in ("--set", change)]
    assert main(["distill", "cached", *small(VALIDATION)[2:], *changes, "--set", "training.epochs=5"]) == 0
    capsys.readouterr()
    assert main([*words, "--json"]) == 0  # nothing is trained or asked again
    assert json.loads(capsys.readouterr().out)["tensors"][0]["rows"] == 400


def test_a_recipe_without_a_cache_gets_one(capsys):
    words = ["cache", "kd", *small("data.init_args.validation=40"), "--out", "c", "--views", "2"]
    assert main([*words, "--codec", "top_k", "--k", "3", "--temperature", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["codec"] == {"name": "top_k", "k": 3, "temperature": 4.0}
    assert (found["views"], found["seed"]) == (2, 0)
    (line,) = found["tensors"]
    assert line["rows"] == 200
    assert 0 < line["nats"] <= line["most_nats"]
    assert 0 < line["mass"] < 1
    assert "of codec top_k, k=3, temperature=4.0, and this is codec int8" in failed(
        capsys, *words[1:], "--codec", "int8"
    )


def test_what_every_stage_reads_is_kept(capsys):
    changes = small("data.init_args.validation=40")
    assert main(["cache", "fit_nets_two_stages", *changes, "--out", "c", "--views", "1"]) == 0
    found = {line.address: line.rows for line in Cache("c").held()}
    assert found.pop("@logits") == 100
    assert set(found.values()) == {100}
    assert found


def test_a_check_names_what_is_damaged(capsys):
    role = Cached(SmallCNN(width=2), "c")
    held = Cache("c", {"teacher": {"class": "X", "sha256": "0" * 64}, "seed": 0, "views": 1, "codec": role.codec.about})
    held.write("@logits", torch.arange(9).numpy(), torch.randn(9, 5), torch.zeros(9).numpy().astype("u4"))
    assert main(["cache", "--check", "c"]) == 0
    assert "X 000000000000" in capsys.readouterr().out
    with open("c/00-logits-00000.rows", "r+b") as file:
        file.seek(30)
        file.write(b"\xff\x01")
    assert "c/00-logits-00000.rows is damaged" in failed(capsys, "--check", "c")
    assert "there is none in nowhere" in failed(capsys, "--check", "nowhere")


def test_mistakes_are_one_line(capsys):
    assert "give a recipe to fill a cache, or --check" in failed(capsys)
    assert "give a recipe" in failed(capsys, "kd", "--check", "c")
    assert "give --out FOLDER" in failed(capsys, "kd", "--set", "data.init_args.validation=40")
    assert "views=2: the recipe's data have 4" in failed(capsys, "cached", "--views", "2", "--set", VALIDATION)
    assert "procedure: a cache is for one training" in failed(
        capsys, "born_again", "--out", "c", "--set", "data.init_args.validation=40"
    )
    assert "whose teacher is a network, got NoneType" in failed(
        capsys, "label_smoothing", "--out", "c", "--set", "data.init_args.validation=40"
    )
    assert "derives the teacher's outputs" in failed(
        capsys, "jacobian", "--out", "c", *small("data.init_args.validation=40")
    )
    assert not os.path.exists("c/manifest.json")


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(capsys, monkeypatch):
    real, begun = Cached.lessons, []

    def stopped(self, batch, student):
        begun.append(1)
        if len(begun) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batch, student)

    monkeypatch.setattr(Cached, "lessons", stopped)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    try:
        assert main(["cache", "cached", *small(VALIDATION)]) == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert "what was done is in runs/cache, and the same command goes on there" in capsys.readouterr().err
    assert 0 < Cache("runs/cache").held()[0].rows < 400
    assert main(["cache", "cached", *small(VALIDATION)]) == 0
    assert Cache("runs/cache").held()[0].rows == 400


def test_every_argument_is_explained(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["cache", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= 80
