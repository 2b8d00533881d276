"""``tutelage gap``: the table, its JSON, and what is said of mistakes."""

from __future__ import annotations

import json

import pytest
import torch

from tutelage.cli import main
from tutelage.models import SmallCNN, save_weights


@pytest.fixture(autouse=True)
def usual(monkeypatch, tmp_path):
    monkeypatch.delenv("TUTELAGE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    torch.manual_seed(0)
    save_weights(SmallCNN(width=4), tmp_path / "teacher.safetensors")
    monkeypatch.chdir(tmp_path)


PAIR = ["SmallCNN(width=4)@teacher.safetensors", "SmallCNN(width=2)"]
SHORT = ["--limit", "100", "--epochs", "1", "--samples", "100", "--temperature", "2"]


def test_the_table_fits_a_terminal_and_ends_with_a_recommendation(capsys):
    assert main(["gap", *PAIR, *SHORT]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for part in ("answers alone, T=2", "labels alone", "linear:input", "parameters", "heuristics"):
        assert part in said
    assert "Give the teacher its weights" in said  # those of an untrained network are none


def test_json(capsys):
    assert main(["gap", *PAIR, *SHORT, "--temperature", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [line["temperature"] for line in found["taught"]] == [2.0, 1.0]
    assert found["samples"] == 1000
    assert found["rule"] == "weights"
    assert found["student_size"]["parameters"] == sum(p.numel() for p in SmallCNN(width=2).parameters())
    assert {probe["network"] for probe in found["probes"]} == {"teacher", "student"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["SmalCNN", "SmallCNN"], "'SmallCNN'"),
        ([*PAIR, "--data", "fashion"], "'fashion_loaders'"),
        ([*PAIR, "--epochs", "0"], "epochs=0"),
        ([*PAIR, "--temperature", "0"], "temperatures=[0.0]"),
        ([*PAIR, "--limit", "0"], "limit=0"),
        (["SmallCNN@none.safetensors", "SmallCNN"], "no checkpoint at none.safetensors"),
    ],
)
def test_mistakes(capsys, words, expected):
    assert main(["gap", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert expected in said.err
