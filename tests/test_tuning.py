"""Tuning: what it finds, what it never looks at, and that a study survives what goes wrong in it."""

from __future__ import annotations

import copy
import csv
import importlib
import json
import os
import signal
import statistics
import sys
import textwrap

import pytest
import yaml

from tutelage.building import RecipeError
from tutelage.recipe import load, read
from tutelage.run import Interrupted
from tutelage.searches import Search, expand
from tutelage.tuning import tune

optuna = pytest.importorskip("optuna")

TOY = '''
    """Points in the plane whose labels are random where they are trained on, a teacher that knows the true ones."""
    from __future__ import annotations

    import torch
    from torch import Tensor, nn

    from tutelage.data.loaders import Loaders

    passes, students, taught = [], [], []
    at_pass = {}  # what to do when the training data are read for the n-th time
    forbidden = [True]


    class Batches:
        def __init__(self, seed, batches, random_labels=False, test=False):
            g = torch.Generator().manual_seed(seed)
            self.x = torch.randn(batches, 16, 2, generator=g)
            self.y = (self.x[..., 0] > 0).long()
            if random_labels:
                self.y = torch.randint(0, 2, self.y.shape, generator=g)
            self.train, self.test = random_labels, test

        def __len__(self):
            return len(self.x)

        def __iter__(self):
            if self.test and forbidden[0]:
                raise AssertionError("the test data were looked at")
            if self.train:
                passes.append(1)
                at_pass.pop(len(passes), lambda: None)()
            return iter(list(zip(self.x, self.y)))


    def points(seed: int = 1, validation: bool = True) -> Loaders:
        return Loaders(Batches(0, 4, True), Batches(seed, 4) if validation else None, Batches(2, 4, test=True))


    class Student(nn.Sequential):
        def __init__(self, width: int = 4):
            super().__init__(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))

        def forward(self, x: Tensor) -> Tensor:
            if self.training and torch.is_grad_enabled():
                students.append(len(x))
            return super().forward(x)


    class Oracle(nn.Module):
        """Always right."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(4.0))

        def forward(self, x: Tensor) -> Tensor:
            if self.training and torch.is_grad_enabled():
                taught.append(len(x))
            return torch.stack([-self.scale * x[:, 0], self.scale * x[:, 0]], 1)
'''

BASE = {
    "student": {"class_path": "toy_points.Student"},
    "teacher": {"class_path": "toy_points.Oracle"},
    "data": {"class_path": "toy_points.points"},
    "losses": ["TaskLoss", {"class_path": "KD", "init_args": {"weight": 1.0}}],
    "training": {"epochs": 4, "lr": 0.1, "scheduler": "constant", "monitor": "nll", "progress": False},
}
TRUST = ["toy_points"]
WEIGHT = "losses.1.init_args.weight"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_points.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("toy_points")
    del sys.modules["toy_points"]


@pytest.fixture
def study(toy, tmp_path):
    """A function that tunes BASE with some fields replaced."""

    def run(*space, out="study", fields=None, **options):
        return tune({**BASE, **(fields or {})}, space, out=tmp_path / out, trust=TRUST, **options)

    return run


def outcome(tuned):
    """All of the trials but the time that they took."""
    return [(t.number, t.state, t.value, t.values, t.epochs, t.reason) for t in tuned.trials]


# What it finds


def test_the_weight_that_outvotes_random_labels_is_found(study):
    tuned = study(f"{WEIGHT}=0.01..10:log", trials=8, prune=False)
    assert {t.state for t in tuned.trials} == {"complete"}
    assert tuned.best.value == min(t.value for t in tuned.trials)
    assert tuned.best.values[WEIGHT] > 1
    weakest = min(tuned.trials, key=lambda t: t.values[WEIGHT])
    assert weakest.values[WEIGHT] < 0.1
    assert tuned.best.value < 0.8 * weakest.value


def test_of_an_accuracy_the_highest_is_the_best(study):
    fields = {"training": {**BASE["training"], "monitor": "accuracy"}}
    tuned = study(f"{WEIGHT}=[0.0, 5.0]", trials=4, fields=fields)
    assert tuned.best.values == {WEIGHT: 5.0}
    assert tuned.best.value == max(t.value for t in tuned.trials) > 0.9


