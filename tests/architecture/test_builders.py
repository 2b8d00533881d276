"""What all builders of students have in common: the teacher stays, the student learns, is exported and comes back."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tutelage import (
    KD,
    RKD,
    AttentionTransfer,
    Distillation,
    FewerLayers,
    LowRank,
    Prune,
    Quantized,
    Separable,
    StudentBuilder,
    TaskLoss,
    distill,
    freeze_quantized,
    load_built,
    methods,
    save_structure,
)
from tutelage.comparison import read_comparison, timing
from tutelage.comparison.pages import measure_networks
from tutelage.data import fashion_loaders
from tutelage.deploy import export
from tutelage.deploy.compress import Limits, compress
from tutelage.deploy.steps import network_key
from tutelage.models import SmallCNN, resnet14, resnet20, save_weights
from tutelage.recipe import RecipeError, load, student_network
from tutelage.training import Training

GREY, COLOUR = torch.randn(3, 1, 28, 28), torch.randn(3, 3, 16, 16)
BUILDERS = [
    pytest.param(FewerLayers(), id="fewer layers"),
    pytest.param(Separable(), id="separable"),
    pytest.param(Separable("fresh"), id="fresh separable"),
    pytest.param(LowRank(0.25), id="low rank"),
    pytest.param(LowRank(energy=0.5), id="energy"),
    pytest.param(Prune(0.5), id="prune"),
    pytest.param(Quantized(4), id="quantized"),
]


@pytest.fixture(autouse=True)
def packages(request):
    builder = getattr(request.node, "callspec", None) and request.node.callspec.params.get("builder")
    for kind, package in ((Prune, "torch_pruning"), (Quantized, "torchao")):
        if isinstance(builder, kind):
            pytest.importorskip(package)


def teacher() -> nn.Module:
    """With batch norms that are not the identity, and partly frozen, in eval mode."""
    torch.manual_seed(0)
    network = resnet14(10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    network.layer1.requires_grad_(False)
    return network.eval()


def outputs(model: nn.Module, x: torch.Tensor = COLOUR) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def state(model: nn.Module) -> tuple:
    flags = [p.requires_grad for p in model.parameters()]
    return network_key(model), flags, [m.training for m in model.modules()], [id(m) for m in model.modules()]


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_teacher_stays_and_the_student_is_new_and_learns(builder):
    network = teacher()
    before, numbers = state(network), torch.random.get_rng_state()
    student = builder(network, COLOUR)
    assert state(network) == before
    if builder != Separable("fresh"):
        assert torch.equal(torch.random.get_rng_state(), numbers)
    assert all(module.training for module in student.modules())
    assert all(p.requires_grad for p in student.parameters())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in network.parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    student(COLOUR).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("builder", BUILDERS)
def test_it_is_smaller_or_coarser(builder):
    network = teacher()
    student = builder(network, COLOUR)
    mine, theirs = (sum(p.numel() for p in m.parameters()) for m in (student, network))
    if isinstance(builder, Quantized):
        assert mine == theirs
        assert all(len(row.unique()) <= 16 for row in student.layer3[0].conv1.weight)
    else:
        assert mine < 0.75 * theirs


@pytest.mark.parametrize("builder", BUILDERS)
def test_it_comes_back_from_its_files(builder, tmp_path):
    student, structure = builder.derive(teacher(), COLOUR)
    assert structure == json.loads(json.dumps(structure))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    expected = outputs(student)
    plain = freeze_quantized(student) if isinstance(builder, Quantized) else student
    save_structure(tmp_path / "structure.json", builder, structure)
    save_weights(plain, tmp_path / "student.safetensors")
    again = load_built(lambda: resnet14(10), tmp_path / "structure.json", tmp_path / "student.safetensors")
    assert torch.equal(outputs(again), expected)
    assert all(p.requires_grad for p in again.parameters())
    # the structure is of this architecture, and says so of another
    with pytest.raises(ValueError, match=r"has no|is not a checkpoint|fit this network|has \d+"):
        load_built(SmallCNN, tmp_path / "structure.json", tmp_path / "student.safetensors")


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize("builder", BUILDERS)
def test_its_file_says_the_same(builder, ending, tmp_path):
    if ending == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    torch.manual_seed(1)
    network = SmallCNN(width=8) if not isinstance(builder, FewerLayers) else resnet20(10, in_channels=1)
    student = builder(network, GREY)
    if isinstance(builder, Quantized):
        freeze_quantized(student)
    written = export(student, GREY, tmp_path / f"student.{ending}")
    assert written.max_abs_error < 1e-4
    assert written.agreement == 1.0


@pytest.mark.parametrize("builder", BUILDERS)
def test_any_losses_teach_it(builder):
    network, batch = teacher(), (COLOUR, torch.tensor([0, 1, 2]))
    student = builder(network, COLOUR)
    losses = [TaskLoss(), KD(), AttentionTransfer("layer2", "layer3"), RKD("avgpool")]
    d = Distillation(student, network, losses=losses).bind(batch)
    found = d(batch)
    found.total.backward()
    assert sorted(found.values) == ["AttentionTransfer", "KD", "RKD", "TaskLoss"]
    assert all(value.isfinite() for value in found.values.values())


def test_names():
    assert [b.values[0].label for b in BUILDERS] == [
        *("fewer-layers", "separable", "separable-fresh", "low-rank-0.25", "low-rank-energy=0.5"),
        *("prune-0.5", "quantized-4"),
    ]
    assert FewerLayers({"layer1": [0, 2]}).label == "fewer-layers-layer1-0-2"
    assert LowRank(4, name="thin").label == "thin"
    assert dataclasses.asdict(Prune(0.5, name="half"))["name"] == "half"


def test_each_is_in_the_catalogue():
    found = {m.name for m in methods() if m.section == "4" and m.role == "student"}
    assert {"FewerLayers", "LowRank", "Prune", "Quantized", "Separable"} <= found


# Mistakes


@pytest.mark.parametrize("builder", [Separable(), LowRank(0.5)])
def test_parametrised_layers_are_named(builder):
    network = SmallCNN(width=8)
    weight_norm(network.stage2[0])
    with pytest.raises(ValueError, match=r"stage2.0 is parametrised"):
        builder(network, GREY)


@pytest.mark.parametrize("builder", [Separable(keep=("stag2",)), LowRank(0.5, keep=("stag2",))])
def test_what_keep_does_not_find_is_named(builder):
    with pytest.raises(ValueError, match=r"keep: no module 'stag2' in this SmallCNN; nearest: 'stage2'"):
        builder(SmallCNN(width=8), GREY)


def test_a_layer_that_others_read_themselves_is_refused_and_can_be_kept():
    """A transformer layer of torch reads its linear layers' weights on its fast path."""
    network = nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), nn.Flatten()
    )
    network.append(nn.Linear(80, 40)).append(nn.Linear(40, 3))
    x = torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match=r"cannot be called: .*'weight'; .*'0.layers.0.linear1'.* in keep"):
        LowRank(0.25)(network, x)
    assert list(LowRank(0.25, keep=("0",)).derive(network, x)[1]["layers"]) == ["2"]


