from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import (
    KD,
    RKD,
    AttentionTransfer,
    Branches,
    Cohort,
    Distillation,
    FitNets,
    JoinedPeers,
    PeerCollaborative,
    RampUp,
    TaskLoss,
    Training,
)
from tutelage.engine import fit
from tutelage.models import MLP, SmallCNN


def peers(count: int = 3, seed: int = 0, augment=None) -> JoinedPeers:
    torch.manual_seed(seed)
    return JoinedPeers([MLP(6, (4 + i,), 3) for i in range(count)], augment)


def batch(n: int = 9):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)


def kl(target, mine, t):
    p = (target / t).softmax(1)
    return t**2 * (p * (p.log() - (mine / t).log_softmax(1))).sum(1).mean()


def noise(x):
    return x + 0.1 * torch.randn_like(x)


def test_the_joint_classifier_reads_what_the_peers_classifiers_read():
    student, (x, _) = peers(), batch()
    said = student(x)
    features = torch.cat([peer.hidden(x) for peer in student.peers], 1)
    torch.testing.assert_close(said.joined, student.joint(features))
    for z, peer in zip(said.peers, student.peers, strict=True):
        torch.testing.assert_close(z, peer(x))
    assert not any(m._forward_pre_hooks for m in student.modules())
    alone = student.joined()
    torch.testing.assert_close(alone(x), said.joined)
    assert alone.role is not student


def test_total_and_gradients_equal_the_naive_formula_with_draws_of_ones_own():
    student, (x, y) = peers(3, augment=noise), batch()
    naive, teacher = copy.deepcopy(student), PeerCollaborative(decay=0.5)
    d = Distillation(student, teacher, [TaskLoss(), KD(temperature=3.0, weight=2 * 0.7)]).bind((x, y))
    with torch.no_grad():  # a step: the averages are now this, and the peers go on
        for p in student.parameters():
            p.add_(0.05)
    d((x, y))
    means = copy.deepcopy(student.peers)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    naive.load_state_dict(student.state_dict())
    for mean, peer in zip(means, student.peers, strict=True):  # step 2: the mean of both
        for old, new in zip(mean.parameters(), peer.parameters(), strict=True):
            old.data = (old.data + new.data) / 2
    torch.manual_seed(8)
    total = d((x, y)).total
    total.backward()

    torch.manual_seed(8)
    seen = [noise(x) for _ in range(3)]
    logits = [peer(v) for peer, v in zip(naive.peers, seen, strict=True)]
    joined = naive.joint(torch.cat([p.hidden(v) for p, v in zip(naive.peers, seen, strict=True)], 1))
    past = [mean(v).detach() for mean, v in zip(means, seen, strict=True)]
    expected = F.cross_entropy(joined, y)
    for i, z in enumerate(logits):
        others = [kl(past[j], z, 3.0) for j in range(3) if j != i]
        expected = expected + F.cross_entropy(z, y) + 0.7 * (kl(joined.detach(), z, 3.0) + sum(others) / 2)
    expected.backward()
    torch.testing.assert_close(total, expected)
    for mine, theirs in zip(student.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_each_peer_and_each_average_runs_once_and_sees_the_same():
    student, (x, y) = peers(3, augment=noise), batch()
    teacher = PeerCollaborative()
    d = Distillation(student, teacher, teacher.losses()).bind((x, y))
    seen: list[list[torch.Tensor]] = [[] for _ in range(6)]
    for i, peer in enumerate([*student.peers, *teacher.mean.copy.peers]):
        peer.register_forward_pre_hook(lambda _, given, i=i: seen[i].append(given[0]))
    d((x, y))
    assert [len(s) for s in seen] == [1] * 6
    assert all(torch.equal(seen[i][0], seen[i + 3][0]) for i in range(3))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][0], x)


def test_the_averages_are_frozen_in_eval_mode_and_not_in_the_optimiser():
    student, (x, y) = peers(), batch()
    teacher = PeerCollaborative()
    d = Distillation(student, teacher, teacher.losses()).bind((x, y)).train()
    before = copy.deepcopy(teacher.mean.copy.state_dict())
    teacher.mean.copy.train()
    d((x, y)).total.backward()
    assert not any(m.training for peer in teacher.mean.copy.peers for m in peer.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.mean.copy.state_dict().items())
    mine = {id(p) for p in d.parameters()}
    assert not any(id(p) in mine or p.grad is not None for p in teacher.mean.copy.parameters())
    assert student.joint.weight.grad.abs().sum() > 0


