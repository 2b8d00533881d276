from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import EMA, KD, RKD, Altered, AttentionTransfer, Distillation, Loss, TaskLoss, WarmUp, distill
from tutelage.data import fashion_loaders
from tutelage.evaluation import evaluate
from tutelage.functional import consistency
from tutelage.models import SmallCNN
from tutelage.views import UNLABELLED

BATCH = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def bound(teacher: EMA, losses: list[Loss] | None = None) -> Distillation:
    torch.manual_seed(0)
    return Distillation(SmallCNN(width=4), teacher, losses or teacher.losses()).bind(BATCH)


def test_consistency_equals_its_loop_and_lets_the_teacher_be():
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    pairs = zip(student.detach(), teacher.detach(), strict=True)
    loop = sum(float(sum((p - q) ** 2 for p, q in zip(a.softmax(0), b.softmax(0), strict=True))) for a, b in pairs)
    value = consistency(student, teacher)
    assert value.item() == pytest.approx(loop / 5)
    value.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert consistency(student, student) == 0


def test_masked_tokens_count_for_nothing():
    student, teacher = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rows = [(student[i, t], teacher[i, t]) for i in range(2) for t in range(3) if mask[i, t]]
    expected = torch.stack([(s.softmax(0) - t.softmax(0)).square().sum() for s, t in rows]).mean()
    torch.testing.assert_close(consistency(student, teacher, mask), expected)
    nothing = consistency(student, teacher, torch.zeros_like(mask))
    nothing.backward()
    assert nothing == 0
    assert student.grad.abs().max() == 0


def test_the_copy_is_the_mean_at_first_and_then_moves_by_the_decay():
    teacher = EMA(decay=0.75)
    d = bound(teacher)
    weight, seen = d.student.linear.weight, []
    expected = torch.zeros_like(weight)
    for t in range(1, 9):
        with torch.no_grad():
            weight.add_(torch.randn_like(weight))
        seen.append(weight.detach().clone())
        d(BATCH)
        expected = torch.stack(seen).mean(0) if t <= 4 else 0.75 * expected + 0.25 * seen[-1]
        torch.testing.assert_close(teacher.copy.linear.weight, expected)


def test_a_step_of_several_batches_counts_once():
    teacher = EMA(decay=0.5)
    d = bound(teacher)
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    for _ in range(3):
        for _ in range(4):
            d(BATCH).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    d(BATCH)
    assert teacher.steps == 3


def test_the_copy_is_in_eval_mode_gets_no_gradient_and_keeps_its_statistics():
    teacher = EMA()
    d = bound(teacher)
    teacher.copy.train()  # somebody's mistake
    before = copy.deepcopy(teacher.copy.state_dict())
    d(BATCH).total.backward()
    assert not any(m.training for m in teacher.copy.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.copy.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.copy.parameters())
    assert not {id(p) for p in teacher.copy.parameters()} & {id(p) for p in d.parameters()}


def test_any_losses_and_samples_without_labels():
    teacher = EMA()
    losses = [TaskLoss(), KD(), AttentionTransfer("stage1", "stage2"), RKD("linear:input")]
    d = bound(teacher, losses)
    images, labels = BATCH
    d((images, torch.where(labels == 0, UNLABELLED, labels))).total.backward()
    assert all(p.grad.isfinite().all() for p in d.student.parameters())
    assert all(v.isfinite() for v in d((images, labels)).values.values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, accumulate):
    data = fashion_loaders(limit=64, validation=20, batch_size=16)
    settings = {"epochs": 2, "lr": 0.05, "accumulate": accumulate, "progress": False, "checkpoint_every": 1}

    class Stop(Exception):
        pass

    def stop(line):
        raise Stop

    def run(out, after_epoch=None, **more):
        torch.manual_seed(0)
        student, teacher = SmallCNN(width=4), EMA(decay=0.9)
        distill(
            student, teacher, data.train, losses=teacher.losses(), out=tmp_path / out, after_epoch=after_epoch,
            **settings, **more,
        )  # fmt: skip
        return student, teacher

    straight = run("straight")
    with pytest.raises(Stop):
        run("broken", after_epoch=stop)
    resumed = run("broken", resume=True)
    for mine, theirs in zip(resumed, straight, strict=True):
        module, other = (x if isinstance(x, nn.Module) else x.copy for x in (mine, theirs))
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in module.state_dict().items())
    assert resumed[1].steps == straight[1].steps


@pytest.mark.slow
def test_few_labels_the_average_is_better_than_the_network_itself():
    """Of 1,000 samples a tenth have labels: the averaged network against the one it averages, and against none."""
    data = fashion_loaders(limit=1000, validation=500, batch_size=50)
    images, labels = (torch.cat(parts) for parts in zip(*((b[0], b[1]) for b in data.train), strict=True))
    labels = torch.where(torch.arange(len(labels)) % 10 == 0, labels, UNLABELLED)
    batches = [(images[i : i + 50], labels[i : i + 50]) for i in range(0, len(labels), 50)]
    noisy = Altered(*(lambda x: x + 0.1 * torch.randn_like(x),) * 2)
    accuracy = {"student": 0.0, "average": 0.0, "alone": 0.0}
    for seed in range(3):
        for name in ("average", "alone"):
            torch.manual_seed(seed)
            student, teacher = SmallCNN(width=8), EMA(decay=0.95)
            role = teacher if name == "average" else None
            losses = teacher.losses(WarmUp(1.0, until=0.5)) if role else [TaskLoss()]
            distill(
                student, role, batches, losses=losses, views=noisy, epochs=16, optimizer="adamw", lr=0.005,
                scheduler="constant", progress=False, seed=seed,
            )  # fmt: skip
            accuracy["alone" if role is None else "student"] += evaluate(student, data.validation).value / 3
            if role is not None:
                accuracy["average"] += evaluate(teacher.copy, data.validation).value / 3
    assert accuracy["average"] > accuracy["student"]
    assert accuracy["average"] > accuracy["alone"]


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"EMA: decay=1.0: expected 0 <= decay < 1"):
        EMA(decay=1.0)
