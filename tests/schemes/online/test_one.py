from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, ONE, Branches, Distillation, FitNets, GatedBranches, TaskLoss
from tutelage.functional import gated_logits, task_cross_entropy
from tutelage.models import SmallCNN
from tutelage.taps import UnknownTap

SHAPE = (1, 28, 28)


def branches(seed=0, **options) -> GatedBranches:
    torch.manual_seed(seed)
    return GatedBranches(SmallCNN(width=4), SHAPE, **options)


def batch(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *SHAPE, generator=g), torch.randint(0, 10, (n,), generator=g)


def kl(target, mine, t):
    p, log_q = (target / t).softmax(1), (mine / t).log_softmax(1)
    return t * t * (p * (p.log() - log_q)).sum(1).mean()


def test_total_and_gradients_equal_the_naive_form():
    student = branches()
    naive = copy.deepcopy(student)
    x, y = batch()
    d = Distillation(student, ONE(), losses=ONE().losses()).bind((x, y))
    d.progress = 1.0
    said = d((x, y))
    said.total.backward()

    first = naive.peers[0]
    shared = first.stage2(first.pool(first.stage1(x)))
    g = F.relu(naive.norm(naive.gate(shared.mean((2, 3))))).softmax(1)
    logits = [p.linear(p.avgpool(p.stage3(p.pool(shared))).flatten(1)) for p in naive.peers]
    ensemble = sum(g[:, i : i + 1] * z for i, z in enumerate(logits))
    total = sum(F.cross_entropy(z, y) + kl(ensemble.detach(), z, 3.0) for z in logits) + F.cross_entropy(ensemble, y)
    total.backward()
    torch.testing.assert_close(said.total, total)
    for (name, mine), theirs in zip(student.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gate_learns_from_the_labels_alone_and_the_ensemble_has_one_lesson():
    x, y = batch()
    for losses, learns in (([KD(temperature=3.0)], False), ([TaskLoss()], True)):
        student = branches()
        Distillation(student, ONE(), losses=losses)((x, y)).total.backward()
        assert (student.gate.weight.grad is not None) == learns
    student = branches()
    value = Distillation(student, ONE(), losses=[TaskLoss()])((x, y))["TaskLoss"]
    output = branches()(x)
    expected = sum(task_cross_entropy(z, y) for z in [*output.peers, output.ensemble])
    torch.testing.assert_close(value, expected.detach())


def test_gated_logits_are_a_mixture():
    torch.manual_seed(0)
    logits, gates = [torch.randn(4, 5) for _ in range(3)], torch.randn(4, 3).softmax(1)
    order = [2, 0, 1]
    torch.testing.assert_close(gated_logits(logits, gates), gated_logits([logits[i] for i in order], gates[:, order]))
    one_hot = torch.eye(3)[[0, 1, 2, 1]]
    chosen = torch.stack([logits[i][row] for row, i in enumerate((0, 1, 2, 1))])
    torch.testing.assert_close(gated_logits(logits, one_hot), chosen)
    torch.testing.assert_close(gated_logits([logits[0]] * 3, gates), logits[0])
    assert gated_logits([z.half() for z in logits], gates.half()).dtype is torch.float32
    with pytest.raises(ValueError, match=r"gates \(4, 2\) do not fit"):
        gated_logits(logits, gates[:, :2])
    with pytest.raises(ValueError, match=r"\(4, 4\)\] and gates"):
        gated_logits([logits[0], logits[1][:, :4]], gates[:, :2])


def test_at_other_addresses_the_ensemble_is_the_gated_mean():
    student, (x, y) = branches(), batch()
    teacher = ONE()
    d = Distillation(student, teacher, losses=[FitNets("stage3")]).bind((x, y))
    record = d.observer(d.views((x, y)).student)
    lessons = teacher.lessons(d.views((x, y)), record)
    gates, maps = record.output.gates, [lesson.student["stage3"] for lesson in lessons[:3]]
    expected = sum(gates[:, i].reshape(-1, 1, 1, 1) * m for i, m in enumerate(maps))
    torch.testing.assert_close(lessons[0].teacher["stage3"], expected.detach())
    assert lessons[-1].teacher is None


def test_a_batch_of_one_and_equal_samples():
    student = branches()
    x, y = batch(1)
    before = student.norm.running_mean.clone()
    losses = Distillation(student, ONE(), losses=ONE().losses())((x, y))
    losses.total.backward()
    assert torch.equal(student.norm.running_mean, before)
    assert all(p.grad.isfinite().all() for p in student.parameters())
    output = student(x.expand(5, -1, -1, -1))
    assert output.gates.isfinite().all()
    torch.testing.assert_close(output.gates.sum(1), torch.ones(5))


class Tokens(nn.Module):
    """A sequence on the trunk, and a function that changes it in place above the fork."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        shared = self.a(x)
        return self.c(F.elu(self.b(F.relu(shared, inplace=True))).mean(1))


def test_the_gate_reads_sequences_and_what_is_overwritten_above_the_fork():
    torch.manual_seed(0)
    student = GatedBranches(Tokens(), (5, 4), count=2, after="a").eval()
    x = torch.randn(3, 5, 4)
    gates = student.norm(student.gate(student.peers[0].a(x).mean(1))).relu().softmax(1)
    torch.testing.assert_close(student(x).gates, gates)
    student.train()(x).ensemble.sum().backward()
    assert student.peers[0].a.weight.grad.isfinite().all()


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match="count=1: expected 2"):
        branches(count=1)
    with pytest.raises(UnknownTap, match="stage9"):
        branches(after="stage9")

    class Dense(nn.Sequential):
        def forward(self, x):
            return super().forward(x)[..., None]

    with pytest.raises(ValueError, match=r"the gate takes .*; got \(2, 4\) and \(2, 3, 1\)"):
        GatedBranches(Dense(nn.Linear(4, 4), nn.Linear(4, 3)), (4,), after="0")
    with pytest.raises(TypeError, match="teaches a tutelage GatedBranches, got Branches"):
        Distillation(Branches(SmallCNN(width=4), "stage2", 3, SHAPE), ONE()).bind(batch())
