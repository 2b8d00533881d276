"""What a comparison's fields become: cells in order, and clear words for mistakes."""

from __future__ import annotations

import copy

import pytest
import yaml

from tutelage.building import RecipeError
from tutelage.catalogue import methods
from tutelage.comparison import Comparison, read_comparison
from tutelage.comparison.comparing import plain_comparison
from tutelage.comparison.methods import method_fields
from tutelage.comparison.plan import CONTROL, TEACHER
from tutelage.models import SmallCNN, save_weights
from tutelage.recipe import load, packaged_names, read

NARROW = {"class_path": "SmallCNN", "init_args": {"width": 2}}
WIDE = {"class_path": "SmallCNN", "init_args": {"width": 4}}
BIG = {"class_path": "SmallCNN", "init_args": {"width": 8}}
DATA = {"class_path": "fashion_loaders", "init_args": {"limit": 64, "validation": 50}}
RECIPE = {"student": NARROW, "teacher": BIG, "data": DATA, "training": {"epochs": 4, "lr": 0.1}}


def cells_of(fields, **how):
    return read_comparison(fields, **how).plan()[0]


def names(cells):
    return [(c.method, c.student, c.teacher, c.seed) for c in cells]


def test_seed_by_seed_and_what_is_needed_first():
    fields = {
        "recipe": RECIPE,
        "seeds": [4, 2],
        "students": {"a": NARROW, "b": {"student": WIDE}},
        "teachers": {"ready": {"teacher": BIG}, "trained": {"teacher": WIDE, "teacher_training": {"epochs": 1}}},
        "methods": ["KD"],
    }
    cells, skipped = read_comparison(fields).plan()
    assert skipped == []
    # of the teachers one is trained, once; the student alone is the same beside both
    expected = [(TEACHER, "trained", None, 0)]
    for seed in (4, 2):
        for student in ("a", "b"):
            expected += [(CONTROL, student, "ready", seed), ("KD", student, "ready", seed)]
            expected += [("KD", student, "trained", seed)]
    assert names(cells) == expected
    assert len({c.key for c in cells}) == len(cells)
    there = set()
    for cell in cells:
        assert cell.needs is None or cell.needs in there
        there.add(cell.key)
    trainer = cells[0]
    assert trainer.fields == {"student": WIDE, "data": DATA, "training": {"epochs": 1}, "seed": 0}
    assert [c.needs for c in cells if c.teacher == "trained"] == [trainer.key] * 4
    assert all("teacher_training" not in c.fields for c in cells)
    assert [c.fields["seed"] for c in cells[1:]] == [4] * 6 + [2] * 6


def test_the_teachers_training_does_not_see_what_the_student_sees():
    views = {"class_path": "CleanToNoisy"}
    recipe = {**RECIPE, "views": views, "teacher_training": {"epochs": 1}}
    cells = cells_of(recipe, methods=["KD"], seeds=1)
    assert "views" not in cells[0].fields
    assert all(c.fields["views"] == views for c in cells[1:])


def test_weights_that_are_there_are_not_trained(tmp_path):
    save_weights(SmallCNN(width=8), tmp_path / "big.safetensors")
    recipe = {**RECIPE, "teacher_training": {"epochs": 1}, "teacher_weights": str(tmp_path / "big.safetensors")}
    cells = cells_of(recipe, methods=["KD"], seeds=1)
    assert [c.method for c in cells] == [CONTROL, "KD"]
    assert all(c.needs is None for c in cells)


def test_the_control_is_the_student_alone():
    control = cells_of(RECIPE, methods=["KD"], seeds=1)[0]
    assert control.fields["losses"] == [{"class_path": "TaskLoss"}]
    assert control.fields["student"] == NARROW
    assert control.fields["training"] == RECIPE["training"]
    # also in a comparison that is made by hand
    mine = Comparison(RECIPE, {"KD": {}}, {"s": {}}, {"t": {}}, [0])
    assert names(mine.plan()[0]) == [(CONTROL, "s", "t", 0), ("KD", "s", "t", 0)]


