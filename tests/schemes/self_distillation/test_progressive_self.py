from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import Distillation, ProgressiveSelf, TaskLoss, distill
from tutelage.data import fashion_loaders
from tutelage.evaluation import evaluate
from tutelage.functional import progressive_self
from tutelage.gradients import gradient_shares
from tutelage.models import SmallCNN
from tutelage.views import UNLABELLED


def made(alpha: float = 0.8, samples: int = 6):
    torch.manual_seed(0)
    batch = torch.randn(samples, 5), torch.arange(samples) % 3, torch.arange(samples)
    return Distillation(nn.Linear(5, 3), None, losses=[ProgressiveSelf(alpha)]).bind(batch, population=samples), batch


def test_it_is_the_cross_entropy_with_the_mixed_targets_written_out():
    torch.manual_seed(0)
    logits, past, labels = torch.randn(4, 3), torch.rand(4, 3).softmax(1), torch.tensor([0, 2, UNLABELLED, 1])
    total = 0.0
    for z, p, y in zip(logits, past, labels, strict=True):
        if y != UNLABELLED:
            target = [0.7 * (c == y) + 0.3 * p[c] for c in range(3)]
            total -= sum(t * z.log_softmax(0)[c] for c, t in enumerate(target))
    torch.testing.assert_close(progressive_self(logits, past, labels, 0.3), torch.as_tensor(total / 3))


def test_without_a_past_or_without_alpha_it_is_the_task_loss():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(progressive_self(logits, torch.zeros(4, 3), labels, 0.8), expected)
    torch.testing.assert_close(progressive_self(logits, torch.rand(4, 3).softmax(1), labels, 0.0), expected)


def test_the_target_is_what_was_said_the_last_time_whatever_the_order():
    d, (x, y, ids) = made()
    d((x, y, ids))
    with torch.no_grad():
        said = d.student(x).softmax(1)
        d.student.weight.add_(1.5)
    d.progress = 0.5
    turned = torch.tensor([4, 0, 3])
    value = d((x[turned], y[turned], ids[turned]))["ProgressiveSelf"]
    expected = progressive_self(d.student(x[turned]), said[turned], y[turned], 0.8 * 0.5)
    torch.testing.assert_close(value, expected)
    memory = d.losses["ProgressiveSelf"].past
    torch.testing.assert_close(memory[turned], d.student(x[turned]).softmax(1))
    torch.testing.assert_close(memory[[1, 2, 5]], said[[1, 2, 5]])


def test_nothing_is_remembered_in_eval_mode_without_gradients_and_when_gradients_are_looked_at():
    d, batch = made()
    loss = d.losses["ProgressiveSelf"]
    assert loss.past.abs().max() == 0  # binding taught it nothing
    with torch.no_grad():
        d(batch)
    d.eval()(batch)
    d.train()
    gradient_shares(d, batch)
    assert loss.past.abs().max() == 0
    d(batch)
    torch.testing.assert_close(loss.past.sum(1), torch.ones(6))


def test_the_gradient_is_that_of_finite_differences_and_none_is_of_the_past():
    past = torch.rand(3, 4, dtype=torch.float64).softmax(1).requires_grad_()
    labels = torch.tensor([0, 3, 1])
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: progressive_self(z, past, labels, 0.6), logits)
    progressive_self(logits, past, labels, 0.6).backward()
    assert past.grad is None


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    data = fashion_loaders(limit=64, validation=20, batch_size=16)

    class Stop(Exception):
        pass

    def stop(line):
        if line.epoch == 1:
            raise Stop

    def run(out, after_epoch=None, **more):
        torch.manual_seed(0)
        student = SmallCNN(width=4)
        distill(
            student, None, data.train, losses=[ProgressiveSelf()], out=tmp_path / out, after_epoch=after_epoch,
            epochs=3, lr=0.05, progress=False, **more,
        )  # fmt: skip
        return student.state_dict()

    straight = run("straight")
    with pytest.raises(Stop):
        run("broken", after_epoch=stop)
    assert all(torch.equal(v, straight[k]) for k, v in run("broken", resume=True).items())


def test_an_overfitting_network_is_less_sure_of_itself_than_with_the_labels_alone():
    """100 images learned by heart: calibration and likelihood on others, against plain cross-entropy."""
    data = fashion_loaders(limit=100, validation=500, batch_size=50)
    found = {}
    for name, losses in (("PS-KD", [ProgressiveSelf()]), ("alone", [TaskLoss()])):
        torch.manual_seed(0)
        student = SmallCNN(width=16)
        distill(
            student, None, data.train, losses=losses, epochs=100, optimizer="adamw", lr=0.01, weight_decay=0.0,
            scheduler="onecycle", progress=False,
        )  # fmt: skip
        found[name] = evaluate(student, data.validation)
    assert found["PS-KD"].nll < 0.95 * found["alone"].nll
    assert found["PS-KD"].ece < found["alone"].ece


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match=r"ProgressiveSelf: alpha=1.2: expected a number from 0 to 1"):
        ProgressiveSelf(1.2)
    x, y = torch.randn(4, 5), torch.arange(4) % 3
    with pytest.raises(ValueError, match="ProgressiveSelf needs sample ids"):
        Distillation(nn.Linear(5, 3), None, losses=[ProgressiveSelf()]).bind((x, y))
    with pytest.raises(ValueError, match="population="):
        Distillation(nn.Linear(5, 3), None, losses=[ProgressiveSelf()]).bind((x, y, torch.arange(4)))
    d, _ = made()
    with pytest.raises(ValueError, match=r"a sample id is not in 0\.\.5"):
        d((x, y, torch.tensor([0, 1, 2, 6])))
