"""Hostile and damaged recipes: one line for the user, and nothing that they name is imported, run or fetched."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tutelage.plain_yaml import parse_yaml
from tutelage.recipe import RecipeError, changed, distil_recipe, load, packaged_names
from tutelage.trusted import named_object

pytest.importorskip("resource", reason="memory can be limited on POSIX alone")

SCRIPT = Path(__file__).with_name("fuzz_cases.py")
FIELDS = "|".join(inspect.signature(distil_recipe).parameters)
CANARY = """open({mark!r}, "w").close()
from torch.nn import Identity
class Thing(Identity): pass
def make() -> Identity: return Identity()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What one process found that was given every recipe."""
    home = tmp_path_factory.mktemp("fuzz")
    (home / "canary_package").mkdir()
    text = CANARY.format(mark=str(home / "imported"))
    (home / "canary_package" / "__init__.py").write_text(text)
    (home / "canary_package" / "inner.py").write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
    environment.pop("TUTELAGE_DEBUG", None)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(home)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((home / "found.json").read_text())


def shown(case):
    return f"\n{case['name']}: exit {case['code']}\n{case['said']}\n{case['wrong']}\n---\n{case['text']}\n"


def test_there_are_enough_and_the_unchanged_ones_are_good(report):
    assert report["unbuilt"] == []
    mutated = [c for c in report["found"] if re.fullmatch(rf"distill: ({'|'.join(packaged_names())}) \d+", c["name"])]
    assert len(mutated) >= 700
    assert len({c["text"] for c in mutated}) > 0.9 * len(mutated)
    built = sum(c["said"].startswith("tutelage: built") for c in mutated)
    assert 20 < built < len(mutated) / 2  # some changes do no harm, and most are mistakes


def test_every_recipe_ends_with_one_line_and_exit_status_2(report):
    wrong = [c for c in report["found"] if c["code"] != 2 or not re.fullmatch(r"tutelage: [^\n]{1,2500}\n", c["said"])]
    assert wrong == [], "".join(map(shown, wrong[:5]))


def test_the_line_names_the_file_or_the_field_and_nothing_that_a_terminal_obeys(report):
    named = re.compile(rf"recipe\.yaml|^tutelage: recipe:|\b({FIELDS})\b|no such field|built ")
    wrong = [c for c in report["found"] if not named.search(c["said"]) or not c["said"].rstrip("\n").isprintable()]
    assert wrong == [], "".join(map(shown, wrong[:5]))


def test_nothing_foreign_is_imported_run_fetched_unpickled_or_written(report):
    wrong = [c for c in report["found"] if c["wrong"]]
    assert wrong == [], "".join(map(shown, wrong[:5]))
    assert report["clean"]


def test_what_watches_would_have_seen_it(report):
    """The same process, at its end, with ``--trust``."""
    seen = report["control"]["wrong"]
    assert "canary_package" in seen
    assert any(event.startswith("exec") for event in seen)
    assert any(event.startswith("open") for event in seen)


def test_memory_stays_bounded(report):
    """Allocations above 1 GiB would have failed; what was used stays far below."""
    assert report["grown"] < 600 * 2**20


# What the fuzz found, each by itself


def test_a_recipe_cannot_unpickle_by_a_method_of_torchvision(tmp_path):
    """WeightsEnum.get_state_dict loads a pickle from the url of whatever it is given as self."""
    pytest.importorskip("torchvision")
    for path in ("WeightsEnum.get_state_dict", "ResNet18_Weights.DEFAULT.get_state_dict", "ResNet.load_state_dict"):
        with pytest.raises(RecipeError, match="expected a class or function of a module"):
            named_object(f"torchvision.models.resnet.{path}")


def test_methods_of_what_the_user_trusts_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "trusted_here.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    @classmethod\n    def small(cls) -> 'Net': return cls()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(named_object("trusted_here.Net.small", ["trusted_here"])()).__name__ == "Net"


@pytest.mark.parametrize(
    "path", ["torch.os.system", "torch.nn.modules.module.torch.hub.load", "torch.nn.functional.np"]
)
def test_a_walk_ends_at_the_first_module_that_is_not_trusted(path):
    with pytest.raises(RecipeError, match=r"may not use '(os|torch\.hub|numpy)' unless"):
        named_object(path)


@pytest.mark.parametrize("text", ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x"])
def test_a_wrong_value_after_a_tag_is_a_mistake_of_the_file(text):
    with pytest.raises(RecipeError, match=r"my file.*not YAML"):
        parse_yaml(f"a: {text}", "my file")


def test_a_field_may_overwrite_what_is_merged_wherever_it_is_merged_again():
    text = "x: &a {width: 1, depth: 2}\ny: {deep: &b {<<: *a, width: 3}}\nz: {<<: *b}"
    assert parse_yaml(text, "my file")["z"] == {"width": 3, "depth": 2}
    assert parse_yaml(text, "my file")["y"]["deep"] == {"width": 3, "depth": 2}


def test_what_a_recipe_needs_is_within_the_limits():
    text = "a: &a [1, 2, 3]\n" + "".join(f"b{n}: *a\n" for n in range(1000))
    assert len(parse_yaml(text, "my file")) == 1001
    assert parse_yaml("[" * 40 + "]" * 40, "my file") != []
    assert parse_yaml("[18446744073709551615, -9223372036854775808]", "my file") == [2**64 - 1, -(2**63)]
    with pytest.raises(RecipeError, match="my file: a whole number of 65 bits"):
        parse_yaml("[18446744073709551616]", "my file")


@pytest.mark.parametrize(
    "field",
    [
        {"weights_only": False},
        {"attn_implementation": "somebody/kernel"},
        {"use_kernels": True},
        {"allow_all_kernels": True},
    ],
)
def test_transformers_is_not_asked_for_code_or_pickles(field):
    model = {"class_path": "create", "init_args": {"spec": "transformers:no/model", **field}}
    with pytest.raises(RecipeError, match=rf"student.init_args.{next(iter(field))}: not in a recipe"):
        load({"student": model, "data": "fashion_loaders"})


def test_a_data_set_that_is_read_by_unpickling_is_refused():
    pytest.importorskip("torchvision")
    train = {"class_path": "torchvision_dataset", "init_args": {"name": "LSUN", "root": "."}}
    with pytest.raises(RecipeError, match="name='LSUN': torchvision unpickles"):
        load({"student": "SmallCNN", "data": {"class_path": "dataset_loaders", "init_args": {"train": train}}})


def test_a_path_of_any_letters_reaches_the_recipe():
    assert changed("kd", [f"out={json.dumps('läufe/😀')}"])["out"] == "läufe/😀"
    with pytest.raises(RecipeError, match="--set out"):
        changed("kd", ['out="\\ud83d"'])
