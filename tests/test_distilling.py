from __future__ import annotations

import copy
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tutelage import KD, FitNets, Paired, Stage, TaskLoss, Training, distill, evaluate, fake_quantize
from tutelage.run import Interrupted

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(48, 6, generator=GENERATOR)
Y = (X[:, :3].argmax(1) + (torch.rand(48, generator=GENERATOR) < 0.2)) % 3


class Counted(list):
    """Batches that count how often they are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def batches(start=0, end=48, size=8):
    return Counted((X[i : min(i + size, end)], Y[i : min(i + size, end)]) for i in range(start, end, size))


class Net(nn.Module):
    def __init__(self, width, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.early, self.late, self.head = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.late(self.early(x).relu()).relu())


def run(student=None, teacher="a teacher", train=None, validation=None, **options):
    if teacher == "a teacher":
        teacher = Net(9, seed=1)
    defaults = {"progress": False, "cpu": True}
    if not {"epochs", "steps", "training", "stages"} & options.keys():
        defaults["epochs"] = 3
    if "training" in options:
        defaults = {}
    return distill(student or Net(5), teacher, train or batches(), validation, **{**defaults, **options})


def same(a, b):
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def differ(a, b):
    return any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_equal_seeds_give_equal_weights_and_others_other_ones():
    data = torch.utils.data.TensorDataset(X, Y)

    def weights(seed):
        torch.manual_seed(seed + 40)  # what was drawn before does not matter
        loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
        return run(train=loader, seed=seed).student

    same(weights(1), weights(1))
    assert differ(weights(1), weights(2))


def test_the_student_learns_and_the_teacher_does_not():
    teacher = Net(9, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    student = Net(5)
    untrained = evaluate(student, batches(), teacher)
    result = run(student, teacher, validation=batches(), epochs=20, lr=0.1)
    assert result.student is student
    assert result.teacher is teacher
    same(teacher.state_dict(), before)
    assert result.metrics.teacher_kl < untrained.teacher_kl / 2
    assert result.metrics.agreement > untrained.agreement
    assert result.teacher_metrics == evaluate(teacher, batches())
    assert len(result.history) == 20


def test_losses_and_stages_exclude_each_other():
    with pytest.raises(ValueError, match="losses and stages: give one of them"):
        run(losses=[KD()], stages=[Stage([KD()], epochs=1)])
    with pytest.raises(ValueError, match=r"training and epochs, lr: give the settings in one place"):
        run(training=Training(epochs=1), epochs=2, lr=0.1)
    with pytest.raises(TypeError, match="no training setting is called 'epoch'; nearest: 'epochs'"):
        run(epoch=3)


def test_best_and_last_weights():
    """With a learning rate that is far too high at the end, the last weights are worse than the best."""

    def rising(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 30 else 300.0)

    result = run(validation=batches(), epochs=6, scheduler=rising, monitor="nll", clip=1.0)
    (made,) = result.runs
    nlls = [line.metrics["nll"] for line in made.history]
    assert made.best_epoch == nlls.index(min(nlls)) < 5
    same(result.student.state_dict(), made.best)
    assert result.metrics == evaluate(result.student, batches(), result.teacher)
    assert result.metrics.nll == pytest.approx(min(nlls))
    assert result.last_metrics.nll == pytest.approx(nlls[-1])
    result.student.load_state_dict(made.last)
    assert result.last_metrics == evaluate(result.student, batches(), result.teacher)


def test_without_validation_the_last_weights_stay():
    result = run()
    assert result.runs[0].best is None
    same(result.student.state_dict(), result.runs[0].last)
    assert result.metrics is result.last_metrics is result.teacher_metrics is None
    assert result.report().rows == []


@pytest.mark.parametrize("best_is_last", [True, False])
def test_the_test_data_are_only_looked_at_at_the_end(best_is_last):
    """For the student's last weights, the teacher, and the student's best weights if they are others; and, if there
    is a control, as often for that (it has no teacher of its own, but is compared with the student's)."""
    test, validation, train = batches(0, 16), batches(16, 32), batches(32, 48)
    passes = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            passes.append(test.passes)
            return super().step(closure)

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 4 or best_is_last else 200.0)

    result = run(
        train=train,
        validation=validation,
        test=test,
        optimizer=lambda p: Watched(p, lr=0.05),
        scheduler=scheduler,
        monitor="nll",
        clip=1.0,
    )
    (made,) = result.runs
    assert (made.best_epoch == 2) is best_is_last
    assert set(passes) == {0}
    assert test.passes == 1  # for the best weights, the last ones and the teacher together
    assert result.metrics == evaluate(result.student, test, result.teacher)
    assert result.metrics.samples == 16
    assert made.history[0].metrics["samples"] == 16


