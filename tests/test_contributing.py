"""The tutorial of CONTRIBUTING.md, done as it says."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

import tutelage
from tutelage import catalogue, recipe

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
FILES = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The tutorial's files in a folder that can be imported from; nothing of it stays afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(catalogue, "_METHODS", dict(catalogue._METHODS))
    yield tmp_path
    for name in ("cka", "test_cka"):
        sys.modules.pop(name, None)


def code_lines(source: str) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    tree = ast.parse(source)
    documented = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {
        line
        for node in documented
        if ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in docstrings for n, line in lines)


def test_code_lines_are_counted():
    assert code_lines('"""Text.\n\nMore."""\n\nx = 1  # one\n# two\ndef f():\n    """Text."""\n    return x\n') == 3


def test_the_tutorial_has_a_method_a_test_and_a_recipe():
    assert set(FILES) == {"cka.py", "test_cka.py", "cka.yaml"}


def test_a_method_is_thirty_lines():
    assert code_lines(FILES["cka.py"]) <= 30


def test_the_method_is_not_in_the_package_yet():
    # otherwise the tutorial teaches what is there already: choose another
    assert not hasattr(tutelage, "CKA")
    assert not importlib.util.find_spec("cka")


def test_the_method_enters_the_catalogue_with_its_paper(folder):
    module = importlib.import_module("cka")
    entry = catalogue._METHODS["CKA"]
    assert entry.thing is module.CKA
    assert (entry.role, entry.year) == ("losses", 2024)
    assert entry.section == "2.3+"
    assert entry.recipe == "cka.yaml"
    assert entry.summary.endswith(".")
    # in a folder of one's own it is not the package's, as the tutorial says
    assert "CKA" not in [m.name for m in tutelage.methods()]


def test_in_the_folder_that_the_tutorial_names_the_package_lists_it(folder, monkeypatch):
    from tutelage.knowledge import relation

    monkeypatch.setattr(relation, "__path__", [*relation.__path__, str(folder)])
    module = importlib.import_module("tutelage.knowledge.relation.cka")
    try:
        assert [m.thing for m in tutelage.methods() if m.name == "CKA"] == [module.CKA]
    finally:
        sys.modules.pop("tutelage.knowledge.relation.cka")
        del relation.cka


def test_the_tutorials_test_passes(folder):
    importlib.import_module("test_cka").test_cka()


def test_the_tutorials_test_can_fail(folder, monkeypatch):
    module = importlib.import_module("test_cka")
    monkeypatch.setattr(module, "cka_distance", lambda student, teacher: (student.sum() - teacher.sum()).square())
    with pytest.raises(AssertionError):
        module.test_cka()


def test_the_recipe_is_refused_without_trust(folder):
    with pytest.raises(recipe.RecipeError, match="--trust cka"):
        recipe.load("cka.yaml")


def test_the_recipe_trains(folder):
    short = ["data.init_args.limit=320", "training.epochs=1", "teacher_training.epochs=1", "training.progress=false"]
    result = recipe.load("cka.yaml", [*short, "teacher_training.progress=false", "out=run"], trust=["cka"])()
    losses = result.history[-1]["losses"]
    assert set(losses) == {"loss", "TaskLoss", "CKA"}
    assert losses["loss"] == pytest.approx(losses["TaskLoss"] + 2.0 * losses["CKA"], rel=1e-4)
    assert 0 < losses["CKA"] < 1
    assert result.metrics.samples == 3000
    assert (folder / "run" / "student" / "student.safetensors").is_file()


def test_the_recipe_is_as_the_packaged_ones():
    own, kd = yaml.safe_load(FILES["cka.yaml"]), recipe.read("kd")
    for field in ("student", "teacher", "data", "teacher_training", "training"):
        assert own[field] == kd[field], field


def test_the_places_that_the_house_rules_name_exist():
    root = PAGE.parent
    text = PAGE.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:src|tests|docs|scripts|\.ci)/[\w./-]+)`", text)
    assert len(paths) > 5
    for path in paths:
        assert (root / path).exists() or path.endswith("/cka.py"), path
    targets = re.findall(r"`make ([\w-]+)`", text)
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