def test_names_are_filled_in_and_a_missing_one_skips_that_method_alone():
    procedure = {"class_path": "teacher_assistant", "init_args": {"assistants": ["$assistant"]}}
    chain = {"procedure": procedure, "losses": [{"class_path": "KD"}]}
    fields = {
        "recipe": RECIPE,
        "seeds": 1,
        "students": {"a": {"student": NARROW, "$assistant": WIDE}, "b": NARROW},
        "methods": {
            "chain": chain,
            "pair": {"student": {"class_path": "Cohort", "init_args": {"peers": ["$student", "$teacher"]}}},
        },
    }
    cells, skipped = read_comparison(fields).plan()
    found = {(c.method, c.student): c.fields for c in cells}
    assert found["chain", "a"]["procedure"]["init_args"]["assistants"] == [WIDE]
    assert found["pair", "b"]["student"]["init_args"]["peers"] == [NARROW, BIG]
    assert ("chain", "b") not in found
    assert {(CONTROL, "b"), ("pair", "a"), (CONTROL, "a")} <= found.keys()
    assert [(r.method, r.student, r.state) for r in skipped] == [("chain", "b", "skipped")]
    assert "$assistant" in skipped[0].reason
    assert all(not k.startswith("$") for f in found.values() for k in f)


def test_a_field_can_be_taken_away():
    recipe = {**RECIPE, "teacher_weights": "big.pt", "teacher_training": {"epochs": 1}}
    own = {"class_path": "DeepMutualLearning"}
    cells = cells_of({"recipe": recipe, "seeds": 1, "methods": {"mutual": {"teacher": own, "teacher_weights": None}}})
    assert "teacher_weights" not in cells[-1].fields
    assert cells[-1].fields["teacher"] == own
    assert cells[-1].needs is None


def test_settings_of_a_training_are_laid_over_one_by_one():
    fields = {"recipe": RECIPE, "seeds": 1, "methods": {"slow": {"training": {"lr": 0.01}}}}
    assert cells_of(fields)[-1].fields["training"] == {"epochs": 4, "lr": 0.01}
    assert RECIPE["training"] == {"epochs": 4, "lr": 0.1}


@pytest.mark.parametrize(
    "spelled", ["AttentionTransfer", "attention_transfer", "attention-transfer", "ATTENTIONtransfer"]
)
def test_methods_by_their_names_however_they_are_written(spelled):
    assert list(read_comparison("kd", methods=[spelled]).methods) == [CONTROL, "AttentionTransfer"]
    assert list(read_comparison({"recipe": "kd", "methods": [spelled]}).methods) == [CONTROL, "AttentionTransfer"]


def test_a_packaged_recipe_that_is_no_method_can_be_one():
    assert list(read_comparison("kd", methods=["fit_nets_two_stages.yaml"]).methods)[1:] == ["fit_nets_two_stages"]


def test_without_methods_every_loss_of_the_catalogue(tmp_path):
    every = [CONTROL, *(m.name for m in methods() if m.role == "losses")]
    assert list(read_comparison("kd").methods) == every
    # and what somebody's own recipe does, before them
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({**RECIPE, "losses": [{"class_path": "KD", "init_args": {"temperature": 9.0}}]}))
    own = read_comparison(mine)
    assert list(own.methods) == [CONTROL, "the recipe", *every[1:]]
    assert own.methods["the recipe"] == {"losses": [{"class_path": "KD", "init_args": {"temperature": 9.0}}]}
    mine.write_text(yaml.safe_dump(RECIPE))
    kinds = [loss["class_path"] for loss in read_comparison(mine).methods["the recipe"]["losses"]]
    assert kinds == ["TaskLoss", "KD"], "what distill does where nothing is said"


def test_addresses_of_the_packaged_pair_are_dropped():
    packaged = read("fit_nets")["losses"][1]
    assert packaged["init_args"] == {"taps": ["stage2"]}
    assert method_fields("FitNets")["losses"][1] == {"class_path": "FitNets"}
    assert method_fields("CRD")["losses"][1]["init_args"] == {"k": read("crd")["losses"][1]["init_args"]["k"]}


