"""Residual students: what they learn, who stays as it is, and that the sum is what is used."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, RKD, Distillation, FitNets, Frozen, NoTeacher, Stage, TaskLoss, distill, energy_left
from tutelage.architecture.res_kd import ResidualStudents, res_kd, residual_energy
from tutelage.data import fashion_loaders
from tutelage.deploy import export
from tutelage.models import SmallCNN

QUICK = {"cpu": True, "progress": False, "gradient_shares": False}


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3)
    )


def batches(count: int = 96):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(5))
    return [(a, b) for a, b in zip(x.split(32), x[:, :3].argmax(1).split(32), strict=True)]


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_squared_differences_of_the_sum_are_those_of_the_residual():
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 4), torch.randn(5, 4)
    residual = torch.randn(5, 4, requires_grad=True)
    of_sum, of_residual = F.mse_loss(student + residual, teacher), F.mse_loss(residual, teacher - student)
    torch.testing.assert_close(of_sum, of_residual)
    torch.testing.assert_close(*(torch.autograd.grad(value, residual)[0] for value in (of_sum, of_residual)))


def test_the_energy_equals_a_naive_loop_and_does_not_see_what_no_softmax_sees():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    left = whole = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        s, t = ([x - sum(row) / 4 for x in row] for row in (s, t))
        left += sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        whole += sum(b * b for b in t)
    value = residual_energy(student, teacher)
    assert value.item() == pytest.approx(left / whole, rel=1e-5)
    value.backward()
    assert teacher.grad is None
    shifts = torch.randn(5, 1)
    torch.testing.assert_close(residual_energy(student + shifts, teacher - 3 * shifts), value)
    assert residual_energy(teacher + 2, teacher) < 1e-10
    with pytest.raises(ValueError, match=r"student \(5, 4\), teacher \(5, 3\)"):
        residual_energy(student, teacher[:, :3])


def test_the_energy_of_a_loader_is_that_of_all_samples_at_once():
    torch.manual_seed(0)
    data, (student, teacher) = batches(80), (network(4), network(8))
    student.train()
    found = energy_left(student, teacher, data)
    x = torch.cat([x for x, _ in data])
    assert student.training
    assert found == pytest.approx(float(residual_energy(student.eval()(x), teacher.eval()(x))), rel=1e-5)
    with pytest.raises(ValueError, match="empty"):
        energy_left(student, teacher, [])


def test_adaptive_inference_asks_the_others_only_about_unsure_samples():
    torch.manual_seed(0)
    members = [network(4), network(3), network(2)]
    students = ResidualStudents(members).eval()
    x = 3 * torch.randn(40, 6)
    asked = [0, 0, 0]
    for i, member in enumerate(members):
        member.register_forward_hook(lambda _, args, __, i=i: asked.__setitem__(i, asked[i] + len(args[0])))
    logits, used = students.adaptive(x, confidence=0.5)
    assert asked == [40, int((used > 1).sum()), int((used > 2).sum())]
    assert 0 < asked[2] < asked[1] < 40
    for row, count, said in zip(x, used, logits, strict=True):  # a naive loop over samples
        total = torch.zeros(3)
        asked_now = 0
        for member in members:
            total, asked_now = total + member(row[None])[0], asked_now + 1
            if total.softmax(0).max() >= 0.5:
                break
        assert asked_now == count
        torch.testing.assert_close(said, total)
    torch.testing.assert_close(students.adaptive(x, confidence=1.1)[0], students(x))
    torch.testing.assert_close(students.adaptive(x, confidence=0.0)[0], members[0](x))
    with pytest.raises(ValueError, match="eval"):
        students.train().adaptive(x)


def test_each_leg_changes_its_own_member_alone(tmp_path):
    torch.manual_seed(0)
    student, residuals, teacher, data = network(4), [network(3), network(2)], network(16), batches()
    fresh, given = [state(r) for r in residuals], state(teacher)
    losses = [TaskLoss(weight=0.1), KD(), FitNets(("0", "0"), weight=1.0), RKD()]
    later = [TaskLoss(weight=0.1), KD(), FitNets(weight=1.0).at(("students.0.0", "0")), RKD()]

    def run(**more):
        arguments = {"losses": copy.deepcopy(losses), "residual_losses": copy.deepcopy(later), **QUICK, **more}
        return res_kd(student, teacher, data, data, residuals=residuals, epochs=2, out=tmp_path / "run", **arguments)

    first = run()
    after = state(student)
    assert [type(r.student) for r in first] == [nn.Sequential, ResidualStudents, ResidualStudents]
    assert list(first[-1].student.students) == [student, *residuals]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"student", "residual-1", "residual-2"}
    assert equal(given, state(teacher))
    assert not any(equal(before, state(r)) for before, r in zip(fresh, residuals, strict=True))
    assert all(p.requires_grad for r in (student, *residuals) for p in r.parameters())
    # the student is what its own leg left: weights, and the statistics of its norms too
    from safetensors.torch import load_file

    assert equal(load_file(tmp_path / "run" / "student" / "student.safetensors"), after)

    torch.manual_seed(0)
    for module in (student, *residuals):
        module.load_state_dict(network(module[0].out_features).state_dict())
    again = run(resume=True)
    assert equal(state(first[-1].student), state(again[-1].student))
    assert equal(after, state(student))


def test_the_others_stay_in_eval_mode_while_the_newest_trains():
    students = ResidualStudents([network(4).requires_grad_(False), network(3)]).train()
    assert [m.training for m in students.students] == [False, True]
    d = Distillation(students, network(8), losses=[KD()]).bind(batches()[0])
    d.train()
    d(batches()[0]).total.backward()
    assert [any(p.grad is not None for p in m.parameters()) for m in students.students] == [False, True]


def test_it_stops_when_little_energy_is_left():
    torch.manual_seed(0)
    data = batches()
    arguments = {"epochs": 1, **QUICK}
    student, teacher = network(4), network(8)
    residuals = [network(3), network(2)]
    assert len(res_kd(student, teacher, data, data, residuals=residuals, stop=1e9, **arguments)) == 1
    assert len(res_kd(student, teacher, data, data, residuals=residuals, stop=0.0, **arguments)) == 3


def test_a_mistake_is_named():
    student, teacher, data = network(4), network(8), batches()
    with pytest.raises(ValueError, match="residuals: expected one network"):
        res_kd(student, teacher, data, residuals=[])
    for residuals in ([student], [teacher], [network(2)] * 2):
        with pytest.raises(ValueError, match="two places"):
            res_kd(student, Frozen(teacher), data, residuals=residuals)
    with pytest.raises(ValueError, match=r"stop=0.1.*validation"):
        res_kd(student, teacher, data, residuals=[network(2)], stop=0.1)
    with pytest.raises(ValueError, match=r"stop=0.1.*network"):
        res_kd(student, NoTeacher(), data, data, residuals=[network(2)], stop=0.1)
    bound = KD()
    bound.pairs = [("@logits", "@logits")]
    for arguments in ({"losses": [bound]}, {"residual_losses": [bound]}, {"stages": [Stage([bound], epochs=1)]}):
        with pytest.raises(ValueError, match="KD was bound"):
            res_kd(student, teacher, data, residuals=[network(2)], **arguments)
    with pytest.raises(ValueError, match="each of them once"):
        ResidualStudents([student, student])
    with pytest.raises(TypeError, match=r"students\[1\]"):
        ResidualStudents([student, "more"])


def test_the_sum_is_exported_as_one_file(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    both = ResidualStudents([SmallCNN(width=2), SmallCNN(width=1)])
    assert export(both, torch.randn(2, 1, 28, 28), tmp_path / "both.onnx").max_abs_error < 1e-4


def test_the_sum_is_nearer_to_the_teacher_than_the_student_alone():
    data = fashion_loaders(batch_size=64, limit=1000)
    usual = {"optimizer": "adamw", "lr": 0.01, "scheduler": "onecycle", **QUICK}
    torch.manual_seed(0)
    teacher = SmallCNN(width=12)
    distill(teacher, None, data.train, epochs=4, **usual)
    torch.manual_seed(1)
    results = res_kd(
        SmallCNN(width=4), teacher, data.train, data.validation, residuals=[SmallCNN(width=4)],
        losses=[KD(weight=1.0)], epochs=3, **usual,
    )  # fmt: skip
    alone, both = (result.student for result in results)
    assert energy_left(both, teacher, data.validation) < energy_left(alone, teacher, data.validation)
    assert results[1].metrics.teacher_kl < results[0].metrics.teacher_kl
    x, y = next(iter(data.validation))[:2]
    _, used = both.eval().adaptive(x, confidence=0.4)
    assert 1 < float(used.double().mean()) < 2
    assert len(y) == len(used)
