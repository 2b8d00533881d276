from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import KD, RKD, AttentionTransfer, Cohort, DeepMutualLearning, Distillation, StartAt, TaskLoss
from tutelage.data import fashion_loaders
from tutelage.distilling import distill
from tutelage.models import MLP, SmallCNN
from tutelage.schemes.self_distillation.self_attention import SelfAttention, attention_mimicry


def small(seed: int = 0, width: int = 3) -> SmallCNN:
    torch.manual_seed(seed)
    return SmallCNN(width)


def batch(n: int = 6):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 12, 12, generator=g), torch.arange(n) % 3


def naive(early, late):
    """Position by position, with the enlarged map's values interpolated by hand between the corners."""
    total = 0.0
    for a, b in zip(early.double(), late.double(), strict=True):
        a, b = (a**2).sum(0), (b**2).sum(0)
        height, width = a.shape
        enlarged = torch.empty(height, width, dtype=torch.float64)
        for i in range(height):
            for j in range(width):
                y, x = i * (b.shape[0] - 1) / (height - 1), j * (b.shape[1] - 1) / (width - 1)
                top, left = min(int(y), b.shape[0] - 2), min(int(x), b.shape[1] - 2)
                p, q = y - top, x - left
                upper = (1 - q) * b[top, left] + q * b[top, left + 1]
                lower = (1 - q) * b[top + 1, left] + q * b[top + 1, left + 1]
                enlarged[i, j] = (1 - p) * upper + p * lower
        q_a, q_b = a.exp() / a.exp().sum(), enlarged.exp() / enlarged.exp().sum()
        total += float(((q_a - q_b) ** 2).sum())
    return total / len(early)


def test_the_value_is_the_naive_sum():
    g = torch.Generator().manual_seed(0)
    early, late = torch.randn(3, 4, 8, 6, generator=g), 0.7 * torch.randn(3, 5, 3, 2, generator=g)
    assert attention_mimicry(early, late).item() == pytest.approx(naive(early, late), rel=1e-5)
    assert attention_mimicry(late, early).item() == pytest.approx(naive(early, late), rel=1e-5)


def test_invariances_bounds_and_gradient():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4, 6, 5, 5, generator=g, requires_grad=True)
    b = torch.randn(4, 6, 5, 5, generator=g, requires_grad=True)
    value = attention_mimicry(a, b)
    value.backward()
    assert b.grad is None
    assert a.grad.abs().sum() > 0
    order, channels = torch.tensor([2, 0, 3, 1]), torch.randperm(6, generator=g)
    torch.testing.assert_close(attention_mimicry(a[order], b[order]), value)
    torch.testing.assert_close(attention_mimicry(a[:, channels], -b), value)
    assert attention_mimicry(a, -a).item() == 0
    # all at one position each, and of another one: the most that two distributions can differ
    one, other = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    one[..., 0, 0], other[..., 1, 1] = 100.0, 100.0
    assert attention_mimicry(one, other).item() == pytest.approx(2.0)
    tokens = torch.randn(2, 7, 3, generator=g)
    torch.testing.assert_close(
        attention_mimicry(tokens, 2 * tokens), attention_mimicry(tokens.mT[..., None], 2 * tokens.mT[..., None])
    )
    half = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16, requires_grad=True)
    attention_mimicry(half, torch.zeros(2, 3, 4, 4)).backward()
    assert torch.isfinite(half.grad).all()


def test_each_layer_learns_from_the_next_one_alone():
    model, raw = small(), batch()
    d = Distillation(model, losses=[SelfAttention("stage1", "stage2", "stage3", weight=1.0)]).bind(raw)
    losses = d(raw)
    losses.total.backward()
    other = copy.deepcopy(model)
    first = other.stage1(raw[0])
    second = other.stage2(other.pool(first))
    third = other.stage3(other.pool(second))
    torch.testing.assert_close(losses.total, attention_mimicry(first, second) + attention_mimicry(second, third))
    assert model.stage3[0].weight.grad is None
    assert model.linear.weight.grad is None
    assert model.stage2[0].weight.grad.abs().sum() > 0
    assert model.stage1[0].weight.grad.abs().sum() > 0