@pytest.mark.parametrize(("epochs", "parts"), [(8, [2, 6]), (4, [1, 3]), (6, [2, 4]), (2, [1, 1]), (100, [25, 75])])
def test_stages_are_together_as_long_as_every_other_training(epochs, parts):
    recipe = read("fit_nets_two_stages")
    stages = method_fields("fit_nets_two_stages", {"training": {"epochs": epochs, "lr": 0.1}})["stages"]
    assert [stage["epochs"] for stage in stages] == parts
    # the learning rate of a stage stays the same part of the whole run's
    assert stages[0]["lr"] / 0.1 == pytest.approx(recipe["stages"][0]["lr"] / recipe["training"]["lr"])
    assert "lr" not in stages[1]


def test_stages_that_do_not_fit_are_skipped_with_the_reason():
    short = {**RECIPE, "training": {"epochs": 1}}
    cells, skipped = read_comparison(short, methods=["KD", "fit_nets_two_stages"], seeds=1).plan()
    assert [c.method for c in cells] == [CONTROL, "KD"]
    assert "2 stages" in skipped[0].reason


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (5, "training=5: expected settings"),
        ({"epochs": "many"}, "training.epochs='many': expected a whole number"),
        ({"epochs": 2.5}, "training.epochs=2.5: expected a whole number"),  # of which no whole parts sum to it
        ({"epochs": 0}, "it has 2 stages, and training.epochs=0"),
        ({"epochs": 8, "lr": "fast"}, "training.lr='fast': expected a number"),
    ],
)
def test_stages_of_a_training_that_is_none_are_skipped_with_the_reason(training, said):
    wrong = {**RECIPE, "training": training}
    skipped = read_comparison(wrong, methods=["fit_nets_two_stages"], seeds=1).plan()[1]
    assert said in skipped[0].reason


def test_stages_follow_the_pairs_own_training():
    students = {"long": {"student": NARROW, "training": {"epochs": 16}}}
    fields = {"recipe": RECIPE, "students": students, "seeds": 1, "methods": ["fit_nets_two_stages"]}
    assert [s["epochs"] for s in cells_of(fields)[-1].fields["stages"]] == [4, 12]


@pytest.mark.parametrize(
    ("name", "said"), [("DAFL", "source"), ("CleanToNoisy", "views"), ("averaged_ensemble", "teacher")]
)
def test_methods_that_are_no_loss_are_skipped_with_the_reason(name, said):
    cells, skipped = read_comparison("kd", methods=["KD", name], seeds=1).plan()
    assert [c.method for c in cells] == [TEACHER, CONTROL, "KD"]
    assert said in skipped[0].reason
    assert "under methods" in skipped[0].reason


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("DeepMutualLearning", {"teacher": {"class_path": "DeepMutualLearning"}}),
        ("teacher_assistant", {"assistants": [WIDE]}),
        ("InformationFlow", {"assistants": [WIDE]}),
        ("densely_guided", {"assistants": [WIDE]}),
        ("born_again", {"fresh": NARROW, "teacher": None, "teacher_weights": None}),
        ("teacher_free_self", {"fresh": NARROW, "teacher": None, "teacher_weights": None}),
        ("quantized_distillation", {}),
        ("ONE", {"teacher": {"class_path": "ONE"}}),
        ("OKDDip", {"teacher": {"class_path": "OKDDip"}}),
        ("CLILR", {"teacher": {"class_path": "CLILR"}}),
        ("FeatureFusion", {"teacher": {"class_path": "FeatureFusion"}}),
    ],
)
def test_packaged_recipes_say_what_makes_them_on_another_pair(name, there):
    students = {"small": {"student": NARROW, "$assistant": WIDE, "$example": [1, 28, 28]}}
    cells = cells_of({"recipe": RECIPE, "students": students, "methods": [name], "seeds": 1})
    made = cells[-1].fields
    said = {**made, **made.get("procedure", {}).get("init_args", {})}
    assert {k: said.get(k) for k in there} == there
    if name == "quantized_distillation":
        pytest.importorskip("torchao")
        assert made["student"]["init_args"]["student"] == NARROW
    assert load(made).keywords["losses"]


