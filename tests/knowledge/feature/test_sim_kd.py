from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import AttentionTransfer, Distillation, FitNets, ReusedClassifier, SimKD, TaskLoss, distill, evaluate
from tutelage.checkpoint import plain_state
from tutelage.comparison import read_comparison
from tutelage.deploy.export import export
from tutelage.deploy.measure import measure
from tutelage.engine import fit
from tutelage.knowledge.classifiers import classifier_of, last_features
from tutelage.knowledge.feature.sim_kd import feature_alignment, reuse_classifier
from tutelage.models import MLP, SmallCNN, resnet8
from tutelage.recipe import load
from tutelage.run import Interrupted
from tutelage.training import Training
from tutelage.views import Inputs


def images(count=6, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def student_of(teacher_width=8, **options):
    torch.manual_seed(0)
    return ReusedClassifier(SmallCNN(4), 4 * teacher_width, 10, at="stage3", **options)


def test_is_the_mean_squared_difference_and_normalises_nothing():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, 2, dtype=torch.float64)
    terms = [(a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert feature_alignment(student, teacher).item() == pytest.approx(sum(terms) / len(terms))
    torch.testing.assert_close(feature_alignment(3 * student, 3 * teacher), 9 * feature_alignment(student, teacher))


def test_a_larger_map_of_the_teacher_is_pooled_and_a_larger_one_of_the_student_is_refused():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 4, 4)
    blocks = teacher.reshape(2, 3, 2, 2, 4).mean(3)
    torch.testing.assert_close(feature_alignment(student, teacher), (student - blocks).square().mean())
    with pytest.raises(ValueError, match=r"larger than the teacher's \(2, 4\): pool it before .* pool=2"):
        feature_alignment(teacher, student)
    with pytest.raises(ValueError, match="expected the same channels"):
        feature_alignment(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="two maps or two vectors"):
        feature_alignment(torch.ones(2, 3), torch.ones(2, 3, 1, 1))


def test_the_student_says_what_the_teachers_classifier_says_of_its_projected_features():
    teacher, student = SmallCNN(8).eval(), student_of()
    Distillation(student, teacher, losses=[SimKD()]).bind(images())
    student.eval()
    with torch.no_grad():
        encoder = student.model
        features = encoder.stage3(encoder.pool(encoder.stage2(encoder.pool(encoder.stage1(images())))))
        expected = teacher.linear(student.projector(features).mean((2, 3)))
        torch.testing.assert_close(student(images()), expected)


def test_aligned_features_give_exactly_the_teachers_logits():
    teacher = SmallCNN(8).eval()
    student = ReusedClassifier(copy.deepcopy(teacher), 32, 10, at="stage3").eval()
    student.reuse(teacher.linear)
    student.projector = nn.Identity()
    torch.testing.assert_close(student(images()), teacher(images()))


def test_the_value_is_that_of_the_projected_map_and_the_gradient_stops_before_the_classifier_and_the_teacher():
    teacher, student = SmallCNN(8), student_of()
    d = Distillation(student, teacher, losses=[SimKD(weight=2.0)]).bind(images())
    losses = d(images())
    losses.total.backward()
    caught = []
    handle = student.projector.register_forward_hook(lambda *given: caught.append(given[-1]))
    with torch.no_grad():
        student(images())
        target = teacher.stage3(teacher.pool(teacher.stage2(teacher.pool(teacher.stage1(images())))))
    handle.remove()
    torch.testing.assert_close(losses["SimKD"], (caught[0] - target).square().mean(), rtol=1e-4, atol=1e-5)
    assert student.model.stage1[0].weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in student.projector.parameters())
    assert student.classifier.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())


def test_alone_it_runs_neither_classifier():
    teacher, student = SmallCNN(8), student_of()
    d = Distillation(student, teacher, losses=[SimKD()]).bind(images())
    for layer in (teacher.linear, student.classifier):
        layer.register_forward_hook(lambda *_: pytest.fail("a classifier ran"))
    d(images()).total.backward()