def test_a_step_of_several_batches_moves_the_averages_once():
    student, (x, y) = peers(), batch()
    teacher = PeerCollaborative(decay=0.9)
    d = Distillation(student, teacher, teacher.losses()).bind((x, y))
    optimizer = torch.optim.SGD(d.parameters(), lr=0.1)
    for _ in range(3):
        for _ in range(4):
            d((x, y)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    d((x, y))
    assert teacher.mean.steps == 3
    with torch.no_grad():
        expected = teacher.mean.copy.peers[1](x)
    torch.testing.assert_close(teacher.mean_peer(1)(x), expected)


def test_branches_share_their_trunk_also_in_the_averages():
    torch.manual_seed(0)
    branches = Branches(SmallCNN(width=4), after="stage1", count=3, example=(1, 28, 28))
    student = JoinedPeers(branches, augment=noise)
    teacher = PeerCollaborative()
    images, labels = torch.randn(6, 1, 28, 28), torch.arange(6) % 3
    d = Distillation(student, teacher, teacher.losses()).bind((images, labels))
    d((images, labels)).total.backward()
    assert student.peers[2].stage1 is student.peers[0].stage1
    assert student.peers[2].stage2 is not student.peers[0].stage2
    averages = teacher.mean.copy.peers
    assert averages[2].stage1 is averages[0].stage1
    assert averages[0].stage1 is not student.peers[0].stage1
    assert all(torch.isfinite(p.grad).all() for p in d.parameters())


def test_any_losses_stand_beside_it():
    torch.manual_seed(0)
    images, labels = torch.randn(6, 1, 28, 28), torch.arange(6) % 3
    student = JoinedPeers([SmallCNN(width=4), SmallCNN(width=4)])
    losses = [TaskLoss(), KD(), AttentionTransfer("stage2"), FitNets("stage3"), RKD("linear:input")]
    d = Distillation(student, PeerCollaborative(), losses).bind((images, labels))
    said = d((images, labels))
    said.total.backward()
    assert all(torch.isfinite(v) and v > 0 for v in said.values.values())
    assert all(p.grad is not None for p in d.parameters())
    assert len([n for n in d.apart if n.startswith("FitNets")]) == 3  # with the first one, a projector a pair
    only = Distillation(student, PeerCollaborative(), [TaskLoss()]).bind((images, labels))
    labelled = [F.cross_entropy(z, labels) for z in (*student(images).peers, student(images).joined)]
    torch.testing.assert_close(only((images, labels)).total, sum(labelled))


def test_resuming_is_exact(tmp_path):
    x, y = batch(32)
    data = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 32, 4)]

    def trained(out, stop=None, **how):
        teacher = PeerCollaborative(decay=0.8)
        d = Distillation(peers(2, augment=noise), teacher, teacher.losses())
        settings = Training(epochs=4, accumulate=2, progress=False, cpu=True, lr=0.1)
        last = fit(d, data, training=settings, out=out, after_epoch=stop, **how).last
        return last, teacher.mean.copy.state_dict()

    def stop(line):
        if line.epoch == 1:
            raise InterruptedError

    whole = trained(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        trained(tmp_path / "parts", stop)
    parts = trained(tmp_path / "parts", resume=True)
    for a, b in zip(whole, parts, strict=True):
        assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_the_weight_rises_over_the_first_epochs():
    weight = PeerCollaborative().losses()[1].weight
    assert isinstance(weight, RampUp)
    assert weight(0.0) == pytest.approx(2 * torch.tensor(-5.0).exp().item())
    assert weight(40 / 300) == pytest.approx(2 * torch.tensor(-5 / 4).exp().item())
    assert weight(80 / 300) == weight(1.0) == 2.0


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match=r"decay=1\.0"):
        PeerCollaborative(1.0)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        JoinedPeers([MLP(6, (4,), 3)])
    with pytest.raises(ValueError, match=r"\[3, 4\] classes"):
        JoinedPeers([MLP(6, (4,), 3), MLP(6, (4,), 4)])
    with pytest.raises(ValueError, match=r"peer 1, a Conv2d, which has none"):
        JoinedPeers([nn.Linear(2, 2), nn.Conv2d(2, 2, 1)])
    with pytest.raises(ValueError, match=r"classifier='head'.*'linear'"):
        JoinedPeers([MLP(6, (4,), 3), MLP(6, (4,), 3)], classifier="head")
    with pytest.raises(TypeError, match="JoinedPeers, got Cohort"):
        Distillation(Cohort([MLP(6, (4,), 3), MLP(6, (4,), 3)]), PeerCollaborative()).bind(batch())