def test_shared_layers_are_replaced_together_and_shared_weights_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.again = nn.Linear(32, 32)
            self.tied, self.head = nn.Linear(32, 32), nn.Linear(32, 32)
            self.tied.weight = self.head.weight
            self.last = nn.Linear(32, 3)

        def forward(self, x):
            return self.last(self.head(self.tied(self.again(self.first(x)))))

    student, structure = LowRank(4).derive(Twice(), torch.randn(2, 32))
    assert list(structure["layers"]) == ["first"]
    assert student.first is student.again
    assert student.tied.weight is student.head.weight


def test_files_that_are_none_are_refused(tmp_path):
    file = tmp_path / "structure.json"
    for text, said in [
        ("{", "is no file of a student's structure"),
        ('{"format": 9, "builder": "LowRank"}', "format 9, expected 1"),
        ('{"format": 1, "builder": "LowRenk", "layers": {}}', "'LowRenk' is not imported; nearest: 'LowRank'"),
        ('{"format": 1, "builder": "LowRank"}', "does not fit this network"),
        ('{"format": 1, "builder": "LowRank", "layers": {"linear": {"rank": 99}}}', "'linear' is Linear.*no rank 99"),
        ('{"format": 1, "builder": "Separable", "init": "svd", "layers": {"pool": 0}}', "'pool' is a MaxPool2d"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_built(SmallCNN, file, tmp_path / "none.safetensors")


# In recipes and compressions

RECIPE = {
    "student": {"class_path": "LowRank", "init_args": {"rank": 0.25}},
    "teacher": {"class_path": "SmallCNN", "init_args": {"width": 8}},
    "data": {"class_path": "fashion_loaders", "init_args": {"limit": 200, "validation": 60, "batch_size": 50}},
    "losses": [{"class_path": "TaskLoss"}, {"class_path": "KD"}],
    "teacher_training": {"epochs": 1, "lr": 0.01, "progress": False},
    "training": {"epochs": 1, "lr": 1e-9, "progress": False},
}


def test_a_recipes_student_is_made_of_its_trained_teacher():
    run = load(RECIPE)
    untrained = copy.deepcopy(run.keywords["teacher"])
    assert run.keywords["student"] == LowRank(0.25)
    result = run()  # with hardly a learning rate: only batch norms follow the data
    first = result.student.stage2[0].first.weight
    torch.testing.assert_close(first, LowRank(0.25)(result.teacher, GREY).stage2[0].first.weight)
    assert not torch.allclose(first, LowRank(0.25)(untrained, GREY).stage2[0].first.weight)


def test_a_recipe_takes_the_weights_of_files_and_resumes(tmp_path):
    torch.manual_seed(5)
    trained = SmallCNN(width=8)
    save_weights(trained, tmp_path / "teacher.safetensors")
    fields = {k: v for k, v in RECIPE.items() if k != "teacher_training"}
    fields |= {"teacher_weights": str(tmp_path / "teacher.safetensors"), "out": str(tmp_path / "run")}
    expected = LowRank(0.25)(trained, GREY).stage2[0].first.weight
    torch.testing.assert_close(student_network(load(fields).keywords).stage2[0].first.weight, expected)
    result = load(fields)()
    torch.testing.assert_close(result.student.stage2[0].first.weight, expected)
    again = load({**fields, "resume": True})()
    assert network_key(again.student) == network_key(result.student)
    assert result.report().rows[1].measurement.parameters == sum(p.numel() for p in result.student.parameters())


def test_mistakes_of_a_recipe_are_named_before_the_teacher_is_trained(monkeypatch):
    monkeypatch.setattr("tutelage.recipe.distill", lambda *_, **__: pytest.fail("trained"))
    for change, said in [
        ({"teacher": None, "teacher_training": None}, "student: the recipe has no teacher network for it"),
        ({"student": {"class_path": "LowRank"}}, "rank=None, energy=None: expected one of them"),
        ({"student": {"class_path": "Prune", "init_args": {"ratio": 2.0}}}, "ratio=2.0: expected a share"),
    ]:
        fields = {k: v for k, v in {**RECIPE, **change}.items() if v is not None}
        with pytest.raises(ValueError, match=said):
            load(fields)()
    with pytest.raises(RecipeError, match=r"student.init_args.rnk: no such field of LowRank; nearest: 'rank'"):
        load({**RECIPE, "student": {"class_path": "LowRank", "init_args": {"rnk": 1}}})
    with pytest.raises(RecipeError, match=r"student='TaskLoss2'|no 'TaskLoss2'"):
        load({**RECIPE, "student": "TaskLoss2"})


def test_a_comparison_takes_a_builder_as_a_student_of_one_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "STEPS", 1)
    shared = {k: v for k, v in RECIPE.items() if k != "teacher_training"}
    comparison = read_comparison({"recipe": shared, "methods": ["KD"], "seeds": 1})
    cells, skipped = comparison.plan()
    assert not skipped
    costs = measure_networks(comparison, tmp_path)
    assert costs["LowRank(rank=0.25)"].parameters < costs["SmallCNN(width=8)"].parameters
    assert len(dict(timing.time_steps(cells, tmp_path))) == 2
    teachers = {str(n): {"class_path": "SmallCNN", "init_args": {"width": n}} for n in (4, 8)}
    with pytest.raises(RecipeError, match=r"students.LowRank\(rank=0.25\): it is derived from the teacher, so of 2"):
        read_comparison({"recipe": shared, "teachers": teachers})
    (refused,) = read_comparison("kd", methods=["LowRank"], seeds=1).plan()[1]
    assert "LowRank: it changes the student" in refused.reason


def test_a_builder_is_a_candidate(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    data = fashion_loaders(limit=200, validation=100, batch_size=50)
    torch.manual_seed(0)
    network = SmallCNN(width=8)
    candidates = [Separable("fresh")]
    one = Training(epochs=1, lr=0.01, progress=False)

    def run(**changes):
        return compress(
            network,
            data.train,
            data.validation,
            **{"candidates": candidates, "limits": Limits(min_accuracy=0.01), "out": tmp_path / "out", **changes},
            precisions=["float32"],
            training=one,
            runs=2,
        )

    found = run()
    assert [p.name for p in found.points] == ["separable-fresh float32"]
    for point, builder in zip(found.points, candidates, strict=True):
        folder = found.out / builder.label
        weights = next(folder.glob("run-*/student.safetensors"))
        student = load_built(lambda: SmallCNN(width=8), folder / "structure.json", weights)
        assert point.measurement.parameters == sum(p.numel() for p in student.parameters())
    trained = {f: f.stat().st_mtime_ns for f in found.out.rglob("student.safetensors")}
    run(resume=True)
    assert {f: f.stat().st_mtime_ns for f in found.out.rglob("student.safetensors")} == trained
    with pytest.raises(ValueError, match=r"low-rank: rank=None, energy=None"):
        run(candidates=[LowRank()], out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_builder_of_ones_own(tmp_path):
    """Three functions make one, and files bring its students back."""

    @dataclasses.dataclass(frozen=True)
    class WithoutBias(StudentBuilder):
        def choose(self, teacher, example):
            return {"layers": [n for n, m in teacher.named_modules() if isinstance(m, nn.Linear)]}

        @staticmethod
        def build(network, structure):
            student = copy.deepcopy(network)
            for name in structure["layers"]:
                student.get_submodule(name).bias = None
            return student

    student, structure = WithoutBias().derive(SmallCNN(width=2), GREY)
    assert student.linear.bias is None
    save_structure(tmp_path / "structure.json", WithoutBias(), structure)
    save_weights(student, tmp_path / "student.safetensors")
    again = load_built(lambda: SmallCNN(width=2), tmp_path / "structure.json", tmp_path / "student.safetensors")
    assert torch.equal(again.linear.weight, student.linear.weight)
    distill(again, SmallCNN(width=2), [(GREY, torch.tensor([0, 1, 2]))], epochs=1, progress=False)
