"""Recipes: the same as the Python they stand for, clear about mistakes, and without power over what is imported."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import tutelage as tl
from tutelage.building import RecipeError, named_object
from tutelage.data import Images, ImageSet, fashion_loaders, fashion_subset, loaders
from tutelage.models import SmallCNN
from tutelage.recipe import load, packaged_names, read


@functools.cache
def few_images() -> ImageSet:
    """The beginning of the packaged set."""
    whole = fashion_subset()
    parts = (Images(part.images[:n], part.labels[:n]) for part, n in ((whole.train, 800), (whole.test, 60)))
    return ImageSet(*parts, whole.classes)


@pytest.fixture(autouse=True)
def only_few_images(monkeypatch):
    monkeypatch.setattr(loaders, "fashion_subset", few_images)


BASE = {
    "student": {"class_path": "SmallCNN", "init_args": {"width": 2}},
    "teacher": {"class_path": "SmallCNN", "init_args": {"width": 4}},
    "data": {"class_path": "fashion_loaders", "init_args": {"batch_size": 32, "limit": 64, "validation": 50}},
    "losses": [
        {"class_path": "TaskLoss", "init_args": {"weight": 0.1}},
        {"class_path": "KD", "init_args": {"temperature": 4.0}},
    ],
    "training": {"epochs": 1, "progress": False},
}


@pytest.fixture
def recipe(tmp_path):
    """A function that writes BASE with some fields replaced (given by path; None removes) and gives the file."""

    def write(changes: dict[tuple[Any, ...], Any] | None = None) -> Path:
        fields = copy.deepcopy(BASE)
        for path, value in (changes or {}).items():
            here: Any = fields
            for part in path[:-1]:
                here = here[part]
            if value is None:
                del here[path[-1]]
            else:
                here[path[-1]] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(fields))
        return file

    return write


# What a recipe stands for


def test_a_recipe_is_bit_for_bit_the_python_it_stands_for(recipe):
    file = recipe(
        {
            ("losses", 1): {"class_path": "AttentionTransfer", "init_args": {"taps": ["stage2", ["stage3", "stage3"]]}},
            ("teacher_training",): {"epochs": 1, "optimizer": "adamw", "lr": 0.004, "progress": False},
            ("seed",): 7,
        }
    )
    from_recipe = load(file)().student

    torch.manual_seed(7)
    student, teacher = SmallCNN(width=2), SmallCNN(width=4)
    data = loaders.fashion_loaders(batch_size=32, limit=64, validation=50)
    settings = {"epochs": 1, "progress": False, "seed": 7}
    tl.distill(teacher, None, data.train, data.validation, optimizer="adamw", lr=0.004, **settings)
    losses = [tl.TaskLoss(weight=0.1), tl.AttentionTransfer("stage2", ("stage3", "stage3"))]
    tl.distill(student, teacher, data.train, data.validation, test=data.test, losses=losses, **settings)
    for (name, mine), (_, theirs) in zip(student.state_dict().items(), from_recipe.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_order_of_fields_changes_nothing_and_the_seed_does(recipe, tmp_path):
    turned = tmp_path / "turned.yaml"
    turned.write_text(yaml.safe_dump(dict(reversed(BASE.items())), sort_keys=False))
    first, second = load(recipe()).keywords, load(turned).keywords
    other = load(recipe(), ["seed=1"]).keywords
    for role in ("student", "teacher"):
        assert torch.equal(first[role].linear.weight, second[role].linear.weight)
        assert not torch.equal(first[role].linear.weight, other[role].linear.weight)


def test_taps_are_positional_also_inside_stages(recipe):
    hint = {"class_path": "FitNets", "init_args": {"taps": [["stage1", "stage2"]]}}
    stages = [{"epochs": 1, "losses": [hint]}, {"epochs": 2, "lr": 1e-3, "losses": ["TaskLoss"]}]
    built = load(recipe({("losses",): None, ("stages",): stages})).keywords
    assert built["stages"][0].losses[0].taps == (("stage1", "stage2"),)
    assert (built["stages"][1].epochs, built["stages"][1].lr) == (2, 1e-3)
    one = {"class_path": "FitNets", "init_args": {"taps": "stage1"}}
    assert load(recipe({("losses", 1): one})).keywords["losses"][1].taps == ("stage1",)


def test_a_weight_may_be_a_schedule(recipe):
    schedule = {"class_path": "WarmUp", "init_args": {"weight": 2, "until": 0.5}}
    built = load(recipe({("losses", 1, "init_args", "weight"): schedule})).keywords
    assert built["losses"][1].weight == tl.WarmUp(2.0, until=0.5)
    assert load(recipe({("losses", 1, "init_args", "weight"): 3})).keywords["losses"][1].weight == 3.0


def test_optimiser_and_scheduler_may_be_classes(recipe):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.8, 0.9]}}
    scheduler = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}
    run = load(recipe({("training", "optimizer"): optimizer, ("training", "scheduler"): scheduler}))
    training = run.keywords["training"]
    made = training.make_optimizer([torch.nn.Parameter(torch.ones(1))])
    assert isinstance(made, torch.optim.AdamW)
    assert (made.defaults["lr"], made.defaults["betas"]) == (0.001, (0.8, 0.9))
    assert training.make_scheduler(made, 10).step_size == 2
    assert run().history[0]["lr"] == pytest.approx(0.0001)  # two steps of 64 / 32 samples


def test_a_criterion_may_be_a_function_a_part_of_one_or_an_object(recipe):
    path = ("losses", 0, "init_args", "criterion")
    function = torch.nn.functional.cross_entropy
    assert load(recipe({path: "torch.nn.functional.cross_entropy"})).keywords["losses"][0].criterion is function
    node = {"class_path": "torch.nn.functional.cross_entropy", "init_args": {"label_smoothing": 0.1}}
    part = load(recipe({path: node})).keywords["losses"][0].criterion
    assert isinstance(part, functools.partial)
    assert part.keywords == {"label_smoothing": 0.1}
    node = {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}}
    assert load(recipe({path: node})).keywords["losses"][0].criterion.label_smoothing == 0.1


def test_a_name_alone_is_an_object_without_arguments(recipe):
    built = load(recipe({("losses",): ["TaskLoss", "tutelage.KD"], ("views",): "SameView"})).keywords
    assert [type(loss) for loss in built["losses"]] == [tl.TaskLoss, tl.KD]
    assert isinstance(built["views"], tl.SameView)


def test_models_of_libraries_come_through_create(recipe):
    pytest.importorskip("timm")
    node = {"class_path": "create", "init_args": {"spec": "timm:resnet10t", "in_chans": 1, "num_classes": 10}}
    assert load(recipe({("teacher",): node})).keywords["teacher"].num_classes == 10


def test_numbers_are_numbers(recipe):
    text = recipe().read_text().replace("epochs: 1", "epochs: 1\n  lr: 1e-3\n  weight_decay: 5E-04")
    file = recipe()
    file.write_text(text)
    training = load(file).keywords["training"]
    assert (training.lr, training.weight_decay) == (1e-3, 5e-4)
    assert load(recipe(), ["training.lr=2e-2"]).keywords["training"].lr == 0.02


def test_image_folder_in_a_recipe(recipe, tmp_path):
    pil = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for n in range(12):
            folder = tmp_path / part / f"class{n % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pil.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{n}.png")

    def folder(part: str, **more: Any) -> dict[str, Any]:
        return {"class_path": "image_folder", "init_args": {"path": str(tmp_path / part), "size": 16, **more}}

    data = {
        "class_path": "dataset_loaders",
        "init_args": {
            "train": folder("train", train=True),
            "test": folder("test"),
            "validation": 0.25,
            "batch_size": 3,
        },
    }
    models = {(role, "init_args"): {"width": 2, "in_channels": 3, "num_classes": 3} for role in ("student", "teacher")}
    run = load(recipe({("data",): data, **models}))
    assert run().metrics.samples == 12
    assert [len(batch[0]) for batch in run.keywords["data"].train] == [3, 3, 3]


def test_torchvision_dataset_with_a_transform_in_a_recipe(recipe, tmp_path):
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 10)):
        pixels = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        header = [0x803, n, 28, 28]
        (raw / f"{part}-images-idx3-ubyte").write_bytes(np.array(header, ">i4").tobytes() + pixels.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, n], ">i4").tobytes() + labels.tobytes())
    v2 = "torchvision.transforms.v2"
    steps = [
        {"class_path": f"{v2}.ToImage"},
        {"class_path": f"{v2}.Resize", "init_args": {"size": [14, 14]}},
        {"class_path": f"{v2}.ToDtype", "init_args": {"dtype": "torch.float32", "scale": True}},
    ]
    common = {"name": "MNIST", "root": str(tmp_path)}
    transform = {"class_path": f"{v2}.Compose", "init_args": {"transforms": steps[:2]}}
    data = {
        "class_path": "dataset_loaders",
        "init_args": {
            "train": {"class_path": "torchvision_dataset", "init_args": common},
            "test": {"class_path": "torchvision_dataset", "init_args": {**common, "train": False}},
            "batch_size": 12,
        },
    }
    assert load(recipe({("data",): data}))().metrics.samples == 10
    data["init_args"]["train"]["init_args"] = {**common, "transform": transform}
    assert load(recipe({("data",): data})).keywords["data"].train.dataset[0][0].shape == (1, 14, 14)


# Mistakes


def node(path: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def said(file: Path | str, changes=(), **more: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load(file, changes, **more)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


KD_ARGS = ("losses", 1, "init_args")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({("losess",): []}, ["losess", "'losses'"]),
        ({(*KD_ARGS, "temprature"): 3.0}, ["losses[1].init_args.temprature", "KD", "'temperature'"]),
        ({("losses", 1, "class_path"): "AttentionTransfr"}, ["losses[1]", "'AttentionTransfr'", "'AttentionTransfer'"]),
        ({("losses", 1, "class_path"): "tutelage.KDD"}, ["losses[1]", "'tutelage.KDD'", "'KD'"]),
        ({("losses", 1, "class_path"): 3}, ["losses[1].class_path=3", "name"]),
        ({(*KD_ARGS, "temperature"): "hot"}, ["losses[1].init_args.temperature='hot'", "a number"]),
        ({(*KD_ARGS, "temperature"): True}, ["losses[1].init_args.temperature=True", "a number"]),
        ({(*KD_ARGS, "temperature"): -1.0}, ["losses[1]", "temperature=-1.0", "positive"]),
        ({("losses", 1, "init_arg"): {}}, ["losses[1].init_arg", "'init_args'"]),
        ({("losses", 1, "dict_kwargs"): {"a": 1}}, ["losses[1].dict_kwargs", "init_args"]),
        ({("losses", 1, "init_args"): [1]}, ["losses[1].init_args=[1]", "fields of KD"]),
        ({("losses", 1): "SmallCNN"}, ["losses[1]='SmallCNN'", "Loss", "SmallCNN is not"]),
        ({("losses",): {"class_path": "KD"}}, ["losses='KD'", "a list of Loss"]),
        ({(*KD_ARGS, "taps"): [["a", "b", "c"]]}, ["losses[1].init_args.taps[0]", "text or [text, text]"]),
        ({(*KD_ARGS, "taps"): 3}, ["losses[1].init_args.taps=3", "a list"]),
        (
            {(*KD_ARGS, "weight"): node("WarmUp", weight=1, untl=1)},
            ["weight", "'until'"],
        ),
        (
            {(*KD_ARGS, "weight"): node("WarmUp", weight=1, until=9)},
            ["weight", "until=9"],
        ),
        ({("student",): None}, ["'student' is missing"]),
        ({("student", "init_args", "width"): "wide"}, ["student.init_args.width='wide'", "a whole number"]),
        ({("student", "init_args", "width"): 0}, ["student", "width=0"]),
        ({("student",): "fashion_loaders"}, ["student='fashion_loaders'", "Module", "fashion_loaders"]),
        ({("student",): {"width": 3}}, ["student=", "Module (class_path and init_args)"]),
        ({("student",): {"init_args": {"width": 3}}}, ["student.class_path=None"]),
        ({("data", "init_args", "limit"): 1.5}, ["data.init_args.limit=1.5", "a whole number or nothing"]),
        ({("training", "epoch"): 3}, ["training.epoch", "Training", "'epochs'"]),
        ({("training", "epochs"): "ten"}, ["training.epochs='ten'", "a whole number"]),
        ({("training", "precision"): "bf17"}, ["training.precision='bf17'", "'bf16'"]),
        ({("training", "optimizer"): "adam"}, ["training", "optimizer='adam'", "'adamw'"]),
        ({("training", "optimizer"): {"class_path": "torch.optim.Adamw"}}, ["training.optimizer", "'AdamW'"]),
        (
            {("training", "optimizer"): {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1}}},
            ["training.optimizer.init_args.lrr", "AdamW", "'lr'"],
        ),
        ({("training",): "fast"}, ["training='fast'", "fields of Training"]),
        ({("training", "seed"): 3}, ["training.seed", "one seed"]),
        ({("stages",): [{"epoch": 1, "losses": []}]}, ["stages[0].epoch", "Stage", "'epochs'"]),
        ({("stages",): [{"epochs": "x", "losses": []}]}, ["stages[0].epochs='x'", "a whole number"]),
        ({("control",): "maybe"}, ["control='maybe'", "true or false"]),
        ({("seed",): "abc"}, ["seed='abc'", "a whole number"]),
        ({("views",): "os.path"}, ["views", "'os'", "--trust os"]),
    ],
)
def test_a_mistake_is_answered_with_field_value_and_nearest(recipe, changes, parts):
    text = said(recipe(changes))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("a: [b", ["line 1", "not YAML"]),
        ("- a", ["list", "student"]),
        ("", ["NoneType", "student"]),
        ("student: SmallCNN\nseed: 1\nseed: 2", ["'seed' stands twice"]),
        ("student: !!python/object/apply:os.system ['true']", ["not YAML", "python/object/apply"]),
        ("student: &a {class_path: Cohort, init_args: {peers: [*a]}}\ndata: fashion_loaders", ["contains itself"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, parts):
    file = tmp_path / "r.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = said(file)
    for part in [str(file), *parts]:
        assert part in text


def test_unknown_recipe_names_the_nearest():
    assert "'attention_transfer'" in said("atention_transfer")
    assert "neither a file" in said("some/where/kd")
    assert read("kd.yaml") == read("kd")
    assert "kd" in packaged_names()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("training.epochs", ["field=value"]),
        ("=3", ["field=value"]),
        ("training..epochs=3", ["field=value"]),
        ("training.epoch=3", ["training.epoch", "'epochs'"]),
        ("trainig.epochs=3", ["trainig", "'training'"]),
        ("losses.x=3", ["'x'", "a list of 2"]),
        ("losses[2].class_path=KD", ["'2'", "a list of 2"]),
        ("student.class_path.a=3", ["'class_path' holds 'SmallCNN'"]),
        ("training.epochs=[", ["--set training.epochs", "not YAML"]),
        ("losses[1].init_args.temperature=hot", ["losses[1].init_args.temperature='hot'"]),
    ],
)
def test_bad_changes(recipe, change, parts):
    text = said(recipe(), [change])
    for part in parts:
        assert part in text


def test_good_changes(recipe):
    changes = ["losses[1].init_args.temperature=2", "training.epochs=3", "out=runs/a", "teacher_training.epochs=2"]
    built = load(recipe(), changes).keywords
    assert built["losses"][1].temperature == 2.0
    assert (built["training"].epochs, built["out"], built["teacher_training"].epochs) == (3, "runs/a", 2)


# Whom a recipe may call


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module that leaves a file where it is imported."""
    mark = tmp_path / "imported"
    (tmp_path / "foreign_module.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom tutelage.models import SmallCNN\n"
        "class Own(SmallCNN):\n    pass\ndef make(width: int = 2) -> SmallCNN:\n    return SmallCNN(width)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return mark


FOREIGN = [
    node("foreign_module.Own"),
    "foreign_module.Own",
    node("foreign_module.make"),
    json.dumps(node("foreign_module.Own")),
    node("create", spec="foreign_module:make"),
    node("tutelage.models.loading.create", spec="foreign_module:make"),
    node("tutelage.models.loading._called", source="foreign_module", name="make", kwargs={}),
    node("tutelage.errors.require", module="foreign_module", extra="x"),
    node("tutelage.building.named_object", path="foreign_module.Own", trusted=["foreign_module"]),
    node("SmallCNN", width=node("foreign_module.Own")),
    node("AveragedEnsemble", members=[node("foreign_module.Own")]),
    {"class_path": "SmallCNN", "init_args": {}, "dict_kwargs": {"width": node("foreign_module.Own")}},
    {"init_args": {}, "class_path": "foreign_module"},
]


@pytest.mark.parametrize("value", FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize(
    "field", ["student", "views", "criterion", "optimizer", "scheduler", "weight", "train", "item"]
)
def test_nothing_is_imported_from_elsewhere(recipe, foreign, field, value):
    path = {
        "criterion": ("losses", 0, "init_args", "criterion"),
        "weight": ("losses", 0, "init_args", "weight"),
        "optimizer": ("training", "optimizer"),
        "scheduler": ("training", "scheduler"),
        "train": ("data",),
        "item": ("losses",),
    }.get(field, (field,))
    value = {"train": node("Loaders", train=value), "item": [value]}.get(field, value)
    with contextlib.suppress(RecipeError, TypeError, ValueError, AttributeError):
        load(recipe({path: value}))()
    assert not foreign.exists()


def test_trust_opens_what_it_names(recipe, foreign):
    file = recipe({("student",): node("foreign_module.Own", width=3), ("teacher",): node("foreign_module.make")})
    assert "--trust foreign_module" in said(file)
    assert not foreign.exists()
    built = load(file, trust=["foreign_module"]).keywords
    assert type(built["student"]).__module__ == "foreign_module"
    assert built["student"].linear.in_features == 12
    assert foreign.exists()


RUNS_CODE = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.open",
    "torch.os.system",
    "torch.serialization.os.system",
    "torch.nn.functional.importlib.import_module",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.utils.collect_env.run",
    "torch.utils.cpp_extension.load_inline",
    "torch.utils.data.datapipes.iter.Mapper",
    "torch.nn.np.load",
    "torch.nn.Module.__init__",
    "torch.nn.Linear.__class__",
    "torch.nn",
    "numpy.load",
    "datasets.load_dataset",
    "transformers.pipeline",
    "torchvision.datasets.utils.extract_archive",
    "timm.models.load_checkpoint",
    "tutelage.cli.main",
    "tutelage.recipe.load",
    "tutelage.catalogue.importlib.import_module",
    "tutelage.models.loading.importlib.import_module",
    "tutelage.files.shutil.rmtree",
    "os .system",
    "..os.system",
    "os:system",
    "",
]


@pytest.mark.parametrize("path", RUNS_CODE)
def test_functions_that_run_code_cannot_be_named(recipe, path):
    with pytest.raises(RecipeError):
        named_object(path)
    for field in (("student",), ("views",), ("losses", 0, "init_args", "criterion"), ("training", "scheduler")):
        for value in (path, node(path, command="true")):
            if field[-1] == "scheduler" and value == path:
                continue  # text is a scheduler's name; nothing is looked up
            said(recipe({field: value}))


def test_a_function_is_called_only_where_it_declares_what_it_makes(recipe, monkeypatch):
    called = []
    monkeypatch.setattr(torch.nn.init, "calculate_gain", lambda *a, **k: called.append(a))
    torch.nn.init.calculate_gain.__module__ = "torch.nn.init"
    text = said(recipe({("student",): node("torch.nn.init.calculate_gain", nonlinearity="relu")}))
    assert "does not declare to return" in text
    assert not called


@pytest.mark.parametrize(
    "field", [{"trust_remote_code": True}, {"checkpoint_path": "a.pt"}, {"pretrained_cfg": {"file": "a.pt"}}]
)
def test_libraries_are_not_asked_to_run_code(recipe, field):
    text = said(recipe({("teacher",): node("create", spec="timm:resnet10t", **field)}))
    assert next(iter(field)) in text
    assert "may run code" in text


def test_pickles_are_no_data(recipe):
    data = node("dataset_loaders", train=node("huggingface", source="pandas", data_files="a.pkl"))
    assert "may run code" in said(recipe({("data",): data}))


def test_weights_are_read_as_plain_tensors_only(recipe, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save(Evil(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="checkpoint"):
        load(recipe(), [f"student_weights={tmp_path / 'w.pt'}"])()
    assert not (tmp_path / "pwned").exists()


# Fields that go together


@pytest.mark.parametrize("field", ["teacher_weights=a.safetensors", "teacher_training.epochs=1"])
def test_a_field_for_a_teacher_needs_one(recipe, field):
    with pytest.raises(RecipeError, match=f"{field.split('=')[0].split('.')[0]}: .*no teacher"):
        load(recipe({("teacher",): None}), [field])()


def test_weights_from_files(recipe, tmp_path):
    from tutelage.models import save_weights

    torch.manual_seed(3)
    known = SmallCNN(width=4)
    save_weights(known, tmp_path / "t.safetensors")
    run = load(recipe(), [f"teacher_weights={tmp_path / 't.safetensors'}"])
    result = run()
    assert torch.equal(result.teacher.linear.weight, known.linear.weight)


def test_folders_of_a_trained_teacher_and_assistants(recipe, tmp_path):
    changes = ["teacher_training.epochs=1", "teacher_training.progress=false", f"out={tmp_path / 'run'}"]
    load(recipe(), changes)()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["student", "teacher"]
    with pytest.raises(FileExistsError, match="teacher already holds a run"):
        load(recipe(), changes)()
    changes[-1] = f"out={tmp_path / 'chain'}"
    load(recipe({("procedure",): node("teacher_assistant", assistants=[node("SmallCNN", width=3)])}), changes)()
    assert sorted(p.name for p in (tmp_path / "chain").iterdir()) == ["assistant-1", "student", "teacher"]
    load(recipe(), [f"out={tmp_path / 'plain'}"])()
    with pytest.raises(FileExistsError, match="choose another folder"):
        load(recipe(), [*changes[:2], f"out={tmp_path / 'plain'}"])()


def test_fashion_loaders_are_the_python_ones():
    assert named_object("tutelage.data.fashion_loaders") is fashion_loaders