def without_taps(losses):
    """The losses of a recipe as they are on another pair, whose modules have other names."""
    kept = [{k: v for k, v in loss.get("init_args", {}).items() if k != "taps"} for loss in losses]
    return [
        {"class_path": loss["class_path"], **({"init_args": given} if given else {})}
        for loss, given in zip(losses, kept, strict=True)
    ]


def test_what_makes_a_method_is_what_its_recipe_does():
    for name in packaged_names():
        recipe = read(name)
        if "in_comparison" in recipe:
            made, packaged = recipe["in_comparison"]["losses"], recipe["losses"]
            assert made == packaged or made == without_taps(packaged), name


def test_a_recipe_whose_method_makes_the_student_is_no_setting():
    with pytest.raises(RecipeError, match="plain one"):
        read_comparison("deep_mutual_learning")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"recipe": RECIPE, "method": {}}, "'methods'"),
        ({"recipe": "kdd"}, "'kd'"),
        ({"recipe": RECIPE, "methods": ["kdd"]}, "'KD'"),
        ({"recipe": RECIPE, "methods": {"Rdk": {}}}, "'RKD'"),
        ({"recipe": RECIPE, "methods": {"mine": {"loses": []}}}, "methods.mine.loses: .*'losses'"),
        ({"recipe": RECIPE, "methods": {"mine": {"seed": 1}}}, "methods.mine.seed"),
        ({"recipe": RECIPE, "methods": {"alone": {"losses": []}}}, "methods.alone"),
        ({"recipe": RECIPE, "methods": {"teacher": {"losses": []}}}, "methods.teacher"),
        ({"recipe": RECIPE, "methods": "KD"}, "methods: expected"),
        ({"recipe": RECIPE, "methods": {"mine": [1]}}, "methods: expected"),
        ({"recipe": RECIPE, "students": {"a": {"studnet": NARROW}}}, "students.a.studnet: .*'student'"),
        ({"recipe": RECIPE, "students": [NARROW]}, "students: expected"),
        ({"recipe": RECIPE, "students": {}}, "students: expected"),
        ({"recipe": {k: v for k, v in RECIPE.items() if k != "teacher"}}, "'teacher'"),
        ({"recipe": {**RECIPE, "trainning": {}}}, "recipe.trainning: .*'training'"),
        ({"recipe": RECIPE, "students": {"x": NARROW}, "teachers": {"x": BIG}}, "teachers.x: .*another"),
        ({"recipe": RECIPE, "seeds": 0}, "seeds=0"),
        ({"recipe": RECIPE, "seeds": [1, 1]}, "seeds="),
        ({"recipe": RECIPE, "seeds": True}, "seeds=True"),
        ({"recipe": RECIPE, "target": 40}, "target=40"),
        ({"recipe": RECIPE, "quoted": "crd_cifar10"}, "'crd_cifar100'"),
        ({"recipe": RECIPE, "quoted": [{"methd": 1}]}, "'method'"),
    ],
)
def test_mistakes_name_the_field_and_the_nearest_right_name(fields, said):
    with pytest.raises(ValueError, match=said):
        read_comparison(fields)


def test_seeds_are_a_number_or_a_list():
    assert read_comparison("kd", seeds=2).seeds == [0, 1]
    assert read_comparison("kd", seeds=[7]).seeds == [7]
    assert read_comparison({"recipe": "kd", "seeds": 4}).seeds == [0, 1, 2, 3]
    assert read_comparison({"recipe": "kd", "seeds": 4}, seeds=1).seeds == [0]
    assert read_comparison("kd").seeds == [0, 1, 2]