def test_the_control_is_the_same_student_without_a_teacher(tmp_path):
    student = Net(5)
    twin = copy.deepcopy(student)
    result = run(student, validation=batches(), control=True, out=tmp_path / "run", lr=0.1)
    alone = run(twin, None, validation=batches(), losses=[TaskLoss()], lr=0.1)
    same(result.control.student, alone.student)
    assert differ(result.control.student, result.student)
    assert result.control.teacher is None
    assert list(result.control.history[0]["losses"]) == ["loss", "TaskLoss"]
    assert result.control.metrics == evaluate(alone.student, batches(), result.teacher)
    assert (tmp_path / "run" / "control" / "student.safetensors").exists()


def test_what_is_written(tmp_path):
    result = run(validation=batches(), out=tmp_path / "run")
    fresh = Net(5, seed=7)
    fresh.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=True)
    same(fresh, result.student)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written == {
        "best": result.metrics.known(),
        "last": result.last_metrics.known(),
        "teacher": result.teacher_metrics.known(),
    }
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history == result.history
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (about["student"], about["teacher"], about["losses"]) == ("Net", "Net", ["TaskLoss", "KD"])


def test_a_finished_run_is_given_again_and_another_refused(tmp_path):
    first = run(validation=batches(), control=True, out=tmp_path / "run")
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(validation=batches(), out=tmp_path / "run")

    def never(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        optimizer.register_step_pre_hook(lambda *_: pytest.fail("it trains again"))
        return optimizer

    again = run(Net(5, 3), validation=batches(), control=True, out=tmp_path / "run", resume=True, optimizer=never)
    same(again.student, first.student)
    same(again.control.student, first.control.student)
    assert again.history == first.history
    assert again.metrics == first.metrics
    assert again.control.metrics == first.control.metrics
    run(validation=batches(), control=True, out=tmp_path / "run", overwrite=True)


# stages


def two():
    return [
        Stage([FitNets("early", weight=0.1)], epochs=2, lr=0.01, name="hint"),
        Stage([TaskLoss(), KD()], epochs=3),
    ]


def test_a_hint_stage_leaves_the_layers_after_the_hint(tmp_path):
    student = Net(5)
    start = copy.deepcopy(student)
    result = run(student, stages=two(), validation=batches(), out=tmp_path / "run", lr=0.1)
    assert [len(made.history) for made in result.runs] == [2, 3]
    assert [line["losses"].keys() - {"loss"} for line in result.history] == [{"FitNets"}] * 2 + [{"TaskLoss", "KD"}] * 3
    hinted = Net(5, seed=8)
    hinted.load_state_dict(result.runs[0].last, strict=True)
    assert differ(hinted.early, start.early)
    same(hinted.late, start.late)
    same(hinted.head, start.head)
    for name in ("early", "late", "head"):
        assert differ(getattr(student, name), getattr(hinted, name))
    assert [bool(line["metrics"]) for line in result.history] == [False, False, True, True, True]
    assert result.runs[0].history[0].lr < 0.01 < result.runs[1].history[0].lr < 0.1
    folders = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert folders == ["lock", "result.json", "run.json", "stage-1-hint", "stage-2", "student.safetensors"]
    fresh = Net(5, seed=9)
    fresh.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=True)
    same(fresh, student)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_resume_where_they_stopped(stage, tmp_path):
    cut = {"left": 8 if stage == 1 else 17}

    def sgd(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.05)

        def power(*_):
            cut["left"] -= 1
            if cut["left"] < 0:
                raise OSError("power cut")

        optimizer.register_step_pre_hook(power)
        return optimizer

    whole = run(stages=two(), validation=batches(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
    options = {"validation": batches(), "out": tmp_path / "run", "checkpoint_every": 1}
    with pytest.raises(OSError, match="power cut"):
        run(stages=two(), optimizer=sgd, **options)
    assert (tmp_path / "run" / "stage-2").exists() is (stage == 2)
    cut["left"] = 30 - (8 if stage == 1 else 17)  # not one step more than what was left
    resumed = run(Net(5, seed=4), stages=two(), optimizer=sgd, resume=True, **options)
    assert cut["left"] == 0
    same(resumed.student, whole.student)
    without = [[{k: v for k, v in line.items() if k != "seconds"} for line in r.history] for r in (resumed, whole)]
    assert without[0] == without[1]


def test_a_hint_goes_on_in_the_next_stage_also_after_a_resume(tmp_path):
    def stages():
        hint = {"weight": 0.1, "name": "hint"}
        return [
            Stage([FitNets("early", **hint)], epochs=2),
            Stage([TaskLoss(), FitNets("early", **hint)], epochs=2),
        ]

    options = {"validation": batches(), "out": tmp_path / "run", "checkpoint_every": 1}
    whole = run(stages=stages(), validation=batches())
    hints = [line.losses["hint"] for made in whole.runs for line in made.history]
    assert hints[2] < hints[0]  # not learned anew
    cut = {"left": 15}

    def stop(*_):
        cut["left"] -= 1
        if cut["left"] < 0:
            raise OSError("power cut")

    def adam(parameters):
        optimizer = torch.optim.AdamW(parameters)
        optimizer.register_step_pre_hook(stop)
        return optimizer

    plain = run(stages=stages(), validation=batches(), optimizer=torch.optim.AdamW)
    with pytest.raises(OSError, match="power cut"):
        run(stages=stages(), optimizer=adam, **options)
    cut["left"] = 100
    resumed = run(Net(5, seed=4), stages=stages(), optimizer=adam, resume=True, **options)
    same(resumed.student, plain.student)


def test_the_folder_of_stages_is_guarded_like_any_other(tmp_path):
    (tmp_path / "thesis").mkdir()
    precious = tmp_path / "thesis" / "student.safetensors"
    precious.write_text("years of work")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(FileExistsError, match="other files"):
            run(stages=two(), out=tmp_path / "thesis", **how)
    assert precious.read_text() == "years of work"
    first = run(stages=two(), out=tmp_path / "run")
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(stages=two(), out=tmp_path / "run")
    with pytest.raises(ValueError, match="has losses"):
        run(stages=two()[:1], out=tmp_path / "run", resume=True)
    same(run(stages=two(), out=tmp_path / "run", overwrite=True).student, first.student)


def test_a_stop_in_a_stage_ends_everything(tmp_path):
    class Validation:
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return iter(batches())

    with pytest.raises(Interrupted, match="step 6 of 18"):
        run(validation=Validation(), out=tmp_path / "run", control=True)
    assert not (tmp_path / "run" / "control").exists()
    assert not (tmp_path / "run" / "result.json").exists()


# the report


def test_the_report_has_teacher_student_and_control():
    result = run(validation=batches(), control=True)
    report = result.report("A title")
    assert [(row.name, row.kind) for row in report.rows] == [
        ("teacher", "teacher"),
        ("student", "student"),
        ("student without a teacher", "control"),
    ]
    found = {row.kind: row for row in report.rows}
    for kind, metrics in (
        ("teacher", result.teacher_metrics),
        ("student", result.metrics),
        ("control", result.control.metrics),
    ):
        assert found[kind].accuracy == [metrics.accuracy]
        assert found[kind].nll == [metrics.nll]
        assert found[kind].ece == [metrics.ece]
    assert found["student"].agreement == [result.metrics.agreement]
    assert found["control"].agreement == [result.control.metrics.agreement]
    assert found["teacher"].agreement == []
    parameters = sum(p.numel() for p in result.student.parameters())
    assert found["student"].measurement.parameters == parameters
    assert [curve.label for curve in report.curves] == ["student", "student without a teacher"]
    assert [x for x, _ in report.curves[0].points] == [1.0, 2.0, 3.0]
    assert "A title" in report.text()


def test_views_reach_training_judgement_and_the_example():
    pairs = [{"small": x[:, :2], "large": x, "label": y} for x, y in batches()]
    torch.manual_seed(0)
    student, teacher = nn.Linear(2, 3), Net(9, seed=1)
    views = Paired(student="small", teacher="large")
    result = run(student, teacher, pairs, pairs, views=views)
    assert result.example.args[0].shape == (1, 2)
    assert result.metrics == evaluate(student, pairs, teacher, views=views)
    assert result.teacher_metrics == evaluate(teacher, batches())
    assert result.teacher_example.args[0].shape == (1, 6)
    assert len(result.report().rows) == 2


@pytest.mark.parametrize("fields", [("image",), ("x", "path")])
def test_the_example_is_what_the_model_takes_of_a_batch_with_names(fields, tmp_path):
    """A single unknown name is given by position; of several, those that the model knows."""
    data = [{fields[0]: x, "label": y} | {f: torch.zeros(len(x)) for f in fields[1:]} for x, y in batches()]
    student = Net(5)
    result = run(student, train=data, validation=data)
    inputs = result.example.args or tuple(result.example.kwargs.values())
    assert [t.shape for t in inputs] == [(1, 6)]
    assert student.training
    assert not student._forward_pre_hooks
    assert len(result.report().rows) == 2
    pytest.importorskip("onnxruntime")
    assert result.export(tmp_path / "student.onnx").path.exists()


def test_the_control_is_trained_as_long_as_all_stages_together(tmp_path):
    data = [(torch.randn(16, 8), torch.arange(16) % 3) for _ in range(2)]
    stages = [Stage([KD()], epochs=1), Stage([TaskLoss()], epochs=2)]
    training = Training(epochs=10, progress=False)
    result = distill(nn.Linear(8, 3), nn.Linear(8, 3), data, data, stages=stages, control=True, training=training)
    assert len(result.history) == len(result.control.history) == 3


def test_the_final_weights_of_a_fake_quantised_student_load_into_the_plain_one(tmp_path):
    pytest.importorskip("torchao")
    data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    student = fake_quantize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), bits=3)
    distill(student, nn.Linear(8, 3), data, data, epochs=1, progress=False, out=tmp_path / "run")
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    plain.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"))
    student.eval()
    assert torch.equal(plain(data[0][0]), student(data[0][0]))
    assert all(len(row.unique()) <= 8 for row in plain[0].weight)


@pytest.mark.parametrize("named", [False, True])
def test_an_int8_file_is_calibrated_with_the_validation_data(named, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    x, y = torch.randn(32, 8), torch.arange(32) % 3
    data = [{"pixels": x, "label": y}] if named else [(x, y)]
    student = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    result = distill(student, nn.Linear(8, 3), data, data, epochs=1, progress=False)
    written = result.export(tmp_path / "student.onnx", quantize="int8")
    assert written.quantized
    assert written.agreement > 0.8
    report = result.report()
    assert str(report).startswith(report.headline())


def test_fsdp_is_refused_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"under FSDP .*tutelage\.engine\.fit"):
        distill(nn.Linear(8, 3), nn.Linear(8, 3), [], epochs=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
