"""Generated recipes: what is written is read again, --set is editing the file, and a wrong name is answered."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tutelage.data import Images, ImageSet, fashion_subset, loaders
from tutelage.plain_yaml import parse_yaml, written_yaml
from tutelage.recipe import RecipeError, changed, load, packaged_names, read

often = settings(
    max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
seldom = settings(often, max_examples=25)


@functools.cache
def few_images() -> ImageSet:
    whole = fashion_subset()
    parts = (Images(p.images[:n], p.labels[:n]) for p, n in ((whole.train, 1200), (whole.test, 60)))
    return ImageSet(*parts, whole.classes)


@pytest.fixture(autouse=True)
def only_few_images(monkeypatch):
    monkeypatch.setattr(loaders, "fashion_subset", few_images)


# Plain values

numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1)
texts = st.text(max_size=12) | st.sampled_from(
    [
        "1e3",
        "1E-4",
        "-2.e5",
        "0x10",
        "1_000",
        "yes",
        "No",
        "~",
        "null",
        ".5",
        "1:30",
        "2020-01-01",
        "=",
        "<<",
        "*a",
        "- a",
    ]
)
plain = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@settings(often, max_examples=150)
@given(plain, st.sampled_from([False, None, True]))
def test_what_is_written_is_read_again(value, flow):
    again = parse_yaml(written_yaml({"a": value}, flow), "a")["a"]
    assert again == value
    assert json.dumps(again) == json.dumps(value)  # 1 is not 1.0, and −0.0 not 0.0


# Recipes


def node(name: str, **arguments: st.SearchStrategy) -> st.SearchStrategy:
    """``class_path`` with some of the arguments."""
    return st.fixed_dictionaries({}, optional=arguments).map(
        lambda given: {"class_path": name, **({"init_args": given} if given else {})}
    )


positive = st.floats(1e-6, 10, allow_subnormal=False)
share = st.floats(0, 0.9)
networks = (
    node("SmallCNN", width=st.integers(1, 5))
    | node("tutelage.models.SmallCNN", width=st.integers(1, 3), num_classes=st.just(10))
    | node("MLP", features=st.just(784)).map(
        lambda n: {"class_path": "MLP", "init_args": {"in_features": 784, "hidden": [8], "num_classes": 10}}
    )
)
weights = positive | node("WarmUp").map(lambda n: {"class_path": "WarmUp", "init_args": {"weight": 0.5, "until": 0.25}})
losses = st.lists(
    node("TaskLoss", weight=weights)
    | node("KD", temperature=positive, weight=weights)
    | node("DKD", alpha=positive, beta=positive, weight=positive)
    | node("AttentionTransfer", weight=positive, taps=st.just(["stage2"]) | st.just([["stage2", "stage3"]]))
    | node("RKD", distance=positive, angle=positive),
    min_size=1,
    max_size=3,
)
training = st.fixed_dictionaries(
    {"epochs": st.integers(1, 100)},
    optional={
        "lr": st.floats(1e-6, 1.0),
        "optimizer": st.sampled_from(["sgd", "adamw"])
        | node("torch.optim.Adam").map(lambda n: {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}}),
        "scheduler": st.sampled_from(["constant", "cosine"]),
        "weight_decay": share,
        "channels_last": st.booleans(),
    },
)
recipes = st.fixed_dictionaries(
    {
        "student": networks,
        "teacher": networks,
        "data": node(
            "fashion_loaders", batch_size=st.integers(1, 64), limit=st.integers(20, 200), seed=st.integers(0, 9)
        ),
        "losses": losses,
        "training": training,
        "seed": st.integers(0, 2**32 - 1),
    },
    optional={
        "control": st.booleans(),
        "out": st.sampled_from(["runs/a", "1e3", "0x1", "größe", "a: b", "- x", "null"]),
        "teacher_training": training,
        "views": st.just("SameView"),
    },
)


def built(keywords: dict[str, Any]) -> dict[str, Any]:
    """What was built, in a form that can be compared."""
    found = dict(keywords)
    for role in ("student", "teacher"):
        state = found[role].state_dict()
        found[role] = repr(found[role]), {n: v.tolist() for n, v in state.items()}
    found["losses"] = [
        (type(loss).__name__, loss.name, repr(loss.weight), loss.taps, sorted(plain_parts(loss).items()))
        for loss in found["losses"]
    ]
    for field in ("training", "teacher_training"):
        if field in found:
            values = vars(found[field]) if hasattr(found[field], "__dict__") else {}
            found[field] = {n: str(v) if callable(v) else v for n, v in values.items()}
    batch = next(iter(found["data"].validation))
    found["data"] = len(found["data"].train), batch[0].sum().item(), batch[1].tolist()
    found["views"] = type(found.get("views")).__name__
    return found


def plain_parts(thing: Any) -> dict[str, Any]:
    return {n: v for n, v in vars(thing).items() if isinstance(v, int | float | str) and not n.startswith("_")}


@seldom
@given(recipes)
def test_a_recipe_that_is_written_and_read_builds_the_same(tmp_path_factory, fields):
    file = tmp_path_factory.mktemp("recipe") / "r.yaml"
    file.write_text(written_yaml(fields), encoding="utf-8")
    assert read(file) == fields
    kept = copy.deepcopy(fields)
    direct = built(load(fields).keywords)
    assert fields == kept
    assert built(load(file).keywords) == direct
    for flow in (None, True):
        file.write_text(written_yaml(read(file), flow), encoding="utf-8")
        assert read(file) == fields


def test_every_packaged_recipe_is_what_is_read_when_it_was_written(tmp_path):
    for name in packaged_names():
        file = tmp_path / f"{name}.yaml"
        file.write_text(written_yaml(read(name), None), encoding="utf-8")
        assert read(file) == read(name), name


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in inside] + [p for k, v in inside for p in places(v, (*path, k))]


@often
@given(recipes, plain, st.data())
def test_set_is_editing_the_file(fields, value, data):
    path = data.draw(st.sampled_from(places(fields)))
    edited = copy.deepcopy(fields)
    functools.reduce(lambda here, key: here[key], path[:-1], edited)[path[-1]] = value
    dotted = ".".join(map(str, path))
    brackets = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    kept = copy.deepcopy(fields)
    assert changed(fields, [f"{dotted}={json.dumps(value)}"]) == edited
    assert changed(fields, [f"{brackets}={written_yaml(value, flow=True).removesuffix('...' + chr(10))}"]) == edited
    assert fields == kept


@seldom
@given(recipes, st.integers(1, 9), st.data())
def test_set_builds_what_the_edited_recipe_builds(fields, epochs, data):
    value = data.draw(st.sampled_from([epochs, epochs + 0.0]))
    changes = {"training.epochs": epochs, "seed": epochs, "student": {"class_path": "SmallCNN"}, "training.lr": value}
    edited = copy.deepcopy(fields)
    edited["training"] |= {"epochs": epochs, "lr": value}
    edited |= {"seed": epochs, "student": {"class_path": "SmallCNN"}}
    by_set = load(fields, [f"{name}={json.dumps(v)}" for name, v in changes.items()])
    assert built(by_set.keywords) == built(load(edited).keywords)


def named(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of the fields that a signature has."""
    return [p for p in places(value) if isinstance(p[-1], str) and len(p[-1]) > 3]