def test_the_classifier_is_copied_and_stays_while_everything_else_learns():
    teacher, student = SmallCNN(8), student_of()
    labels = torch.arange(6) % 10
    d = Distillation(student, teacher, losses=[TaskLoss(), SimKD()]).bind((images(), labels))
    torch.testing.assert_close(student.classifier.state_dict(), teacher.linear.state_dict(), rtol=0, atol=0)
    assert student.classifier.weight.data_ptr() != teacher.linear.weight.data_ptr()
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.AdamW(d.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        d((images(), labels)).total.backward()
        optimizer.step()
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in student.named_parameters() if not name.startswith("classifier")}


def test_what_stands_behind_the_tap_is_dropped_and_what_is_only_read_is_kept():
    class Odd(nn.Module):
        """A layer that is never called but read, and a head of two layers."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
            self.read = nn.Linear(6, 5)
            self.head = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
            self.last = nn.ReLU()

        def forward(self, x):
            return self.head(self.last(F.linear(self.stem(x), self.read.weight)))

    student = ReusedClassifier(Odd(), 7, 3, at="last")
    assert isinstance(student.model.head, nn.Identity)
    assert isinstance(student.model.read, nn.Linear)
    assert student(torch.randn(4, 4)).shape == (4, 3)
    by_input = ReusedClassifier(MLP(4, (6,), 3), 7, 3, at="linear:input")
    assert isinstance(by_input.model.linear, nn.Identity)
    assert by_input(torch.randn(4, 4)).shape == (4, 3)


def test_looking_at_the_student_leaves_its_modes_and_buffers_and_no_hooks():
    model = SmallCNN(4)
    model.stage1.eval()
    before = copy.deepcopy(model.state_dict())
    student = reuse_classifier(model, SmallCNN(8), at="stage3")
    assert student.model is model
    assert not model.stage1[1].training
    assert model.stage2[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("width", [4, 8])
def test_a_projector_has_the_published_layers(width):
    student = student_of(factor=width)
    convolutions = [m for m in student.projector if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions] == [
        (16, 32 // width, (1, 1)),
        (32 // width, 32 // width, (3, 3)),
        (32 // width, 32, (1, 1)),
    ]
    assert isinstance(student.projector[-1], nn.ReLU)
    grouped = student_of(factor=width, depthwise=True).projector[3]
    assert grouped.groups == 32 // width


def test_vectors_have_a_projector_without_neighbours():
    teacher = MLP(8, (12,), 3)
    student = ReusedClassifier(MLP(8, (5,), 3), 12, 3)
    assert student.at == "linear:input"
    d = Distillation(student, teacher, losses=[SimKD()])
    inputs = torch.randn(6, 8)
    d(inputs).total.backward()
    assert d.losses["SimKD"].pairs == [("projector", "linear:input")]
    assert all(m.kernel_size == (1, 1) for m in student.projector if isinstance(m, nn.Conv2d))
    torch.testing.assert_close(student.classifier.weight, teacher.linear.weight)


def test_a_student_with_larger_maps_pools_them_when_it_is_used_as_when_it_learns():
    class Coarse(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 32, 3, 8, 1), nn.ReLU())
            self.linear = nn.Linear(32, 10)

        def forward(self, x):
            return self.linear(self.net(x).mean((2, 3)))

    teacher = Coarse()
    with pytest.raises(ValueError, match="pool=2 of ReusedClassifier"):
        Distillation(student_of(), teacher, losses=[SimKD()]).bind(images())
    student = reuse_classifier(SmallCNN(4), teacher, at="stage3")
    assert student.pool == 2
    Distillation(student, teacher, losses=[SimKD()]).bind(images()).eval()
    seen = []
    student.projector.register_forward_hook(lambda *given: seen.append(given[1][0]))
    student.eval()(images())
    assert seen[0].shape == (6, 16, 2, 2)


def test_what_does_not_fit_the_teacher_is_refused_by_name():
    with pytest.raises(TypeError, match=r"must be a ReusedClassifier.*got SmallCNN"):
        Distillation(SmallCNN(4), SmallCNN(8), losses=[SimKD()]).bind(images())
    with pytest.raises(ValueError, match="features=64, and the teacher's classifier has 32"):
        Distillation(student_of(16), SmallCNN(8), losses=[SimKD()]).bind(images())
    with pytest.raises(ValueError, match="classes=10, and the teacher's classifier has 5"):
        Distillation(student_of(), SmallCNN(8, num_classes=5), losses=[SimKD()]).bind(images())
    with pytest.raises(ValueError, match=r"'stage2' has 16 .* name the map or vector that it reads"):
        Distillation(student_of(), SmallCNN(8), losses=[SimKD("stage2")]).bind(images())
    scaled = nn.Sequential(SmallCNN(8), nn.Hardtanh(-0.01, 0.01))
    with pytest.raises(ValueError, match=r"SimKD: the logits are not what the last linear layer '0\.linear' says"):
        Distillation(student_of(), scaled, losses=[SimKD("0.stage3")]).bind(images())
    with pytest.raises(ValueError, match=r"no module 'stge3'.*nearest: 'stage3'"):
        Distillation(student_of(), SmallCNN(8), losses=[SimKD("stge3")]).bind(images())
    with pytest.raises(ValueError, match="expected one, the teacher's last map"):
        SimKD("stage2", "stage3")
    with pytest.raises(ValueError, match="factor=0"):
        student_of(factor=0)
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4\)|cannot be run on inputs of shape"):
        ReusedClassifier(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 3)), 8, 3)


def test_negative_features_want_a_projector_without_its_last_relu():
    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 6, 3, 2, 1)
            self.linear = nn.Linear(6, 10)

        def forward(self, x):
            return self.linear(self.net(x).mean((2, 3)))

    teacher = Signed()
    inner = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU())
    student = ReusedClassifier(copy.deepcopy(inner), 6, 10, at="1")
    with pytest.raises(ValueError, match=r"negative in places.*rectified=False"):
        Distillation(student, teacher, losses=[SimKD("net")]).bind(images())
    student = reuse_classifier(inner, teacher)
    assert not student.rectified
    assert Distillation(student, teacher, losses=[SimKD()])(images()).total > 0


def test_a_taught_network_cannot_be_its_own_teacher():
    student = student_of()
    with pytest.raises(ValueError, match="needs a finished teacher"):
        SimKD().resolve(student, student, None)


def test_the_classifier_is_found_behind_maps_and_vectors():
    inputs = Inputs((torch.randn(2, 3, 32, 32),))
    network = resnet8(num_classes=7).eval()
    address = last_features(network, inputs)
    assert address == "layer3"
    assert classifier_of(network, inputs, address).out_features == 7
    flattened = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3)).eval()
    assert last_features(flattened, Inputs((images(),))) == "3:input"
    biasless = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).eval()
    student = ReusedClassifier(MLP(4, (6,), 3), 5, 3)
    student.reuse(classifier_of(biasless, Inputs((torch.randn(2, 4),)), "2:input"))
    assert student.classifier.bias.abs().sum() == 0


def test_other_losses_read_inside_the_encoder_and_may_stop_there():
    teacher, student = SmallCNN(8), student_of()
    both = Distillation(student, teacher, losses=[SimKD(), AttentionTransfer(("model.stage2", "stage2"))])
    assert both(images()).total > 0
    hint = Distillation(student, teacher, losses=[FitNets(("model.stage2", "stage2"))]).bind(images())
    student.model.stage3.register_forward_hook(lambda *_: pytest.fail("it ran on behind the hint"))
    hint(images()).total.backward()


def test_float64_stays_float64_and_half_precision_students_run():
    teacher, student = SmallCNN(8).double(), student_of().double()
    d = Distillation(student, teacher, losses=[SimKD()])
    assert d(images().double()).total.dtype == torch.float64
    assert student.bfloat16()(images().bfloat16()).dtype == torch.bfloat16


def test_a_run_is_saved_loaded_into_a_new_student_and_evaluated(tmp_path):
    teacher = SmallCNN(8)
    data = [(images(16, seed), torch.arange(16) % 10) for seed in range(3)]
    student = student_of()
    result = distill(student, teacher, data, data, losses=[SimKD()], epochs=2, progress=False, out=tmp_path / "run")
    from safetensors.torch import load_file

    fresh = student_of()
    fresh.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=True)
    torch.testing.assert_close(fresh.classifier.weight, teacher.linear.weight)
    torch.testing.assert_close(fresh.eval()(images()), student.eval()(images()))
    assert evaluate(fresh, data).accuracy == evaluate(student, data).accuracy == result.metrics.accuracy
    assert plain_state(student).keys() == fresh.state_dict().keys()


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    data = [(images(8, seed), torch.arange(8) % 10) for seed in range(4)]

    def run(out, **more):
        torch.manual_seed(5)
        d = Distillation(student_of(), SmallCNN(8), losses=[SimKD(), TaskLoss(weight=0.1)])
        fit(d, data, training=Training(epochs=2, lr=0.05, progress=False), out=out, **more)
        return d.student.state_dict()

    whole = run(tmp_path / "whole")

    def stop(epoch):
        raise Interrupted("here")

    with pytest.raises(Interrupted):
        run(tmp_path / "parts", after_epoch=stop)
    resumed = run(tmp_path / "parts", resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_the_student_is_exported_with_the_classifier_and_measured(tmp_path, ending):
    if ending == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    student = student_of()
    student.reuse(SmallCNN(8).linear)
    exported = export(student, images(), tmp_path / f"student.{ending}")
    assert exported.agreement == 1
    assert exported.max_abs_error < 1e-4
    assert measure(student, images(1)).parameters == sum(p.numel() for p in student.parameters())


def test_a_compiled_student_says_the_same():
    student = student_of().eval()
    compiled = torch.compile(student, backend="eager")
    torch.testing.assert_close(compiled(images()), student(images()))


def test_compared_with_other_methods_its_student_fits_any_pair():
    students = {"small": {"student": {"class_path": "SmallCNN", "init_args": {"width": 6}}}}
    comparison = read_comparison("kd", methods=["SimKD"], seeds=1)
    comparison.students = students
    cells, skipped = comparison.plan()
    assert not skipped
    (cell,) = [c for c in cells if c.method == "SimKD"]
    built = load({k: v for k, v in cell.fields.items() if k != "teacher_weights"}, ["data.init_args.limit=100"])
    student, teacher = built.keywords["student"], built.keywords["teacher"]
    assert (student.at, student.classifier.in_features) == ("stage3", teacher.linear.in_features)
    Distillation(student, teacher, losses=built.keywords["losses"]).bind(next(iter(built.keywords["data"].train)))
    torch.testing.assert_close(student.classifier.weight, teacher.linear.weight)


def test_unseen_images_get_the_teachers_features_and_its_answers(lessons):
    def taught(loss):
        torch.manual_seed(0)
        student = reuse_classifier(copy.deepcopy(lessons.beginner), lessons.teacher, example=lessons.images[:8])
        student.reuse(lessons.teacher.linear)
        d = Distillation(student, lessons.teacher, losses=[loss]).bind((lessons.images, lessons.labels))
        optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            d((lessons.images, lessons.labels)).total.backward()
            optimizer.step()
        return student.eval()

    def away(student):
        """How far the features are from the teacher's, and how often the answers are the same."""
        with torch.no_grad():
            d = Distillation(student, lessons.teacher, losses=[SimKD()]).bind(lessons.unseen)
            same = student(lessons.unseen).argmax(1) == lessons.teacher(lessons.unseen).argmax(1)
            return d.eval()(lessons.unseen)["SimKD"].item(), same.float().mean().item()

    alone, aligned = away(taught(TaskLoss())), away(taught(SimKD()))
    assert aligned[0] < 0.75 * alone[0]
    assert aligned[1] > 0.6  # of five classes, without a single label