def test_the_same_seed_gives_the_same_trials_and_another_gives_others(study):
    space = [f"{WEIGHT}=0.01..10:log", "student.init_args.width=2..8:int"]
    one, two = (study(*space, out=out, trials=12, seed=3) for out in ("one", "two"))
    assert outcome(one) == outcome(two)
    assert outcome(study(*space, out="three", trials=1, seed=4)) != outcome(one)[:1]
    assert all(type(t.values["student.init_args.width"]) is int for t in one.trials)


def test_every_trial_is_trained_with_the_seed_of_the_recipe(study):
    # a temperature of a loss that weighs nothing changes nothing
    fields = {"losses": ["TaskLoss", {"class_path": "KD", "init_args": {"weight": 0.0}}], "seed": 5}
    tuned = study("temperature", trials=3, fields=fields)
    assert len({t.value for t in tuned.trials}) == 1
    assert len({str(t.values) for t in tuned.trials}) == 3
    assert tuned.best.number == 1


def test_values_that_come_again_are_not_trained_again(study, toy):
    tuned = study(f"{WEIGHT}=[0.5, 5.0]", trials=6)
    steps = 4 * BASE["training"]["epochs"]
    assert len(tuned.trials) == 6
    assert len(toy.students) == 2 * steps
    for value in (0.5, 5.0):
        first, *others = [t for t in tuned.trials if t.values[WEIGHT] == value]
        assert {(t.value, t.epochs, t.reason) for t in others} <= {
            (first.value, 0, f"the values of trial {first.number}")
        }


# What it never looks at


def test_the_test_data_and_the_control_are_left_alone(study, toy):
    tuned = study(f"{WEIGHT}=0.1..10", trials=3, fields={"control": True}, prune=False)
    assert len(toy.students) == 3 * 4 * BASE["training"]["epochs"]  # and none for a control
    assert "the test data were not looked at" in str(tuned)
    assert "the best of 3 trials" in str(tuned)
    assert "optimistic" in str(tuned)
    # the same recipe run alone does look at them
    with pytest.raises(AssertionError, match="test data were looked at"):
        load(tuned.out / "best.yaml", trust=TRUST)()


def test_best_yaml_trains_again_what_the_best_trial_trained(study, toy):
    fields = {"teacher_training": {"epochs": 2, "lr": 0.1, "progress": False}, "control": True}
    tuned = study(f"{WEIGHT}=0.1..10:log", trials=3, fields=fields)
    best = read(tuned.out / "best.yaml")
    assert best["control"] is True
    assert best["losses"][1]["init_args"]["weight"] == tuned.best.values[WEIGHT]
    assert "not looked at" in (tuned.out / "best.yaml").read_text().split("student:")[0]
    toy.forbidden[0] = False
    toy.taught.clear()
    result = load(tuned.out / "best.yaml", trust=TRUST)()
    assert result.runs[-1].best_value == tuned.best.value
    assert result.metrics.samples == 64
    assert toy.taught == []  # its teacher is the one of the trials


def test_a_seed_or_the_measure_itself_is_not_searched(study):
    for field, word in (("seed", "luck"), ("training.monitor", "compared"), ("out", "folders")):
        with pytest.raises(ValueError, match=f"{field}: not to be searched.*{word}"):
            study(f"{field}=[1, 2]")
    with pytest.raises(ValueError, match=r"teacher\.init_args\.x: not to be searched: the teacher is trained once"):
        study("teacher.init_args.x=1..2", fields={"teacher_training": {"epochs": 1}})


def test_a_trial_that_would_be_judged_by_other_data_fails(study):
    tuned = study("data.init_args.seed=[1, 3]", trials=6)
    assert {t.values["data.init_args.seed"]: t.state for t in tuned.trials} == {1: "complete", 3: "failed"}
    assert "validation data are others" in next(t.reason for t in tuned.trials if t.state == "failed")


# Pruning


