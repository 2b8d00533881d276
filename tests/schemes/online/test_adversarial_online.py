from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import (
    KD,
    RKD,
    AdversarialOnline,
    AttentionTransfer,
    Cohort,
    Distillation,
    FeatureCritic,
    FitNets,
    TaskLoss,
    Training,
)
from tutelage.engine import fit
from tutelage.functional import least_squares_critic, least_squares_fooling
from tutelage.models import MLP, SmallCNN
from tutelage.record import Record
from tutelage.views import read_batch

SEEDS = range(2)
SGD = partial(torch.optim.SGD, lr=0.1)


def cohort(count: int = 2, seed: int = 0, step: int = 3) -> Cohort:
    torch.manual_seed(seed)
    return Cohort([MLP(6, (5 + step * i,), 3) for i in range(count)])


def batch(n: int = 9):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def critics(d: Distillation) -> list[FeatureCritic]:
    return [m for m in (*d.losses.values(), *d.apart.values()) if isinstance(m, FeatureCritic)]


def weights(d: Distillation) -> list[torch.Tensor]:
    return [p.detach().clone() for critic in critics(d) for p in critic.critic.module.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_both_terms_equal_their_sums():
    s, t = torch.tensor([0.2, 0.7, 0.9]), torch.tensor([0.6, 0.1, 1.0])
    loop = sum((1 - b) ** 2 + a**2 for a, b in zip(s, t, strict=True)) / 3
    torch.testing.assert_close(least_squares_critic(s, t), loop)
    torch.testing.assert_close(least_squares_fooling(s), sum((1 - a) ** 2 for a in s) / 3)
    assert least_squares_critic(torch.zeros(4), torch.ones(4)) == 0
    assert least_squares_fooling(torch.ones(4)) == 0


def test_the_best_discriminator_of_equal_features_says_one_half():
    said = torch.linspace(0, 1, 101)
    costs = torch.stack([least_squares_critic(v[None], v[None]) for v in said])
    assert said[costs.argmin()] == 0.5


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_learns_from_the_one_before_it_in_a_circle(count):
    c, (x, y) = cohort(count), batch()
    naive, teacher = copy.deepcopy(c), AdversarialOnline()
    d = Distillation(c, teacher, [TaskLoss(), KD(temperature=3.0, weight=1.0)]).bind((x, y))
    total = d((x, y)).total
    total.backward()
    z = [peer(x) for peer in naive.peers]
    expected = sum(F.cross_entropy(v, y) for v in z)
    for k in range(count):
        p = (z[k - 1].detach() / 3).softmax(1)
        expected = expected + 9 * F.kl_div((z[k] / 3).log_softmax(1), p, reduction="batchmean")
    expected.backward()
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(c.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    lessons = teacher.lessons(d.views((x, y)), d.observer(d.views((x, y)).student))
    assert len(lessons) == count
    assert not any(lesson.teacher.logits.requires_grad for lesson in lessons)


def test_one_update_of_each_discriminator_and_then_its_verdict():
    c, (x, y) = cohort(), batch()
    d = Distillation(c, AdversarialOnline(), [FeatureCritic("linear:input", hidden=7, optimizer=SGD)]).bind((x, y))
    features = [peer.hidden(x) for peer in c.peers]
    expected, moved = torch.zeros(()), []
    for k, critic in enumerate(critics(d)):
        naive = copy.deepcopy(critic.critic.module)
        mine, theirs = critic.transfer(features[k]), features[k - 1].detach()
        cost = (1 - naive(theirs)).square().mean() + naive(mine.detach()).square().mean()
        for p, g in zip(naive.parameters(), torch.autograd.grad(cost, list(naive.parameters())), strict=True):
            p.data -= 0.1 * g
        expected = expected + (1 - naive(mine)).square().mean()
        moved += list(naive.parameters())
    value = d((x, y))["FeatureCritic"]
    torch.testing.assert_close(value, expected.detach())
    for mine, theirs in zip(weights(d), moved, strict=True):
        torch.testing.assert_close(mine, theirs.detach())


def test_the_gradient_reaches_the_learner_its_transfer_layer_and_nobody_else():
    c, x = cohort(), batch()
    d = Distillation(c, AdversarialOnline(), [FeatureCritic("linear:input")]).bind(x)
    first, second = critics(d)
    assert isinstance(first.transfer, nn.Linear)
    assert isinstance(second.transfer, nn.Linear)
    mine = {id(p) for p in d.parameters()}
    assert {id(p) for critic in critics(d) for p in critic.transfer.parameters()} < mine
    assert not any(id(p) in mine for critic in critics(d) for p in critic.critic.module.parameters())
    assert len(d.side_learners()) == 2
    c.peers[1].requires_grad_(False)
    total = d(x).total
    after = weights(d)
    total.backward()
    assert same(after, weights(d))
    assert all(p.grad is None for critic in critics(d) for p in critic.critic.module.parameters())
    assert c.peers[0].hidden[0][0].weight.grad.abs().sum() > 0
    assert first.transfer.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in c.peers[1].parameters())


def test_networks_of_one_width_need_no_transfer_layer():
    c, x = cohort(step=0), batch()
    d = Distillation(c, AdversarialOnline(), [FeatureCritic("linear:input")]).bind(x)
    assert all(isinstance(critic.transfer, nn.Identity) for critic in critics(d))


def test_nothing_changes_in_eval_mode_or_without_gradients_or_when_binding():
    d = Distillation(cohort(), AdversarialOnline(), [FeatureCritic("linear:input")]).bind(batch())
    before = weights(d)
    assert not any(critic.critic.optimizer.state for critic in critics(d))
    with torch.no_grad():
        d(batch())
    d.eval()
    d(batch()).total.backward()
    assert same(before, weights(d))
    d.train()
    (d(batch()).total + d(batch()).total).backward()  # two calls before one backward pass
    assert not same(before, weights(d))


def test_maps_of_different_widths_and_sizes_tokens_and_wrong_shapes():
    torch.manual_seed(0)
    for mine, theirs in (((4, 3, 8, 8), (4, 5, 4, 6)), ((4, 7, 3), (4, 7, 5)), ((4, 3), (4, 5))):
        s = torch.randn(mine, requires_grad=True)
        records = Record(taps={"f": s}), Record(taps={"f": torch.randn(theirs, requires_grad=True)})
        critic = FeatureCritic("f")
        critic.pairs = [("f", "f")]
        critic.build(*records, read_batch((s,)))
        critic(*records, read_batch((s,))).backward()
        assert torch.isfinite(s.grad).all()
        assert s.grad.abs().sum() > 0
        assert records[1]["f"].grad is None
    with pytest.raises(ValueError, match="same number of axes"):
        critic.build(Record(taps={"f": torch.ones(2, 3)}), Record(taps={"f": torch.ones(2, 3, 4)}), read_batch((s,)))
    five = Record(taps={"f": torch.ones(1, 2, 2, 2, 2)})
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        critic.build(five, five, read_batch((s,)))


@pytest.mark.parametrize("value", [0.0, 500.0])
def test_degenerate_features_give_finite_gradients(value):
    s = torch.full((3, 4), value, requires_grad=True)
    records = Record(taps={"f": s}), Record(taps={"f": torch.full((3, 4), -value)})
    critic = FeatureCritic("f")
    critic.pairs = [("f", "f")]
    critic.build(*records, read_batch((s,)))
    critic(*records, read_batch((s,))).backward()
    assert torch.isfinite(s.grad).all()


def test_each_peer_runs_once_and_any_losses_stand_beside_it():
    torch.manual_seed(0)
    images, labels = torch.randn(6, 1, 28, 28), torch.arange(6) % 3
    c = Cohort([SmallCNN(width=4), SmallCNN(width=6), SmallCNN(width=4)])
    losses = [*AdversarialOnline().losses(), AttentionTransfer("stage2"), FitNets("stage3"), RKD("linear:input")]
    d = Distillation(c, AdversarialOnline(), losses).bind((images, labels))
    calls = [0, 0, 0]
    for i, peer in enumerate(c.peers):
        peer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    said = d((images, labels))
    said.total.backward()
    assert calls == [1, 1, 1]
    assert len(d.side_learners()) == 3
    assert all(torch.isfinite(v) for v in said.values.values())
    assert all(torch.isfinite(p.grad).all() for p in d.parameters())


def found(critic_weight: float, seed: int) -> tuple[float, float]:
    """How far the peers' feature statistics are apart on unseen inputs, and how often a fresh judge is right."""
    g = torch.Generator().manual_seed(seed)
    x, unseen = torch.randn(128, 6, generator=g), torch.randn(512, 6, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] + 0.5 * torch.randn(128, generator=g) > 0.5).long()
    torch.manual_seed(seed)
    c = Cohort([MLP(6, (16,), 3), MLP(6, (16,), 3)])
    losses = [TaskLoss(), FeatureCritic("linear:input", hidden=32, lr=1e-2, weight=critic_weight)]
    d = Distillation(c, AdversarialOnline(), losses).bind((x, y))
    optimizer = torch.optim.Adam(d.parameters(), lr=0.003)  # slow beside the discriminators, as the authors do it
    for _ in range(300):
        part = torch.randint(0, 128, (64,))
        optimizer.zero_grad()
        d((x[part], y[part])).total.backward()
        optimizer.step()
    with torch.no_grad():
        a, b = (peer.hidden(unseen) for peer in c.peers)
    gap = (torch.cat([a.mean(0), a.std(0)]) - torch.cat([b.mean(0), b.std(0)])).abs().mean()
    judge = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1), nn.Sigmoid())
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        least_squares_critic(judge(a[:256]), judge(b[:256])).backward()
        optimizer.step()
    right = ((judge(b[256:]) > 0.5).float().mean() + (judge(a[256:]) < 0.5).float().mean()) / 2
    return float(gap), float(right)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_peers_features_become_alike_in_distribution(seed):
    gap_alone, right_alone = found(0.0, seed)
    gap, right = found(1.0, seed)
    assert gap < 0.7 * gap_alone
    assert right < right_alone - 0.02


def test_resuming_is_exact_with_its_discriminators(tmp_path):
    x, y = batch(32)
    data = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 32, 4)]

    def trained(out, stop=None, **how):
        d = Distillation(cohort(3), AdversarialOnline(), AdversarialOnline().losses("linear:input"))
        settings = Training(epochs=4, accumulate=2, progress=False, cpu=True, lr=0.05)
        last = fit(d, data, training=settings, out=out, after_epoch=stop, **how).last
        return list(last.values()), weights(d)

    def stop(line):
        if line.epoch == 1:
            raise InterruptedError

    whole = trained(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        trained(tmp_path / "parts", stop)
    parts = trained(tmp_path / "parts", resume=True)
    assert same(whole[0], parts[0])
    assert same(whole[1], parts[1])


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match="hidden=0"):
        FeatureCritic(hidden=0)
    with pytest.raises(ValueError, match="one pair of features, got 2"):
        Distillation(cohort(), AdversarialOnline(), [FeatureCritic("linear:input", "hidden.0")]).bind(batch())
    with pytest.raises(TypeError, match="AdversarialOnline teaches a tutelage Cohort, got MLP"):
        Distillation(MLP(6, (4,), 3), AdversarialOnline(), [KD()]).bind(batch())