@often
@given(recipes, st.data())
def test_a_wrong_field_is_answered_with_its_place_and_the_right_one(fields, data):
    path = data.draw(st.sampled_from(named(fields)))
    parent = functools.reduce(lambda here, key: here[key], path[:-1], fields)
    right = path[-1]
    cut = data.draw(st.integers(1, len(right) - 1))
    wrong = right[:cut] + data.draw(st.sampled_from(["", "_", "x", right[cut] * 2])) + right[cut + 1 :]
    assume(wrong not in parent and wrong != right)
    parent[wrong] = parent.pop(right)
    with pytest.raises(RecipeError) as caught:
        load(fields)
    text = str(caught.value)
    if "no such field" in text or "expected class_path" in text:
        assert wrong in text
        assert repr(right) in text.split("nearest")[1]
    else:  # a class that is now a mapping without class_path, or a field that is missing
        assert any(str(part) in text for part in (right, wrong, *path[:-1][-1:]))


@often
@given(
    st.sampled_from(["SmallCNN", "TaskLoss", "AttentionTransfer", "DeepMutualLearning", "fashion_loaders"]), st.data()
)
def test_a_wrong_name_of_a_class_is_answered_with_the_right_one(name, data):
    cut = data.draw(st.integers(1, len(name) - 1))
    wrong = name[:cut] + data.draw(st.sampled_from(["", "x", "_"])) + name[cut + 1 :]
    assume(wrong != name)
    with pytest.raises(RecipeError) as caught:
        load({"student": wrong, "data": "fashion_loaders"})
    assert f"student: no {wrong!r} in tutelage, its models or its data; nearest: " in str(caught.value)
    assert repr(name) in str(caught.value).split("nearest: ")[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**40, [[[]]], "x" * 10_000])
def test_a_value_out_of_place_is_shown_in_few_letters(value):
    torch.manual_seed(0)
    fields = {"student": {"class_path": "SmallCNN", "init_args": {"width": value}}, "data": "fashion_loaders"}
    with pytest.raises(RecipeError, match=r"^student") as caught:
        load(fields)
    assert len(str(caught.value)) < 300


def test_the_recipe_in_a_report_is_the_recipe(tmp_path: Path):
    from tutelage.commands.distill import _settings

    file = tmp_path / "r.yaml"
    file.write_text("student: SmallCNN\ndata: fashion_loaders\nteacher_weights: '1e3'\n")
    again = tmp_path / "again.yaml"
    again.write_text(_settings(str(file), ["training.lr=1e-5"], 3))
    assert read(again) == {**read(file), "training": {"lr": 1e-5}, "seed": 3}