def test_it_begins_after_two_thirds_of_the_training():
    d = Distillation(small(), losses=[TaskLoss(), SelfAttention()]).bind(batch())
    for progress, weight in ((0.0, 0.0), (0.66, 0.0), (0.67, 0.1), (1.0, 0.1)):
        d.progress = progress
        losses = d(batch())
        assert losses.weights["SelfAttention"] == weight
        assert ("SelfAttention" in losses.values) == (weight > 0)
    with pytest.raises(ValueError, match=r"at=40000"):
        StartAt(0.1, at=40000)


def test_beside_a_teacher_of_fewer_stages_all_stages_of_the_student_are_read():
    terms = [TaskLoss(), KD(), AttentionTransfer(("stage2", "0")), RKD(("linear:input", "3:input"))]
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    loss = SelfAttention(weight=1.0)
    d = Distillation(small(), teacher, [*terms, loss]).bind(batch())
    assert [s for s, _ in loss.pairs] == ["stage1", "stage2", "stage3"]
    losses = d(batch())
    losses.total.backward()
    assert set(losses.values) == {"TaskLoss", "KD", "AttentionTransfer", "RKD", "SelfAttention"}
    alone = Distillation(d.student, losses=[SelfAttention(weight=1.0)]).bind(batch())
    torch.testing.assert_close(losses["SelfAttention"], alone(batch())["SelfAttention"])


@pytest.mark.parametrize("count", [2, 3])
def test_in_a_cohort_each_peer_mimics_itself_once(count):
    cohort = Cohort([small(i, width=2 + i) for i in range(count)])
    teacher = DeepMutualLearning()
    d = Distillation(cohort, teacher, [*teacher.losses(), SelfAttention(weight=1.0)]).bind(batch())
    value = d(batch())["SelfAttention"]
    alone = [Distillation(p, losses=[SelfAttention(weight=1.0)]).bind(batch())(batch()) for p in cohort.peers]
    torch.testing.assert_close(value, sum(losses["SelfAttention"] for losses in alone))


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match=r"SelfAttention: .* at least two; got stage2"):
        Distillation(small(), losses=[SelfAttention("stage2")]).bind(batch())
    with pytest.raises(ValueError, match=r"\(6, 3, 12, 12\) and \(6, 10\)"):
        Distillation(small(), losses=[SelfAttention("stage1", "linear", weight=1.0)]).bind(batch())
    with pytest.raises(ValueError, match="no feature maps"):
        Distillation(MLP(144, (8, 8), 3), losses=[SelfAttention()]).bind(batch())
    with pytest.raises(ValueError, match="different samples"):
        attention_mimicry(torch.ones(2, 1, 2, 2), torch.ones(3, 1, 2, 2))


def gaps(losses, seed: int) -> list[float]:
    """How far the attention of unseen images is from the next stage's, after a short training."""
    data = fashion_loaders(batch_size=64, limit=400, validation=500)
    model = small(seed, width=6)
    how = {"epochs": 5, "optimizer": "adamw", "lr": 0.02, "scheduler": "onecycle", "progress": False, "cpu": True}
    distill(model, None, data.train, losses=losses, seed=seed, **how)
    model.eval()
    x, _, _ = next(iter(data.validation))
    with torch.no_grad():
        first = model.stage1(x)
        second = model.stage2(model.pool(first))
        third = model.stage3(model.pool(second))
    return [attention_mimicry(first, second).item(), attention_mimicry(second, third).item()]


@pytest.mark.parametrize("seed", [0, 1])
def test_early_attention_comes_closer_to_the_later_on_unseen_images(seed):
    alone = gaps([TaskLoss()], seed)
    # ten times the published weight, in the published last third, which is only a dozen steps here
    taught = gaps([TaskLoss(), SelfAttention(weight=StartAt(1.0, at=2 / 3))], seed)
    assert sum(taught) < 0.95 * sum(alone)