def test_a_trial_that_is_behind_is_ended_early(study, toy):
    fields = {"training": {**BASE["training"], "epochs": 8}}
    tuned = study("training.lr=1e-6..0.5:log", trials=14, fields=fields)
    pruned = [t for t in tuned.trials if t.state == "pruned"]
    assert pruned
    assert all(t.number > 5 and 2 < t.epochs < 8 for t in pruned)
    assert all(t.epochs == 8 for t in tuned.trials if t.state == "complete")
    assert len(toy.students) == 4 * sum(t.epochs for t in tuned.trials)
    whole = [t.value for t in tuned.trials if t.state == "complete" and t.number < pruned[0].number]
    assert pruned[0].value > statistics.median(whole)
    assert tuned.best.state == "complete"
    kept = study("training.lr=1e-6..0.5:log", trials=14, fields=fields, prune=False, out="whole")
    assert {t.state for t in kept.trials} == {"complete"}
    assert kept.best.value == tuned.best.value


def reported(tuned):
    storage = f"sqlite:///{tuned.out / 'study.db'}"
    return [t.intermediate_values for t in optuna.load_study(study_name="tutelage", storage=storage).trials]


def test_of_stages_only_the_last_is_reported(study):
    kd = {"class_path": "KD", "init_args": {"weight": 1.0}}
    stages = [{"epochs": 3, "losses": ["TaskLoss"]}, {"epochs": 2, "losses": ["TaskLoss", kd]}]
    tuned = study("weights", trials=2, fields={"losses": None, "stages": stages})
    assert set(tuned.best.values) == {"stages.1.losses.1.init_args.weight"}
    assert [list(values) for values in reported(tuned)] == [[0, 1], [0, 1]]
    assert [t.value for t in tuned.trials] == [min(values.values()) for values in reported(tuned)]


def test_of_a_chain_only_the_student_is_reported(study, toy):
    assistant = {"class_path": "toy_points.Student", "init_args": {"width": 8}}
    fields = {"procedure": {"class_path": "teacher_assistant", "init_args": {"assistants": [assistant]}}}
    tuned = study("weights", trials=2, fields=fields)
    assert [list(values) for values in reported(tuned)] == [[0, 1, 2, 3]] * 2
    assert [t.epochs for t in tuned.trials] == [4, 4]  # the student's alone
    toy.forbidden[0] = False
    student = load(tuned.out / "best.yaml", trust=TRUST)().runs[-1]
    assert [line.metrics["nll"] for line in student.history] == list(reported(tuned)[tuned.best.number - 1].values())
    assert student.best_value == tuned.best.value


# What goes wrong


def test_layers_that_cannot_be_connected_and_a_divergence_are_failed_trials(study):
    fields = {
        "losses": ["TaskLoss", {"class_path": "FitNets", "init_args": {"taps": [["0", ":input"]], "weight": 1.0}}]
    }
    space = ['losses.1.init_args.taps=[[["0", ":input"]], [["nowhere", ":input"]]]', "training.lr=[0.01, 1.0e+30]"]
    tuned = study(*space, trials=16, fields=fields, prune=False)
    reasons = {(t.values["losses.1.init_args.taps"][0][0], t.values["training.lr"]): t.reason for t in tuned.trials}
    assert len(reasons) == 4
    assert "no module 'nowhere'" in reasons["nowhere", 0.01]
    assert "is not finite" in reasons["0", 1e30]
    for t in tuned.trials:
        good = t.values == {"losses.1.init_args.taps": [["0", ":input"]], "training.lr": 0.01}
        assert (t.state, t.value is None) == (("complete", False) if good else ("failed", True))
    assert len(tuned.trials) == 16


def test_if_all_fail_the_error_says_why(study, tmp_path):
    with pytest.raises(ValueError, match=r"none of 3 trials was trained to its end; the first reason: .*not finite"):
        study("training.lr=1e30..1e31", trials=3)
    assert len(json.loads((tmp_path / "study" / "trials.json").read_text())["trials"]) == 3
    assert not (tmp_path / "study" / "best.yaml").exists()


SPACE = (f"{WEIGHT}=0.01..10:log", "losses.1.init_args.temperature=1..10")


