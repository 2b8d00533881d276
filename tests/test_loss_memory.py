"""The memory benchmark compares like with like: each straightforward formula gives the library's value."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "loss_memory.py"


def script():
    spec = importlib.util.spec_from_file_location("loss_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["loss_memory"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


loss_memory = script()


@pytest.mark.parametrize("name", loss_memory.METHODS)
def test_the_straightforward_formula_is_the_same_loss(name):
    loss_memory.agrees(name)


def test_a_formula_of_another_value_is_noticed(monkeypatch):
    monkeypatch.setattr(loss_memory.METHODS["PKT"], "straight", lambda s, t: 1.01 * loss_memory.pkt(s, t))
    with pytest.raises(AssertionError):
        loss_memory.agrees("PKT")
