"""Procedures in recipes: what is refused before anything is trained, and what they are called with."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from tutelage import KD, Result, Stage, born_again, densely_guided, distill, teacher_assistant, teacher_free_self
from tutelage.building import RecipeError
from tutelage.procedures import GIVEN, Setting, check, laid_out, lay_out, seed_of
from tutelage.recipe import load
from tutelage.training import Training

NET = {"class_path": "SmallCNN", "init_args": {"width": 2}}
RECIPE: dict[str, Any] = {
    "student": NET,
    "teacher": {"class_path": "SmallCNN", "init_args": {"width": 3}},
    "teacher_training": {"epochs": 1},
    "data": {"class_path": "fashion_loaders", "init_args": {"batch_size": 16, "limit": 64, "validation": 50}},
    "training": {"epochs": 1, "progress": False},
}


def recipe(procedure: Any, **fields: Any) -> dict[str, Any]:
    if isinstance(procedure, tuple):
        procedure = {"class_path": procedure[0], "init_args": procedure[1]}
    return {**RECIPE, **fields, "procedure": procedure}


def twice(student, teacher, train, validation, *, times=2, **given) -> list[Result]:
    """A procedure of somebody's own, without a layout."""
    return [distill(student, None, train, validation, training=given["training"]) for _ in range(times)]


@pytest.mark.parametrize(
    ("procedure", "said"),
    [
        ("teacher_assistant", r"^procedure.init_args: the field 'assistants' of teacher_assistant is missing"),
        (("teacher_assistant", {"assistants": []}), r"^procedure: assistants: expected one network or more"),
        (("teacher_assistant", {"asistants": [NET]}), r"^procedure.init_args.asistants: no such field.*'assistants'"),
        (("teacher_assistant", {"assistants": [NET], "epochs": 3}), r"^procedure.init_args.epochs: no such field"),
        (("teacher_assistant", {"assistants": [NET], "losses": ["KD"]}), r"^procedure.init_args.losses: the recipe"),
        (("teacher_assistant", {"assistants": ["Boundary"]}), r"^procedure.init_args.assistants\[0\]"),
        (("born_again", {"generations": "3"}), r"^procedure.init_args.generations='3': expected a whole number"),
        (("born_again", {"generations": 0}), r"^procedure: generations=0"),
        (("born_again", {"generations": 2, "ensemble": 3}), r"^procedure: .*ensemble=3"),
        (("densely_guided", {"assistants": [NET], "drop": -1}), r"^procedure: drop=-1"),
        ("teacher_free_self", r"^procedure: teacher: expected a trained network of the student's own form"),
        ("SmallCNN", r"^procedure: expected a function that trains several times, got SmallCNN"),
        ("resnet20", r"^procedure: resnet20 does not take after_epoch, losses"),
        ("born_agian", r"^procedure: .*'born_again'"),
        (3, r"^procedure=3: expected a function"),
    ],
)
def test_mistakes_are_refused_when_the_recipe_is_loaded(procedure, said):
    with pytest.raises(RecipeError, match=said):
        load(recipe(procedure))


def test_what_a_leg_cannot_have_is_refused_too():
    with pytest.raises(RecipeError, match="teacher: assistants need a network above them, got NoneType"):
        load({**recipe(("teacher_assistant", {"assistants": [NET]})), "teacher": None, "teacher_training": None})
    run = load(recipe(("teacher_assistant", {"assistants": [NET]}), control=True))
    with pytest.raises(RecipeError, match="control: not with a procedure"):
        run()


def test_somebodys_own_function_is_a_procedure(tmp_path):
    check(twice)
    check(functools.partial(twice, times=1))
    with pytest.raises(ValueError, match=r"init_args\.time: no such field of twice"):
        check(functools.partial(twice, time=1))
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    losses = [KD()]
    (leg,) = lay_out(twice, Setting(student, teacher, losses))
    assert (leg.student, leg.teacher, leg.losses, leg.stages) == (student, teacher, losses, None)


def test_a_procedure_is_called_with_what_recipes_have(monkeypatch):
    built = load({**recipe(("teacher_assistant", {"assistants": [NET]})), "teacher_training": None})
    called: dict[str, Any] = {}

    def stand_in(**given):
        called.update(given)
        return ["first", "last"]

    built.keywords["procedure"] = stand_in
    assert built() == "last"
    assert set(called) == set(GIVEN)
    assert called["student"] is built.keywords["student"]
    assert called["train"] is built.keywords["data"].train


def test_every_procedure_has_a_layout_of_its_arguments():
    student, teacher, middle = (nn.Linear(4, 3) for _ in range(3))
    for procedure, legs in (
        (functools.partial(teacher_assistant, assistants=[middle]), 2),
        (functools.partial(densely_guided, assistants=[middle]), 2),
        (functools.partial(born_again, generations=4), 4),
        (teacher_free_self, 1),
    ):
        check(procedure)
        laid = lay_out(procedure, Setting(student, teacher))
        assert len(laid) == legs
        assert laid[-1].student is student
        assert laid[-1].name == "student"
        assert len({leg.name for leg in laid}) == legs


def test_laying_out_takes_no_random_numbers():
    student = nn.Linear(4, 3)
    before = torch.get_rng_state()
    lay_out(functools.partial(born_again, generations=3), Setting(student))
    assert torch.equal(torch.get_rng_state(), before)


def test_settings():
    with pytest.raises(ValueError, match="losses and stages: give one of them"):
        Setting(nn.Linear(2, 2), None, [KD()], [Stage([KD()], epochs=1)])
    assert (seed_of({}), seed_of({"seed": 3}), seed_of({"training": Training(epochs=1, seed=4)})) == (0, 3, 4)
    assert laid_out(lambda setting: [])(twice) is twice
    del twice.layout