@pytest.mark.parametrize("how", ["an error", "a signal"])
def test_an_interrupted_study_goes_on_as_if_nothing_had_been(study, toy, how):
    undisturbed = study(*SPACE, out="undisturbed", trials=12)
    assert {t.state for t in undisturbed.trials} == {"complete", "pruned"}

    def stop():
        if how == "a signal":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            raise RuntimeError("the machine is on fire")

    # each trial reads the training data for binding and for each epoch: this is in the middle of the eleventh
    toy.at_pass[len(toy.passes) + sum(t.epochs + 1 for t in undisturbed.trials[:10]) + 2] = stop
    expected, said = (Interrupted, "trial 11 of 12; 10 are kept") if how == "a signal" else (RuntimeError, "on fire")
    with pytest.raises(expected, match=said):
        study(*SPACE, trials=12)
    with pytest.raises(FileExistsError, match="already holds a study; use --resume"):
        study(*SPACE, trials=12)
    resumed = study(*SPACE, trials=12, resume=True)
    assert outcome(resumed) == outcome(undisturbed)
    with (resumed.out / "trials.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    # and further, with what is there
    more = study(*SPACE, trials=13, resume=True)
    assert outcome(more)[:12] == outcome(undisturbed)
    assert len(more.trials) == 13


def test_a_killed_trial_does_not_count(study, tmp_path):
    study(*SPACE, trials=2)
    storage = f"sqlite:///{tmp_path / 'study' / 'study.db'}"
    optuna.load_study(study_name="tutelage", storage=storage).ask()  # and never told
    resumed = study(*SPACE, trials=4, resume=True)
    assert outcome(resumed) == outcome(study(*SPACE, out="undisturbed", trials=4))


def test_resume_begins_where_there_is_none_and_refuses_what_is_another(study, tmp_path):
    study(*SPACE, trials=1, resume=True)
    with pytest.raises(ValueError, match=r"has search .*0\.01\.\.10.*take another folder"):
        study("temperature", resume=True)
    with pytest.raises(ValueError, match="has seed 0, this one 1"):
        study(*SPACE, resume=True, seed=1)
    with pytest.raises(ValueError, match="another student"):
        study(*SPACE, resume=True, changes=["student.init_args.width=3"])
    (tmp_path / "study" / "study.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        study(*SPACE, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        study(*SPACE, out="other")


def test_the_teacher_is_trained_once(study, toy):
    fields = {"teacher_training": {"epochs": 2, "lr": 0.1, "progress": False}}
    tuned = study("weights", trials=3, fields=fields)
    assert len(toy.taught) == 2 * 4
    assert {t.state for t in tuned.trials} == {"complete"}
    study("weights", trials=5, fields=fields, resume=True)
    assert len(toy.taught) == 2 * 4


def test_a_teacher_that_was_interrupted_is_trained_to_its_end(study, toy):
    fields = {"teacher_training": {"epochs": 3, "lr": 0.1, "progress": False}}
    toy.at_pass[3] = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted, match="go on with resume"):
        study("weights", trials=1, fields=fields)
    tuned = study("weights", trials=1, fields=fields, resume=True)
    assert len(toy.taught) == 3 * 4
    assert len(tuned.trials) == 1
    assert outcome(study("weights", trials=1, fields=fields, out="undisturbed")) == outcome(tuned)


def test_a_timeout_begins_no_further_trial(study, toy):
    with pytest.raises(ValueError, match="timeout=0"):
        study("weights", timeout=0)
    tuned = study("weights", trials=50, timeout=1e-3)  # over when the first trial is
    assert len(tuned.trials) == 1


def test_a_folder_of_any_name(study):
    assert len(study("weights", trials=1, out="50% of #1?x=y & ü").trials) == 1


# The tables


def test_the_tables_hold_every_trial(study):
    space = ["losses.1.init_args.temperature=[2, 4]", "student.init_args.width=[2, null]", f"{WEIGHT}=0.1..1"]
    with pytest.raises(RecipeError, match="width"):  # no value of the list is wrong in itself, but this one is
        study(space[1].replace("2", '"a"'))
    tuned = study(*space, trials=4)
    about = json.loads((tuned.out / "trials.json").read_text())
    assert about["monitor"] == "nll"
    assert about["data"] == "validation"
    assert [t["values"] for t in about["trials"]] == [t.values for t in tuned.trials]
    with (tuned.out / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, trial in zip(rows, tuned.trials, strict=True):
        assert row["state"] == trial.state
        assert float(row["nll"] or "nan") == pytest.approx(trial.value, nan_ok=True) or trial.value is None
        assert float(row[WEIGHT]) == trial.values[WEIGHT]
        assert (row["student.init_args.width"] == "null") == (trial.values["student.init_args.width"] is None)
    assert {t.state for t in tuned.trials if t.values["student.init_args.width"] is None} <= {"failed"}


def test_the_importance_names_what_matters(study):
    # a weight of 0.1..10 against random labels decides; the temperature of a loss that weighs nothing does not
    losses = [*BASE["losses"], {"class_path": "KD", "init_args": {"weight": 0.0, "name": "idle"}}]
    space = [f"{WEIGHT}=0.01..10:log", "losses.2.init_args.temperature=1..10"]
    tuned = study(*space, trials=16, fields={"losses": losses}, prune=False)
    if not tuned.importance:
        pytest.skip("this optuna calculates no importance without further packages")
    assert set(tuned.importance) == {WEIGHT, "losses.2.init_args.temperature"}
    assert tuned.importance[WEIGHT] > 0.5
    assert study("weights", trials=2, out="few").importance == {}


# Searches


def test_searches_are_read():
    assert Search.parse("training.lr=1e-4..1e-1:log") == Search("training.lr", 1e-4, 1e-1, log=True)
    assert Search.parse("a.b[0]=1..8:int:log") == Search("a.b.0", 1, 8, whole=True, log=True)
    assert Search.parse("x=-1..1") == Search("x", -1, 1)
    layers = Search.parse("losses.1.init_args.taps=[[layer2],[layer3],[[layer1,layer2]]]")
    assert layers.choices == (["layer2"], ["layer3"], [["layer1", "layer2"]])
    for search in (layers, Search("x", 1, 8, whole=True), Search("x", 0.5, 2, log=True)):
        assert Search.parse(str(search)) == search


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temprature", "expected FIELD=LOW..HIGH.*nearest: 'temperature'"),
        ("=1..2", "expected FIELD=LOW..HIGH"),
        ("a..b=1..2", "expected FIELD=LOW..HIGH"),
        ("a=5", r"expected a=LOW\.\.HIGH"),
        ("a=1...2", r"expected a=LOW\.\.HIGH"),
        ("a=1..2:lgo", "nearest: 'log'"),
        ("a=2..1", "lower end first"),
        ("a=1..1", "lower end first"),
        ("a=0..1:log", "above 0"),
        ("a=0.5..2:int", "whole numbers"),
        ("a=[1]", "two or more different choices"),
        ("a=[1, 1]", "two or more different choices"),
        ("a=[1, 2", "not YAML"),
    ],
)
def test_a_search_that_cannot_be_read(text, said):
    with pytest.raises(ValueError, match=said):
        Search.parse(text)


