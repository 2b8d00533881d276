"""Residual knowledge distillation: the formula, who learns from what, and the sum in the student's way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import KD, RKD, Distillation, FitNets, Stage, TaskLoss, Training, distill
from tutelage.architecture.residual_kd import Assisted, ResidualKD, residual_error, split_width
from tutelage.data import fashion_loaders
from tutelage.deploy import export
from tutelage.deploy.footprint import macs
from tutelage.engine import fit
from tutelage.models import MLP, SmallCNN
from tutelage.taps import Observer, UnknownTap
from tutelage.views import Inputs

IMAGE = (1, 12, 12)


def assisted(mine: int = 3, theirs: int = 2, seed: int = 0) -> Assisted:
    torch.manual_seed(seed)
    return Assisted(SmallCNN(width=mine), SmallCNN(width=theirs), example=IMAGE)


def batch(n: int = 8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *IMAGE, generator=g), torch.arange(n) % 10


def test_the_error_is_what_the_sum_leaves():
    torch.manual_seed(0)
    student, assistant, teacher = (torch.randn(4, c, 3, 3, requires_grad=True) for c in (3, 3, 5))
    regressor = nn.Conv2d(3, 5, 1)
    value = residual_error(student, assistant, teacher, regressor)
    error = (teacher - regressor(student)).detach()  # what the student leaves
    linear = nn.functional.conv2d(assistant, regressor.weight)  # W·F_a
    torch.testing.assert_close(value, (error - linear).square().mean())
    torch.testing.assert_close(value, (regressor(student + assistant) - teacher).square().mean())
    value.backward()
    assert assistant.grad.abs().sum() > 0
    assert student.grad is None
    assert teacher.grad is None
    assert regressor.weight.grad is None
    exact = residual_error(student, (teacher.detach()[:, :3] - student).detach(), teacher[:, :3])
    assert exact < 1e-12
    with pytest.raises(ValueError, match=r"student \(4, 3, 3, 3\), assistant \(4, 2, 3, 3\)"):
        residual_error(student, assistant[:, :2], teacher)


def test_the_rest_of_the_student_reads_the_sum():
    both, (x, _) = assisted().eval(), batch()
    output = both(x)
    own = Observer(both.student, ["stage3"])(Inputs((x,)))["stage3"]
    help_ = both.projector(Observer(both.assistant, ["stage3"])(Inputs((x,)))["stage3"])
    torch.testing.assert_close(output.feature, own)
    torch.testing.assert_close(output.residual, help_)
    torch.testing.assert_close(output.logits, both.student.linear((own + help_).mean((2, 3))))
    nn.init.zeros_(both.projector.weight)
    torch.testing.assert_close(both(x).logits, both.student(x))
    assert not any(m._forward_hooks for m in both.modules())


def test_each_learns_from_its_own_term():
    teacher = SmallCNN(width=6)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    learning = {}
    for part in ("student", "assistant", "both"):
        both = assisted()
        loss = ResidualKD("stage3", part=part)
        Distillation(both, teacher, losses=[loss])(batch()).total.backward()
        parts = {"student": both.student.stage1, "assistant": both.assistant.stage1, "regressor": loss.regressor}
        learning[part] = {n for n, m in parts.items() if any(p.grad is not None for p in m.parameters())}
        assert both.student.linear.weight.grad is None  # nothing of it stands before the features
    assert learning == {
        "student": {"student", "regressor"},
        "assistant": {"assistant"},
        "both": {"student", "assistant", "regressor"},
    }
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_the_value_is_the_hint_and_the_error_also_of_maps_of_other_sizes():
    both, teacher = assisted().eval(), SmallCNN(width=5).eval()
    loss = ResidualKD("stage2")  # twice as high and wide
    d = Distillation(both, teacher, losses=[loss]).bind(batch())
    x = batch()[0]
    target = nn.functional.avg_pool2d(Observer(teacher, ["stage2"])(Inputs((x,)))["stage2"], 2)
    d.eval()
    said = both(x)
    hint = (loss.regressor(said.feature) - target).square().mean()
    error = (loss.regressor(said.feature + said.residual) - target).square().mean()
    torch.testing.assert_close(d(batch())["ResidualKD"], hint + error)


def test_any_losses_beside_it_and_two_stages(tmp_path):
    teacher, data = SmallCNN(width=6), [batch(), batch(6)]
    usual = {"cpu": True, "progress": False}
    losses = [TaskLoss(), KD(), ResidualKD(), FitNets(("student.stage2", "stage2")), RKD(("student.stage3", "stage3"))]
    first = distill(assisted(), teacher, data, data, losses=losses, epochs=2, out=tmp_path, **usual)
    again = distill(
        assisted(), teacher, data, data, losses=copy.deepcopy(losses), epochs=2, out=tmp_path, resume=True, **usual
    )
    for name, value in first.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name])
    assert first.metrics.samples == 14
    stages = [Stage([ResidualKD(part="student")], 1), Stage([ResidualKD(part="assistant")], 1)]
    both = assisted()
    assistant = copy.deepcopy(both.assistant.state_dict())
    distill(both, teacher, data, stages=stages[:1], **usual)
    assert all(torch.equal(v, assistant[k]) for k, v in both.assistant.named_parameters())
    distill(both, teacher, data, stages=stages, **usual)


def test_two_networks_from_one_budget():
    for width in (8, 16, 33):
        mine, theirs = split_width(width)
        assert mine**2 + theirs**2 <= width**2
    image = torch.zeros(1, 1, 28, 28)
    sizes = [macs(SmallCNN(width=w), image) for w in (*split_width(16), 16)]
    assert sizes[0] + sizes[1] < 1.1 * sizes[2]
    with pytest.raises(ValueError, match=r"share=1\.5"):
        split_width(8, 1.5)
    with pytest.raises(ValueError, match="widths 1 and 0"):
        split_width(2, 0.9)


def test_vectors_instead_of_maps():
    both = Assisted(MLP(6, [5], 3), MLP(6, [4], 3), "hidden", "hidden", example=(6,))
    teacher = MLP(6, [8], 3)
    x = torch.randn(4, 6)
    d = Distillation(both, teacher, losses=[ResidualKD("hidden")]).bind(x)
    assert d(x).total.isfinite()


def test_a_mistake_is_named():
    with pytest.raises(TypeError, match="Assisted student, got SmallCNN"):
        Distillation(SmallCNN(width=2), SmallCNN(width=4), losses=[ResidualKD("stage3")]).bind(batch())
    with pytest.raises(ValueError, match="part='all'"):
        ResidualKD(part="all")
    with pytest.raises(UnknownTap, match="stage4"):
        Assisted(SmallCNN(width=2), SmallCNN(width=2), "stage4", example=IMAGE)
    with pytest.raises(UnknownTap, match="one module"):
        Assisted(SmallCNN(width=2), SmallCNN(width=2), "linear:input", example=IMAGE)
    with pytest.raises(UnknownTap, match="calls once; this one 2"):
        Assisted(SmallCNN(width=2), SmallCNN(width=2), "pool", example=IMAGE)
    with pytest.raises(ValueError, match=r"assistant_at='stage2'.*channels alone"):
        Assisted(SmallCNN(width=2), SmallCNN(width=2), "stage3", "stage2", example=IMAGE)
    net = SmallCNN(width=2)
    with pytest.raises(ValueError, match="student object itself"):
        Assisted(net, net, example=IMAGE)


def test_both_are_exported_as_one_file(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export(assisted(), torch.randn(2, *IMAGE), tmp_path / "both.onnx").max_abs_error < 1e-4


def test_the_assistant_takes_away_a_part_of_the_error():
    data = fashion_loaders(batch_size=64, limit=1000)
    usual = {"optimizer": "adamw", "lr": 0.01, "scheduler": "onecycle", "cpu": True, "progress": False}
    torch.manual_seed(0)
    teacher = SmallCNN(width=12)
    distill(teacher, None, data.train, epochs=4, **usual)
    torch.manual_seed(1)
    both, loss = Assisted(SmallCNN(width=5), SmallCNN(width=3), example=(1, 28, 28)), ResidualKD("stage3")
    settings = Training(epochs=3, gradient_shares=False, **usual)
    fit(Distillation(both, teacher, losses=[TaskLoss(), loss]), data.train, training=settings)
    x = next(iter(data.validation))[0]
    with torch.no_grad():
        said, target = both.eval()(x), Observer(teacher.eval(), ["stage3"])(Inputs((x,)))["stage3"]
        alone, summed = (
            float((loss.regressor(f) - target).square().mean()) for f in (said.feature, said.feature + said.residual)
        )
    assert summed < alone
