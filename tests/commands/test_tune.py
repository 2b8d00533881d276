"""``tutelage tune``: a table, a recipe that runs, and one line for a mistake."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tutelage.cli import main
from tutelage.data import Images, ImageSet, fashion_subset, loaders
from tutelage.tuning import tune

pytest.importorskip("optuna")

RECIPE = """
student: {class_path: SmallCNN, init_args: {width: 2}}
teacher: {class_path: SmallCNN, init_args: {width: 3}}
data: {class_path: fashion_loaders, init_args: {limit: 64, validation: 20, batch_size: 32}}
losses:
- {class_path: TaskLoss}
- {class_path: KD, init_args: {temperature: 4.0}}
training: {epochs: 1, progress: false}
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TUTELAGE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    whole = fashion_subset()
    parts = (Images(part.images[:n], part.labels[:n]) for part, n in ((whole.train, 200), (whole.test, 60)))
    few = ImageSet(*parts, whole.classes)
    monkeypatch.setattr(loaders, "fashion_subset", lambda: few)


def failed(capsys, *arguments: str) -> str:
    assert main(["tune", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("tutelage: ")
    assert said.err.count("\n") == 1
    return said.err


def test_a_study_prints_its_best_trials_and_what_they_are_worth(tmp_path, capsys):
    words = ["tune", "mine.yaml", "--search", "temperature", "--search", "training.lr=0.001..0.1:log"]
    assert main([*words, "--trials", "2", "--out", "study", "--seed", "3"]) == 0
    said = capsys.readouterr()
    assert max(map(len, said.out.splitlines())) <= 80
    assert all(word in said.out for word in ("trial", "accuracy", "losses.1.temper", "training.lr", "seconds"))
    assert "trial 2 of 2 ended after 1 epochs" in said.err
    assert "on validation" in said.err
    assert "optimistic; the test data were not looked at" in " ".join(said.err.split())
    assert "study/best.yaml once" in said.err
    # the same study in Python
    again = tune("mine.yaml", words[3::2], trials=2, out="again", seed=3)
    trials = json.loads((tmp_path / "study" / "trials.json").read_text())["trials"]
    assert [t["values"] for t in trials] == [t.values for t in again.trials]
    capsys.readouterr()
    assert main(["distill", "study/best.yaml", "--out", "final"]) == 0
    result = json.loads((tmp_path / "final" / "result.json").read_text())
    assert result["best"]["samples"] == 60  # the test data


def test_set_and_trust_reach_the_recipe(tmp_path, capsys):
    (tmp_path / "wide.py").write_text(
        "from torch import nn\nfrom tutelage.models import SmallCNN\ndef wide() -> nn.Module:\n    return SmallCNN(3)\n"
    )
    words = ["mine.yaml", "--search", "weights", "--trials", "1", "--out", "study", "--set", "student=wide.wide"]
    assert "--trust wide" in failed(capsys, *words)
    assert main(["tune", *words, "--trust", "wide"]) == 0
    assert "student: wide.wide" in (tmp_path / "study" / "best.yaml").read_text()


def test_a_study_goes_on(capsys):
    words = ["mine.yaml", "--search", "weights", "--out", "study"]
    assert main(["tune", *words, "--trials", "1"]) == 0
    capsys.readouterr()
    assert "use --resume to go on with it" in failed(capsys, *words, "--trials", "2")
    assert main(["tune", *words, "--trials", "2", "--resume"]) == 0
    said = capsys.readouterr()
    assert "trial 2 of 2" in said.err
    assert "trial 1 of 2" not in said.err
    assert "best of 2 trials" in said.err


def test_a_timeout_is_in_seconds(capsys):
    words = ["tune", "mine.yaml", "--search", "weights", "--out", "study", "--trials", "9", "--timeout", "0.001"]
    assert main(words) == 0
    assert "best of 1 trials" in capsys.readouterr().err


def test_mistakes_are_one_line(capsys):
    out = ["--out", "study"]
    assert "nearest: 'weights'" in failed(capsys, "mine.yaml", "--search", "weight", *out)
    wrong = "losses.1.init_args.temprature=1..10"
    assert "nearest: 'temperature'" in failed(capsys, "mine.yaml", "--search", wrong, *out)
    assert "trials=0" in failed(capsys, "mine.yaml", "--search", "weights", "--trials", "0", *out)
    assert "no recipe" in failed(capsys, "yours.yaml", "--search", "weights", *out)
    for missing in (["--search", "weights"], out):
        with pytest.raises(SystemExit) as ended:
            main(["tune", "mine.yaml", *missing])
        assert ended.value.code == 2
    assert not os.path.exists("study")


def test_ctrl_c_ends_with_130_and_the_way_on(monkeypatch, capsys):
    from tutelage import tuning

    whole, begun = tuning._train, []

    def stopped(*given):
        begun.append(1)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        whole(*given)

    monkeypatch.setattr(tuning, "_train", stopped)
    words = ["tune", "mine.yaml", "--search", "weights", "--out", "study", "--trials", "3"]
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    try:
        assert main(words) == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert "stopped in trial 2 of 3; 1 are kept in study, go on with resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0


def test_every_argument_is_explained(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tune", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= 80