def test_a_field_that_does_not_exist_is_refused_before_anything_is_trained(study, toy, tmp_path):
    for text, said in (
        ("losses.1.init_args.temprature=1..10", "temprature: no such field of KD; nearest: 'temperature'"),
        ("losses.7.init_args.weight=1..10", "search: losses.7.init_args.weight: '7' is no item of a list of 2"),
        ("trianing.lr=0.1..1", "trianing: no such field; nearest: 'training'"),
        ("losses.1.init_args.temperature=-2..-1", "expected a positive number"),
    ):
        with pytest.raises(RecipeError) as refused:
            study(text)
        assert said in str(refused.value)
    # a range of which only an end is wrong is searched
    tuned = study("losses.1.init_args.temperature=-5..5", trials=6, out="ends")
    assert "expected a positive number" in next(t.reason for t in tuned.trials if t.state == "failed")
    assert len(toy.students) == 16 * len([t for t in tuned.trials if t.state == "complete"])
    assert not (tmp_path / "study").exists()


def test_searches_that_contradict_each_other(study):
    for space, said in (
        ((), "nothing to search"),
        (("training.lr=0.1..1", "training.lr=0.1..2"), "training.lr: given twice"),
        (("losses.1.init_args.weight=1..2", "losses=[[TaskLoss], [KD]]"), "losses is searched as well"),
    ):
        with pytest.raises(ValueError, match=said):
            study(*space)
    with pytest.raises(ValueError, match="names no losses"):
        study("temperature", fields={"losses": None})
    with pytest.raises(ValueError, match="search temperature: no loss of the recipe has any"):
        study("temperature", fields={"losses": ["TaskLoss"]})
    with pytest.raises(ValueError, match="no validation"):
        study("weights", changes=["data.init_args.validation=false"])
    with pytest.raises(ValueError, match="trials=0"):
        study("weights", trials=0)


