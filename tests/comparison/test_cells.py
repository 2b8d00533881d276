"""A cell: what makes two of them the same, and what its end is called."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from tutelage.checked import write_json
from tutelage.comparison import cells
from tutelage.comparison.cells import Cell, CellResult, read_result, run_cell, trained_paths
from tutelage.comparison.pool import prepare
from tutelage.data import loaders
from tutelage.evaluation import evaluate
from tutelage.files import locked
from tutelage.models import SmallCNN, load_weights, save_weights

NET = {"class_path": "SmallCNN", "init_args": {"width": 2}}
SMALL = {
    "student": NET,
    "data": {"class_path": "fashion_loaders", "init_args": {"batch_size": 32, "limit": 100, "validation": 50}},
    "losses": [{"class_path": "TaskLoss"}],
    "training": {"epochs": 2, "optimizer": "adamw", "lr": 0.01},
    "seed": 0,
}


@pytest.fixture
def recipe(tmp_path):
    """Fields with a folder of data and a file of weights."""
    (tmp_path / "data").mkdir()
    (tmp_path / "teacher.pt").write_bytes(b"weights")
    return {
        "student": NET,
        "teacher": NET,
        "teacher_weights": str(tmp_path / "teacher.pt"),
        "data": {"class_path": "cifar10_loaders", "init_args": {"root": str(tmp_path / "data"), "limit": 10}},
        "losses": [{"class_path": "TaskLoss"}, {"class_path": "KD", "init_args": {"weight": 0.5}}],
        "training": {"epochs": 3, "lr": 0.1, "progress": True},
        "seed": 0,
    }


def key(fields) -> str:
    return Cell("KD", "small", "big", 0, fields).key


def changed(recipe, path, value):
    recipe = copy.deepcopy(recipe)
    here = recipe
    for part in path[:-1]:
        here = here[part]
    here[path[-1]] = value
    return recipe


def test_where_a_run_writes_and_what_it_prints_do_not_matter(recipe):
    own = key(recipe)
    for name, value in (("out", "elsewhere"), ("resume", True), ("overwrite", True), ("control", True)):
        assert key(changed(recipe, [name], value)) == own
    for name, value in (("progress", False), ("gradient_shares", False), ("cpu", True)):
        assert key(changed(recipe, ["training", name], value)) == own
    assert key(dict(reversed(recipe.items()))) == own
    assert key(changed(recipe, ["training"], dict(reversed(recipe["training"].items())))) == own
    assert replace(Cell("KD", "small", "big", 0, recipe), method="another", student="s", teacher=None).key == own


def test_data_may_lie_elsewhere_and_weights_may_be_called_otherwise(recipe, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "resnet.bin").write_bytes(b"weights")
    assert key(changed(recipe, ["data", "init_args", "root"], str(tmp_path / "other"))) == key(recipe)
    assert key(changed(recipe, ["teacher_weights"], str(tmp_path / "other" / "resnet.bin"))) == key(recipe)


def test_what_changes_the_figures_changes_the_key(recipe, tmp_path):
    changes = [
        (["seed"], 1),
        (["losses", 1, "init_args", "weight"], 0.25),
        (["losses", 1, "class_path"], "LogitRegression"),
        (["losses"], recipe["losses"][:1]),
        (["training", "epochs"], 4),
        (["training", "lr"], 0.2),
        (["data", "init_args", "limit"], 11),
        (["student"], {"class_path": "SmallCNN", "init_args": {"width": 3}}),
        (["stages"], []),
    ]
    keys = {key(recipe), *(key(changed(recipe, *change)) for change in changes)}
    (tmp_path / "teacher.pt").write_bytes(b"Weights")
    keys.add(key(recipe))
    assert len(keys) == len(changes) + 2


def test_the_key_is_a_hash_of_plain_fields():
    # Results that lie about are found by it: it must not change by accident.
    fields = {"seed": 3, "student": NET}
    expected = hashlib.sha256(json.dumps([1, fields], sort_keys=True).encode()).hexdigest()[:20]
    assert key({**fields, "out": "here"}) == expected


def test_a_cell_knows_who_trains_its_teacher(tmp_path):
    cell = Cell("KD", "s", "t", 0, {"teacher_weights": "cell:abc"})
    assert cell.needs == "abc"
    assert trained_paths(cell.fields, tmp_path)["teacher_weights"] == str(tmp_path / "abc" / "student.safetensors")
    assert Cell("KD", "s", "t", 0, {"teacher_weights": "file.pt"}).needs is None
    assert cell.fields == {"teacher_weights": "cell:abc"}


def run(folder, fields, trust=(), method="KD") -> CellResult:
    cell = Cell(method, "small", "big", 0, fields)
    prepare(cell, folder, list(trust))
    result = run_cell(folder)
    assert asdict(read_result(folder, cell)) == asdict(result)
    assert not (folder / "run").exists()
    return result


def test_a_cell_that_is_done(tmp_path, in_process):
    save_weights(SmallCNN(width=2), tmp_path / "teacher.safetensors")
    fields = {**SMALL, "teacher": NET, "teacher_weights": str(tmp_path / "teacher.safetensors"), "seed": 3}
    fields["losses"] = [{"class_path": "TaskLoss"}, {"class_path": "KD"}]
    result = run(tmp_path / "cell", fields)
    assert (result.state, result.reason, result.final) == ("done", "", True)
    assert [line["epoch"] for line in result.history] == [0, 1]
    best = max(line["metrics"]["accuracy"] for line in result.history)
    assert result.validation["accuracy"] == best
    assert result.last["samples"] == 100
    assert 0 <= result.metrics["agreement"] <= 1
    assert result.teacher_metrics["accuracy"] >= 0
    assert result.seconds > 0
    assert result.peak_memory_bytes >= 0
    # the file holds the weights that the figures are of
    network = SmallCNN(width=2)
    load_weights(network, tmp_path / "cell" / "student.safetensors")
    assert (
        evaluate(network, loaders.fashion_loaders(limit=100, validation=50).test).accuracy == result.metrics["accuracy"]
    )


def test_a_loss_that_is_no_number_is_diverged_and_final(tmp_path, in_process):
    result = run(tmp_path / "cell", {**SMALL, "training": {"epochs": 2, "lr": 1e9}})
    assert (result.state, result.final) == ("diverged", True)
    assert "not finite" in result.reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": [{"class_path": "KDD"}]}, "'KD'"),
        ({"losses": [{"class_path": "KD"}]}, "needs a teacher"),
        ({"training": {"epochs": 0}}, "epochs=0"),
        ({"studnet": 1}, "'student'"),
    ],
)
def test_what_is_refused_before_it_begins_is_skipped(tmp_path, in_process, change, said):
    result = run(tmp_path / "cell", {**SMALL, **change})
    assert (result.state, result.final) == ("skipped", False)
    assert said in result.reason
    assert "\n" not in result.reason


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Losses of somebody's own, which break in one way or another."""
    (tmp_path / "breaking.py").write_text(
        "import torch\n"
        "from tutelage.knowledge.base import Loss\n"
        "class Absent(Loss):\n"
        "    needs_teacher = False\n"
        "    def forward(self, student, teacher, batch):\n"
        "        raise ModuleNotFoundError('this needs the package x')\n"
        "class Late(Loss):\n"
        "    needs_teacher = False\n"
        "    def forward(self, student, teacher, batch):\n"
        "        if batch.progress > 0.6:\n"
        "            raise ValueError('a late mistake')\n"
        "        return torch.zeros(())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield ["breaking"]
    sys.modules.pop("breaking", None)


def test_a_package_that_is_missing_is_skipped_and_a_late_mistake_failed(tmp_path, in_process, mine):
    absent = run(tmp_path / "a", {**SMALL, "losses": [{"class_path": "breaking.Absent"}]}, mine)
    assert (absent.state, absent.reason) == ("skipped", "this needs the package x")
    late = [{"class_path": "TaskLoss"}, {"class_path": "breaking.Late"}]
    result = run(tmp_path / "b", {**SMALL, "losses": late}, mine)
    assert (result.state, result.reason) == ("failed", "ValueError: a late mistake")
    assert not result.final


def test_only_a_whole_result_is_one(tmp_path):
    cell = Cell("KD", "small", "big", 1, SMALL)
    whole = json.dumps(asdict(CellResult("old key", "kd", "s", None, 0, "done", metrics={"accuracy": 0.5})))
    for text in ("", whole[:-20], "[]", "{}", whole.replace('"state"', '"stat"')):
        (tmp_path / "result.json").write_text(text)
        assert read_result(tmp_path, cell) is None
    assert read_result(tmp_path / "nowhere", cell) is None
    # one is found under the names that the cell has now
    (tmp_path / "result.json").write_text(whole)
    found = read_result(tmp_path, cell)
    assert (found.key, found.method, found.student, found.teacher, found.seed) == (cell.key, "KD", "small", "big", 1)
    assert found.metrics == {"accuracy": 0.5}


def test_two_processes_are_not_at_one_cell(tmp_path, monkeypatch):
    """The second waits, as the first one's parent may have been killed, and has its result then."""
    monkeypatch.setattr(cells, "_outcome", lambda *given: pytest.fail("it ran"))
    cell = Cell("KD", "small", None, 0, SMALL)
    prepare(cell, tmp_path, [])
    result = CellResult(cell.key, "KD", "small", None, 0, "done", metrics={"accuracy": 0.5})
    with ThreadPoolExecutor() as pool:
        with locked(tmp_path / "lock"):
            second = pool.submit(run_cell, tmp_path)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
            write_json(tmp_path / "result.json", asdict(result), checked=True)
        assert second.result(timeout=60) == result