def test_a_recipe_beside_the_comparisons_file_is_found(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "setting.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "folder" / "comparison.yaml").write_text("recipe: setting.yaml\nmethods: [KD]\n")
    monkeypatch.chdir(tmp_path)
    assert read_comparison("folder/comparison.yaml").recipe["training"] == RECIPE["training"]


def test_changes_are_of_the_recipe_or_of_the_comparisons_own_fields():
    given = copy.deepcopy(RECIPE)
    changes = [
        "training.epochs=2",
        "recipe.training.lr=0.5",
        "seeds=[3, 5]",
        "target=0.5",
        "methods.kd.losses.1.init_args.temperature=2",
    ]
    found = read_comparison(given, methods=["KD", "RKD"], changes=changes)
    assert found.recipe["training"] == {"epochs": 2, "lr": 0.5}
    assert (found.seeds, found.target) == ([3, 5], 0.5)
    # the method's own fields, with the change in them; the others are as they were
    assert found.methods["KD"]["losses"][1]["init_args"]["temperature"] == 2
    assert found.methods["KD"]["losses"][0] == method_fields("KD")["losses"][0]
    assert found.methods["RKD"] == {}
    assert given == RECIPE
    whole = read_comparison({"recipe": RECIPE, "methods": ["KD"]}, changes=["methods=[RKD]", "recipe=kd"])
    assert list(whole.methods) == [CONTROL, "RKD"]
    assert whole.recipe["training"] == read("kd")["training"]
    fields = {"recipe": RECIPE, "students": {"a": {"student": NARROW}}}
    students = read_comparison(fields, changes=["students.a.student.init_args.width=3", "students.b=resnet8"]).students
    assert students == {
        "a": {"student": {"class_path": "SmallCNN", "init_args": {"width": 3}}},
        "b": {"student": "resnet8"},
    }
    assert read_comparison(RECIPE, changes=["seeds=5"], seeds=1).seeds == [0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("methods.RKKD.losses.0.init_args.weight=1", "there is no 'RKKD' among the methods; nearest: 'RKD'"),
        ("students.smal.student=resnet8", "among the students; nearest: 'small'"),
        ("seeds=none", "seeds='none'"),
        ("methods.RKD.losses.7=1", "no item of a list of 2"),
        ("training.epochs", "expected field=value"),
    ],
)
def test_changes_that_lead_nowhere(change, said):
    fields = {"recipe": RECIPE, "students": {"small": NARROW}, "methods": ["RKD"]}
    with pytest.raises(RecipeError, match=said):
        read_comparison(fields, changes=[change])


def test_methods_beside_the_files_keep_the_fields_that_it_gives_them():
    own = {"losses": [{"class_path": "KD", "init_args": {"temperature": 9.0}}]}
    found = read_comparison({"recipe": RECIPE, "methods": {"KD": own}}, methods=["kd", "rkd"])
    assert found.methods == {CONTROL: found.methods[CONTROL], "KD": own, "RKD": {}}


def test_a_method_added_later_leaves_the_other_cells_as_they_were():
    before = {c.key for c in cells_of(RECIPE, methods=["KD"])}
    after = cells_of(RECIPE, methods=["RKD", "KD"])
    assert before < {c.key for c in after}
    assert {c.method for c in after if c.key not in before} == {"RKD"}


def test_the_plain_fields_read_again_are_the_same_comparison(fields):
    comparison = read_comparison(fields)
    plain = yaml.safe_load(yaml.safe_dump(plain_comparison(comparison)))
    assert CONTROL not in plain["methods"]
    again = read_comparison(plain)
    mine, theirs = again.plan()[0], comparison.plan()[0]
    assert names(mine) == names(theirs)
    assert [c.key for c in mine] == [c.key for c in theirs]
    assert (again.target, again.quoted, again.seeds) == (comparison.target, comparison.quoted, comparison.seeds)


def test_pairs_are_every_student_with_every_teacher():
    fields = {"recipe": RECIPE, "students": {"a": NARROW, "b": WIDE}, "teachers": {"x": BIG, "y": WIDE}}
    pairs = read_comparison(fields).pairs()
    assert [(p.student, p.teacher) for p in pairs] == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert [p.fields["teacher"] for p in pairs] == [BIG, WIDE] * 2