# The short words


def expanded(recipe, *space, changes=()):
    run = load(recipe, ["data.init_args.limit=100", *changes])
    return expand(read(recipe) if isinstance(recipe, str) else copy.deepcopy(recipe), space, run.keywords)


def test_temperature_of_every_loss_that_has_one():
    (kd,) = expanded("kd", "temperature")
    assert kd == Search("losses.1.init_args.temperature", 1.0, 10.0, log=True)
    (crd,) = expanded("crd", "temperature")  # 0.07, of another kind
    assert (crd.field, crd.low, crd.high) == (
        "losses.1.init_args.temperature",
        pytest.approx(0.007),
        pytest.approx(0.7),
    )
    (staged,) = expanded("fit_nets_two_stages", "temperature")
    assert staged.field == "stages.1.losses.1.init_args.temperature"


def test_weights_of_every_loss_but_the_tasks():
    kd, critic = expanded("logit_critic", "weights")
    assert (kd.field, kd.low, kd.high, kd.log) == (WEIGHT, pytest.approx(0.09), pytest.approx(9), True)
    assert (critic.field, critic.low) == ("losses.2.init_args.weight", pytest.approx(0.01))
    (default,) = expanded("attention_transfer", "weights")  # the recipe names none
    assert (default.low, default.high) == (100, 10000)
    fields = read("kd")
    fields["losses"][1]["init_args"]["weight"] = {"class_path": "WarmUp", "init_args": {"weight": 0.5, "until": 0.1}}
    (schedule,) = expanded(fields, "weights")
    assert (schedule.field, schedule.low) == (f"{WEIGHT}.init_args.weight", pytest.approx(0.05))


def test_layers_are_what_the_recipe_says_the_automatic_choice_and_every_pair():
    (search,) = expanded("attention_transfer", "layers")
    assert search.field == "losses.1.init_args.taps"
    stages = ["stage1", "stage2", "stage3"]
    # the automatic choice is what this recipe says, and it is there once
    pairs = [[s] if s == t else [[s, t]] for s in stages for t in stages]
    assert list(search.choices) == [stages, *pairs]
    (hint,) = expanded("fit_nets", "layers")  # the middle stage, automatically too
    assert list(hint.choices) == [["stage2"], *(p for p in pairs if p != ["stage2"])]
    (both,) = expanded("attention_transfer", "layers", "losses.1.init_args.taps=[[stage1], [stage2]]")
    assert both.choices == (["stage1"], ["stage2"])
    with pytest.raises(ValueError, match="no loss of the recipe has any"):
        expanded("kd", "layers")
    with pytest.raises(ValueError, match="no teacher network"):
        expanded("be_your_own_teacher", "layers")


def test_layers_without_taps_and_of_deep_networks():
    fields = read("attention_transfer")
    del fields["losses"][1]["init_args"]
    (search,) = expanded(fields, "layers")
    assert search.choices[0] == []
    assert len(search.choices) == 1 + 9


def test_every_choice_of_layers_can_be_bound(tmp_path):
    tuned = tune(
        "fit_nets",
        ["layers"],
        trials=6,
        out=tmp_path / "study",
        changes=[
            "student.init_args.width=2",
            "teacher.init_args.width=3",
            "teacher_training.epochs=1",
            "training.epochs=1",
            "data.init_args.limit=40",
            "data.init_args.validation=20",
        ],
    )
    assert {t.state for t in tuned.trials} <= {"complete", "pruned"}
    again = yaml.safe_load((tuned.out / "best.yaml").read_text())
    assert again["losses"][1]["init_args"]["taps"] == tuned.best.values["losses.1.init_args.taps"]
