from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import KD, RKD, AttentionTransfer, Distillation, Snapshot, TaskLoss, Training, distill
from tutelage.data import fashion_loaders
from tutelage.functional import asymmetric_kd, kd_divergence
from tutelage.models import SmallCNN

BATCH = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def bound(teacher: Snapshot, losses=None) -> Distillation:
    torch.manual_seed(0)
    return Distillation(SmallCNN(width=4), teacher, losses or teacher.losses()).bind(BATCH)


def test_the_teacher_alone_is_softened():
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    p, q = (teacher / 3).softmax(1), student.softmax(1)
    loop = (p * (p.log() - q.log())).sum(1).mean()
    value = asymmetric_kd(student, teacher, 3.0)
    torch.testing.assert_close(value, loop.detach())
    torch.testing.assert_close(asymmetric_kd(student, teacher, 1.0), kd_divergence(student, teacher, 1.0))
    value.backward()
    torch.testing.assert_close(student.grad, (q - p).detach() / 5)  # what −Σ p log q has as well
    assert teacher.grad is None
    with pytest.raises(ValueError, match="temperature=0"):
        asymmetric_kd(student, teacher, 0)


def test_the_end_of_each_cycle_teaches_the_next():
    teacher = Snapshot(cycles=3)
    d = bound(teacher)
    weight, ends = d.student.linear.weight, []
    for step in range(12):
        d.progress = step / 12
        if step in (4, 8):
            ends.append(weight.detach().clone())
        losses = d(BATCH)
        if step < 4:
            assert sorted(losses.values) == ["TaskLoss"]
            assert losses.total == losses["TaskLoss"]
        else:
            torch.testing.assert_close(teacher.copy.linear.weight, ends[-1])
            total = (1 + 1 / 3) * losses["TaskLoss"] + losses["AsymmetricKD"]
            torch.testing.assert_close(losses.total.detach(), total)
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
    assert len(ends) == 2


@pytest.mark.parametrize("steps", range(7, 120, 9))
@pytest.mark.parametrize("cycles", [2, 3, 7])
def test_rounding_moves_no_boundary(steps, cycles):
    teacher = Snapshot(cycles)
    d = bound(teacher, [KD(), TaskLoss()]) if steps == 7 else None
    found = []
    for step in range(steps):
        batch = type("B", (), {"progress": step / steps, "differentiable": False})()
        if d is None:
            teacher._dry, teacher.take, teacher.said = False, lambda: None, lambda batch: None
        else:
            teacher.said = lambda batch: None
        teacher.lessons(batch, None)
        found.append(teacher.cycle)
    assert found == [step * cycles // steps for step in range(steps)]


def test_the_snapshot_is_frozen_in_eval_mode_and_of_a_copy():
    teacher = Snapshot(2)
    d = bound(teacher)
    d.progress = 0.6
    d(BATCH).total.backward()
    before = copy.deepcopy(teacher.copy.state_dict())
    d(BATCH).total.backward()
    assert all(torch.equal(v, before[k]) for k, v in teacher.copy.state_dict().items())
    assert not any(m.training for m in teacher.copy.modules())
    assert all(p.grad is None for p in teacher.copy.parameters())


def test_any_losses_beside_it():
    d = bound(Snapshot(2), [TaskLoss(), KD(), AttentionTransfer("stage1", "stage2"), RKD("linear:input")])
    assert sorted(d(BATCH).values) == ["TaskLoss"]
    d.progress = 0.5
    assert sorted(d(BATCH).values) == ["AttentionTransfer", "KD", "RKD", "TaskLoss"]


@pytest.mark.parametrize("stop_after", [3, 5])  # optimiser steps: in the first cycle and in the second
def test_a_run_resumed_within_a_cycle_is_the_undisturbed_one(tmp_path, stop_after):
    data = fashion_loaders(limit=64, validation=20, batch_size=16)
    settings = {"epochs": 2, "lr": 0.05, "cycles": 2, "progress": False, "checkpoint_every": 1}

    class Stop(Exception):
        pass

    class Stopping:
        """The loader, which fails when it was asked for so many batches in training."""

        def __init__(self, left):
            self.left = left

        def __len__(self):
            return len(data.train)

        def __iter__(self):
            for batch in data.train:
                if self.left == 0:
                    raise Stop
                self.left -= 1
                yield batch

    def run(out, loader, **more):
        torch.manual_seed(0)
        student, teacher = SmallCNN(width=4), Snapshot(2)
        distill(student, teacher, loader, losses=teacher.losses(), out=tmp_path / out, **settings, **more)
        return [*student.state_dict().values(), *teacher.copy.state_dict().values()]

    straight = run("straight", data.train)
    with pytest.raises(Stop):
        run("broken", Stopping(1 + stop_after))  # one batch to bind with
    resumed = run("broken", data.train, resume=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, straight, strict=True))


def test_the_learning_rate_begins_anew_in_each_cycle():
    training = Training(steps=12, lr=0.2, cycles=3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = training.make_scheduler(optimizer, 12)
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == rates[4] == rates[8] == 0.2
    assert all(rates[i] > rates[i + 1] for i in range(11) if i % 4 != 3)
    with pytest.raises(ValueError, match="cycles=2: only scheduler='cosine' has cycles, and it is 'onecycle'"):
        Training(epochs=1, scheduler="onecycle", cycles=2)


def test_one_cycle_is_refused():
    with pytest.raises(ValueError, match=r"Snapshot: cycles=1: expected 2 or more"):
        Snapshot(1)


@pytest.mark.parametrize("seed", [0, 1])
def test_on_unseen_images_the_network_stays_nearer_to_its_snapshot_than_with_the_labels_alone(seed):
    data = fashion_loaders(limit=300, validation=300, batch_size=50)
    images = torch.cat([batch[0] for batch in data.validation])
    gap = {}
    for name in ("snapshot", "alone"):
        torch.manual_seed(seed)
        student, teacher = SmallCNN(width=8), Snapshot(2)
        losses = teacher.losses() if name == "snapshot" else [TaskLoss(), KD(weight=0.0)]
        distill(
            student, teacher, data.train, losses=losses, epochs=8, optimizer="adamw", lr=0.01, weight_decay=0.0,
            cycles=2, progress=False, seed=seed,
        )  # fmt: skip
        with torch.no_grad():
            gap[name] = float(kd_divergence(student.eval()(images), teacher.copy(images), 1.0))
    assert gap["snapshot"] < 0.8 * gap["alone"]
